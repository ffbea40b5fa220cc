"""Tokenizers: SmolLM2's round trips, the pre-tokenizers' rules, and files that are not what they should be."""

import pytest
from files import FAMILIES, FLOAT32, random_params, write_gguf, write_hf

from tokeff.models.gguf_tokenizer import PRE
from tokeff.models.load import load
from tokeff.models.tokenizer import read_tokenizer, write_tokenizer

pytestmark = pytest.mark.core
CFG, _ = FAMILIES["llama"]
TEXTS = ["Hello, how are you?", "1234 5.67", "  two  spaces\n\n\tand tabs \r\n", "naïve – 日本語 🙂", "def f(x):\n    return x", "", " "]


@pytest.fixture
def tiny(tmp_path):
    return load(write_gguf(tmp_path / "tiny.gguf", "llama", CFG, random_params(CFG, ())), FLOAT32).tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_round_trip(smollm2, text):
    assert smollm2.tokenizer.decode(smollm2.tokenizer.encode(text)) == text


def test_smollm2_ids(smollm2):
    """Ids as the model's own tokenizer gives them: digits alone, no bos, control tokens whole."""
    t = smollm2.tokenizer
    assert t.encode("Hello, how are you? 1234") == [19556, 28, 638, 359, 346, 47, 216, 33, 34, 35, 36]
    assert t.encode("<|im_start|>user\nHi<|im_end|>") == [1, 4093, 198, 26843, 2]
    assert t.decode([1, 26843, 2]) == "Hi"
    assert t.decode([1, 26843, 2], special=True) == "<|im_start|>Hi<|im_end|>"


def test_gguf_merges_and_control_tokens(tiny):
    assert tiny.raw.encode("the <s>").tokens == ["the", "Ġ", "<s>"]
    assert tiny.special == {"bos_token": "<s>", "eos_token": "</s>"}


def test_bos_is_added_where_the_file_says_so(tmp_path):
    path = write_gguf(tmp_path / "b.gguf", "llama", CFG, random_params(CFG, ()), extra=lambda w: w.add_add_bos_token(True))
    t = load(path, FLOAT32).tokenizer
    assert t.encode("the")[0] == 1
    assert 1 not in t.encode("the", special=False)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "!\n"]),
        ("gpt-2", ["It", "'s", "Ġ1234", "!", "\n"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "!\n"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "4", "!\n"]),
    ],
)
def test_pre_tokenizers(pre, pieces):
    expected = [p.replace("\n", "Ċ") for p in pieces]
    if pre == "smollm":
        expected[-1:] = ["!", "Ċ"]
    assert [p for p, _ in PRE[pre]().pre_tokenize_str("It's 1234!\n")] == expected


def test_tokenizer_json_beside_a_gguf_goes_first(tmp_path, tiny):
    path = tmp_path / "sub" / "m.gguf"
    path.parent.mkdir()
    write_gguf(path, "llama", CFG, random_params(CFG, ()), tokenizer=False)
    write_tokenizer(tiny, path.parent)
    assert load(path, FLOAT32).tokenizer.encode("the") == tiny.encode("the")


def test_folder_round_trip(tmp_path, tiny):
    write_tokenizer(tiny, tmp_path)
    back = read_tokenizer(tmp_path, CFG.V)
    assert (back.encode("the cat"), back.template, back.special) == (tiny.encode("the cat"), tiny.template, tiny.special)


def test_id_beyond_the_embedding_is_refused(tmp_path, tiny, one_line):
    write_tokenizer(tiny, tmp_path)
    with one_line("no embedding"):
        read_tokenizer(tmp_path, 10).encode("the")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": {"type": "BPE", "vocab": 3}}', "{" * 100_000])
def test_damaged_tokenizer_json(tmp_path, text, one_line):
    folder = write_hf(tmp_path / "hf", CFG, random_params(CFG, ()))
    (folder / "tokenizer.json").write_text(text)
    with one_line("tokenizer.json"):
        load(folder, FLOAT32)


def test_template_sources(tmp_path, tiny):
    """A named list's default, then chat_template.jinja, which goes first; special tokens as objects."""
    write_tokenizer(tiny, tmp_path)
    table = '{"chat_template": [{"name": "default", "template": "A{{ bos_token }}"}], "bos_token": {"content": "<s>"}}'
    (tmp_path / "tokenizer_config.json").write_text(table)
    assert read_tokenizer(tmp_path, CFG.V).chat([]) == "A<s>"
    (tmp_path / "chat_template.jinja").write_text("B")
    assert read_tokenizer(tmp_path, CFG.V).template == "B"
