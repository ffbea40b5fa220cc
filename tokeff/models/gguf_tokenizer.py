"""The tokenizer inside a GGUF file: byte-level BPE from its vocabulary and merges.

Pre-tokenizers as in the models' own tokenizer.json files (llama.cpp's names for them): 'smollm' splits digits one by one and
then by GPT-2's rule, 'qwen2' and 'llama-bpe' split by their own patterns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer

from tokeff.errors import UserError
from tokeff.models.fields import Fields
from tokeff.models.tokenizer import Tokenizer, read_tokenizer

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(_WORDS.replace("DIGITS", digits)), "isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


PRE = {
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()]),
    "gpt-2": _gpt2,
    "qwen2": lambda: _split(""),
    "llama-bpe": lambda: _split("{1,3}"),
}


def gguf_tokenizer(metadata: dict[str, Any], path: Path, V: int) -> Tokenizer:
    """The tokenizer of a GGUF file; a tokenizer.json in the same folder goes first.

    Raises UserError for another kind of vocabulary or pre-tokenizer than byte-level BPE with a rule in `PRE`.
    """
    beside = read_tokenizer(path.parent, V)
    if beside is not None:
        return beside
    f = Fields({k.removeprefix("tokenizer."): v for k, v in metadata.items()}, str(path))
    kind, pre = f.word("ggml.model"), f.word("ggml.pre", "default")
    if kind != "gpt2" or pre not in PRE:
        raise UserError(
            f"{path}: tokenizer {kind[:40]!r} with pre-tokenizer {pre[:40]!r} is not supported (gpt2 with {', '.join(PRE)} is); "
            "put the model's tokenizer.json in the same folder"
        )
    tokens = _strings(f, "ggml.tokens")
    raw = _bpe(f, tokens, pre)
    bos = next(iter(f.ids("ggml.bos_token_id")), None)
    if f.flag("ggml.add_bos_token", pre == "llama-bpe") and bos is not None and bos < len(tokens):
        pair = (tokens[bos], bos)
        raw.post_processor = processors.TemplateProcessing(single=f"{tokens[bos]} $A", special_tokens=[pair])
    special = {}
    for key, name in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        for i in f.ids(f"ggml.{name}_token_id"):
            if i < len(tokens):
                special[key] = tokens[i]
    return Tokenizer(raw, V, f.word("chat_template", "") or None, special)


def _bpe(f: Fields, tokens: list[str], pre: str) -> RawTokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(m.split(" ")) for m in _strings(f, "ggml.merges")]
    try:
        model = models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe")  # type: ignore[arg-type]
    except Exception as e:  # the package raises bare Exception
        raise UserError(f"{f.where}: the tokenizer's merges do not fit its vocabulary ({str(e)[:120]})") from None
    raw = RawTokenizer(model)
    if pre == "qwen2":
        raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer, raw.decoder = PRE[pre](), decoders.ByteLevel()
    kinds = f.get("ggml.token_type", [])
    if not isinstance(kinds, list) or (kinds and len(kinds) != len(tokens)):
        raise f.fail("ggml.token_type", f"a list of {len(tokens)} numbers")
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds) if k == CONTROL])
    raw.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, kinds) if k == USER_DEFINED])
    return raw


def _strings(f: Fields, key: str) -> list[str]:
    value = f.get(key)
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise f.fail(key, "a list of strings")
    return value
