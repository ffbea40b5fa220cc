"""Whisper: equal to transformers' in every part, the same from both file formats, in batches, with a cache and with merging."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import hearing
from speech_files import CFG, tensors, write_ct2, write_hf

from tokeff.data import speech
from tokeff.errors import UserError
from tokeff.models.audio import log_mel, read_wav
from tokeff.models.config import Precision
from tokeff.models.flow import EMPTY
from tokeff.models.load import load
from tokeff.models.transcribe import pieces, transcribe
from tokeff.models.whisper import decode, encode, greedy, listen, silence
from tokeff.models.whisper_load import load_whisper
from tokeff.reduce.merge import ToMe, to_share

DROP = (6, 3)
written = jax.jit(decode, static_argnums=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_whisper(write_hf(tmp_path_factory.mktemp("hf") / "tiny", tensors()), Precision())


@pytest.fixture(scope="module")
def mel():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 2 * CFG.S, CFG.I)), jnp.float32)


def logits_of(m, heard, tokens_BT):
    """float32 logits_BTV of whole transcripts, in one call."""
    return written(m.params, m.cfg, tokens_BT, 0, heard, silence(m.cfg, *tokens_BT.shape))[0]


@pytest.mark.peers
def test_whisper_equals_transformers(peers, tmp_path):
    """Encoder rows, decoder logits and log-mel within 1e-4 in float32."""
    peers("make_whisper.py", tmp_path)
    made = {p.stem: np.load(p) for p in tmp_path.glob("*.npy")}
    m = load_whisper(tmp_path / "model", Precision())
    rows = encode(m.params, m.cfg, jnp.asarray(made["mel"].swapaxes(1, 2)))
    worst = {
        "rows": np.abs(rows.x_BMD - made["rows"]).max(),
        "logits": np.abs(logits_of(m, listen(m.params, rows), made["tokens"]) - made["logits"]).max(),
        "log_mel": np.abs(log_mel(made["sound"]).T - made["log_mel"]).max(),
    }
    print(worst)
    assert max(worst.values()) < 1e-4


@pytest.mark.core
def test_both_formats_give_the_same_model(tiny, tmp_path):
    other = load_whisper(write_ct2(tmp_path / "tiny", tensors()), Precision())
    same = ("V", "D", "F", "L", "layers", "N", "I", "S", "max_len", "never", "never_first")
    assert [getattr(other.cfg, f) for f in same] == [getattr(tiny.cfg, f) for f in same] == [getattr(CFG, f) for f in same]
    jax.tree.map(np.testing.assert_array_equal, other.params, tiny.params)


@pytest.mark.core
@pytest.mark.parametrize("drop", [(), DROP])
def test_greedy_equals_choosing_from_whole_transcripts(tiny, mel, drop):
    """The cached loop writes what the largest allowed logit of a whole pass says, for a batch as for its rows alone."""
    rows = encode(tiny.params, tiny.cfg, mel, reduce=ToMe() if drop else None, drop=drop)
    heard, most = listen(tiny.params, rows, proportional=bool(drop)), 8
    got = np.asarray(greedy(tiny.params, tiny.cfg, heard, most))
    text = np.full((2, most), EMPTY)
    for b in range(2):
        tokens = np.zeros((2, 1 + most), int)
        tokens[:, 0] = CFG.start
        for i in range(most):
            logits = np.array(logits_of(tiny, heard, tokens))[b, i]
            logits[[*CFG.never, *(CFG.never_first if i == 0 else ())]] = -np.inf
            if logits.argmax() == CFG.eos:
                break
            text[b, i] = tokens[:, i + 1] = logits.argmax()
    np.testing.assert_array_equal(got, text)
    print(got)
    assert (got[0] != EMPTY).sum() != (got[1] != EMPTY).sum()  # one ends earlier


@pytest.mark.core
def test_nothing_to_merge_changes_nothing(tiny, mel):
    plain, none = encode(tiny.params, tiny.cfg, mel), encode(tiny.params, tiny.cfg, mel, reduce=ToMe(), drop=(0, 0))
    np.testing.assert_array_equal(plain.x_BMD, none.x_BMD)
    some = encode(tiny.params, tiny.cfg, mel, reduce=ToMe(), drop=DROP)
    assert some.x_BMD.shape[1] == CFG.S - sum(DROP)
    for b in range(2):
        np.testing.assert_array_equal(np.bincount(some.source_BS[b], minlength=CFG.S - sum(DROP)), some.size_BM[b])


@pytest.mark.core
def test_merged_rows_draw_attention_for_all_they_stand_for(tiny, mel):
    """In the encoder behind a merge, and in the decoder (`proportional`): as if each were there that often; counted once is another."""
    rows = encode(tiny.params, tiny.cfg, mel, reduce=ToMe(), drop=DROP)
    tokens = np.random.default_rng(1).integers(0, CFG.V, (2, 9))
    logits = logits_of(tiny, listen(tiny.params, rows, proportional=True), tokens)
    for b in range(2):
        x, sizes = hearing.encode(tiny.params, tiny.cfg, mel[b], DROP)
        np.testing.assert_allclose(rows.x_BMD[b], x, atol=1e-4)
        assert rows.size_BM[b].tolist() == sizes and max(sizes) > 1
        known = hearing.decode(tiny.params, tiny.cfg, tokens[b], x, sizes)
        np.testing.assert_allclose(logits[b], known, atol=1e-3)
        once, _ = hearing.encode(tiny.params, tiny.cfg, mel[b], DROP, sized=False)
        assert np.abs(once - x).max() > 1e-2
        assert np.abs(hearing.decode(tiny.params, tiny.cfg, tokens[b], x, [1] * len(x)) - known).max() > 1e-2


@pytest.mark.core
def test_sound_with_nothing_in_it_is_refused_before_the_model_runs(tiny, monkeypatch, one_line):
    """Empty or silent, alone or beside others; a long sound may be silent for a while."""
    monkeypatch.setattr("tokeff.models.transcribe.encode", None)
    sound = np.random.default_rng(0).normal(size=9000)
    for bad, words in ((np.zeros(0), "no samples"), (np.zeros(16_000), "silent"), (np.full(50, 0.1), "silent"), (sound[None], "no row")):
        with one_line(words):
            transcribe(tiny, [sound, bad])
    with one_line("no sound"):
        transcribe(tiny, [])
    assert len(pieces(tiny, [np.concatenate([np.zeros(9 * 160 * 40), sound])])[0]) > 1


@pytest.mark.core
def test_input_that_does_not_fit_is_refused_in_one_line(tiny, mel, tmp_path, one_line):
    with one_line("40 frames x 4 bands", "(39, 4)"):
        encode(tiny.params, tiny.cfg, mel[:, 1:])
    with one_line("drop names 1 layers", "has 2"):
        encode(tiny.params, tiny.cfg, mel, reduce=ToMe(), drop=(1,))
    with one_line("19 of 14 rows cannot be taken away", "0 to 13"):
        encode(tiny.params, tiny.cfg, mel, reduce=ToMe(), drop=(6, 19))
    with one_line("16 tokens does not fit", "1 to 15"):
        greedy(tiny.params, tiny.cfg, listen(tiny.params, encode(tiny.params, tiny.cfg, mel)), 16)
    with one_line("tiny has no tokenizer", "tokenizer.json"):
        _ = tiny.tok
    with one_line("load_whisper"):
        load("whisper-tiny.en")
    with one_line("no speech model named 'whisper-tiny'", "did you mean 'whisper-tiny.en'"):
        load_whisper("whisper-tiny")
    folder = write_hf(tmp_path / "tiny", tensors())
    config = json.loads((folder / "config.json").read_text())
    for change, words in (
        ({"decoder_ffn_dim": 32}, "differ in heads or feed-forward"),
        ({"model_type": "llama"}, "is of a 'llama' model"),
        ({"activation_function": "relu"}, "another activation than gelu"),
        ({"suppress_tokens": [400]}, "token ids below 40"),
        ({"encoder_layers": 10**9}, "encoder_layers"),
        ({"encoder_layers": 3}, "encoder.layers.2.final_layer_norm.weight is missing"),
        ({"encoder_layers": 1}, "tensors have no place in this model"),
        ({"max_source_positions": 21}, "has shape (20, 16), the model needs (21, 16)"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with one_line(words):
            load_whisper(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04" + bytes(64))
    with one_line("pytorch_model.bin", "not a Whisper model"):
        load_whisper(folder / "pytorch_model.bin")


@pytest.mark.core
def test_sounds_become_windows_of_the_models_length(tiny, one_line):
    x = np.random.default_rng(0).normal(size=9 * 160 * 40 // 4)
    mel_BTI, owner = pieces(tiny, [x, x[:100]])
    assert mel_BTI.shape == (len(owner), 2 * CFG.S, CFG.I) and owner[-1] == 1 and len(owner) >= 4
    with one_line("no sound"):
        pieces(tiny, [])


@pytest.mark.slow
def test_read_english_is_written_down():
    """The opening of A Tale of Two Cities, 44 seconds in two windows: at most 3 of 119 words are wrong, with all rows or two thirds."""
    try:
        m, clip = load_whisper(), speech.read()[0]
    except UserError as e:
        pytest.skip(f"no model or sound: {e}")
    sound = read_wav(clip.path)
    for reduce, drop in ((None, ()), (ToMe(ordered=True), to_share(1500, 4, 0.66))):
        (text,) = transcribe(m, [sound], reduce=reduce, drop=drop, most=128)
        wrong, words = speech.word_errors(text, clip.said)
        print(wrong, words, text)
        assert wrong <= 3 and words == 119
