"""GGUF files: every quantisation type against the format's definition, every architecture round trip."""

import gguf
import jax
import numpy as np
import pytest
from files import FAMILIES, FLOAT32, random_params, write_gguf
from gguf import GGMLQuantizationType as Type

from tokeff.models.config import Config, Rope
from tokeff.models.gguf_file import GgufTensors, unpermute
from tokeff.models.gguf_header import read_header
from tokeff.models.load import load
from tokeff.models.rope import frequencies

pytestmark = pytest.mark.core


@pytest.mark.parametrize("arch", FAMILIES)
def test_round_trip(arch, tmp_path):
    cfg, optional = FAMILIES[arch]
    params = random_params(cfg, optional)
    model = load(write_gguf(tmp_path / "tiny.gguf", arch, cfg, params), FLOAT32)
    assert model.cfg == Config(**{**cfg.__dict__, "eps": model.cfg.eps})  # the file holds eps in float32
    assert model.cfg.eps == pytest.approx(cfg.eps)
    assert jax.tree.structure(model.params) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(params)):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_unpermute_undoes_the_converter():
    w = np.arange(2 * 6 * 3).reshape(12, 3)  # two heads of 6
    pairs = w.reshape(2, 2, 3, 3).swapaxes(1, 2).reshape(12, 3)
    np.testing.assert_array_equal(pairs[:6, 0] // 3, [0, 3, 1, 4, 2, 5])
    np.testing.assert_array_equal(unpermute(pairs, 6), w)


def read_raw(tmp_path, raw: np.ndarray, kind: Type) -> np.ndarray:
    """Write blocks of one type as a file of one tensor, read it back with our reader."""
    path = tmp_path / "one.gguf"
    w = gguf.GGUFWriter(path, "llama")
    w.add_tensor("t", raw, raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    header, buffer = read_header(path)
    return GgufTensors(header, buffer, str(path)).read("t")


def half(raw: bytes) -> float:
    return float(np.frombuffer(raw, np.float16)[0])


def nibbles(raw: bytes) -> list[int]:
    """Sixteen bytes as 32 values: the low halves, then the high halves."""
    return [b & 15 for b in raw] + [b >> 4 for b in raw]


def q4_0(b: bytes) -> list[float]:
    return [half(b[:2]) * (q - 8) for q in nibbles(b[2:])]


def q4_1(b: bytes) -> list[float]:
    return [half(b[:2]) * q + half(b[2:4]) for q in nibbles(b[4:])]


def q5_0(b: bytes) -> list[float]:
    high = int.from_bytes(b[2:6], "little")
    return [half(b[:2]) * ((q | (high >> i & 1) << 4) - 16) for i, q in enumerate(nibbles(b[6:]))]


def q8_0(b: bytes) -> list[float]:
    return [half(b[:2]) * int(q) for q in np.frombuffer(b[2:], np.int8)]


def q4_k(b: bytes) -> list[float]:
    """8 sub-blocks of 32: six-bit scales and minima packed in 12 bytes (ggml's get_scale_min_k4)."""
    s, q, out = b[4:16], b[16:], []
    for j in range(8):
        if j < 4:
            scale, low = s[j] & 63, s[j + 4] & 63
        else:
            scale, low = s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4
        part = q[32 * (j // 2) : 32 * (j // 2) + 32]
        out += [half(b[:2]) * scale * (x >> 4 if j % 2 else x & 15) - half(b[2:4]) * low for x in part]
    return out


def q6_k(b: bytes) -> list[float]:
    """Two halves of 128 values: four low bits in ql, two high bits in qh, an int8 scale per 16."""
    ql, qh, scales, out = b[:128], b[128:192], np.frombuffer(b[192:208], np.int8), [0.0] * 256
    for n in range(2):
        low, high = ql[64 * n : 64 * n + 64], qh[32 * n : 32 * n + 32]
        for j in range(128):
            four = low[j % 64] >> 4 if j >= 64 else low[j % 64]
            q = (four & 15 | (high[j % 32] >> 2 * (j // 32) & 3) << 4) - 32
            out[128 * n + j] = half(b[208:210]) * int(scales[8 * n + j // 16]) * q
    return out


ORACLES = {Type.Q4_0: q4_0, Type.Q4_1: q4_1, Type.Q5_0: q5_0, Type.Q8_0: q8_0, Type.Q4_K: q4_k, Type.Q6_K: q6_k}


@pytest.mark.parametrize("kind", ORACLES, ids=lambda k: k.name)
def test_dequantised_as_the_format_says(kind, tmp_path):
    """Random bytes with sane float16 scales, read through the file, equal the format's definition value by value."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (3, 2, size), dtype=np.uint8)
    scale = np.random.default_rng(1).normal(size=(3, 2, 2)).astype(np.float16)
    at = {Type.Q6_K: [208]}.get(kind, [0, 2] if kind in (Type.Q4_1, Type.Q4_K) else [0])
    for i, offset in enumerate(at):
        raw[..., offset : offset + 2] = np.ascontiguousarray(scale[..., i]).view(np.uint8).reshape(3, 2, 2)
    got = read_raw(tmp_path, raw.reshape(3, 2 * size), kind)
    expected = [[x for block in row for x in ORACLES[kind](block.tobytes())] for row in raw]
    assert got.shape == (3, 2 * values)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16], ids=lambda k: k.name)
def test_plain_types(kind, tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    raw = {Type.F32: x, Type.F16: x.astype(np.float16), Type.BF16: gguf.quantize(x, Type.BF16)}[kind]
    got = read_raw(tmp_path, raw, kind)
    assert got.shape == (3, 64)
    np.testing.assert_allclose(got, x, rtol=0 if kind == Type.F32 else 2**-8)


def test_quantised_model_is_close(tmp_path):
    cfg, optional = FAMILIES["llama"]
    params = random_params(cfg, optional)
    got = load(write_gguf(tmp_path / "q.gguf", "llama", cfg, params, kind=Type.Q8_0), FLOAT32).params
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(params)):
        np.testing.assert_allclose(a, b, atol=0.03)


def test_llama3_frequency_table_becomes_its_rule(tmp_path, one_line):
    cfg, optional = FAMILIES["llama"]
    rope = Rope(5e5, "llama3", 32.0, 8192, 1.0, 4.0)
    table = (frequencies(Rope(5e5), cfg.H) / frequencies(rope, cfg.H)).astype(np.float32)
    params = random_params(cfg, optional)
    path = write_gguf(tmp_path / "a.gguf", "llama", cfg, params, extra=lambda w: w.add_tensor("rope_freqs.weight", table))
    assert load(path, FLOAT32).cfg.rope == rope
    other = np.linspace(1, 32, cfg.H // 2, dtype=np.float32)
    path = write_gguf(tmp_path / "b.gguf", "llama", cfg, params, extra=lambda w: w.add_tensor("rope_freqs.weight", other))
    with one_line("rope_freqs.weight", "safetensors"):
        load(path, FLOAT32)


def test_smollm2(smollm2):
    cfg = smollm2.cfg
    assert (cfg.V, cfg.D, cfg.F, cfg.L, cfg.N, cfg.K, cfg.H) == (49152, 576, 1536, 30, 9, 3, 64)
    assert (cfg.rope, cfg.tied, cfg.eos, cfg.max_len, cfg.name) == (Rope(1e5), True, (2,), 8192, "smollm2-135m")
