"""A GGUF file as (Config, Params): metadata keys, tensor names and the row order of the supported architectures.

Follows llama.cpp's converter (convert_hf_to_gguf.py, MIT): llama-architecture files (Llama, SmolLM2, Mistral) have the rows
of q and k permuted for interleaved rotary pairs, the others have not; Gemma's norm weights already hold 1 + w.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import numpy as np

from tokeff.errors import UserError
from tokeff.models.config import Config, Params, Precision, Rope
from tokeff.models.fields import Fields
from tokeff.models.gguf_header import Header, read_header
from tokeff.models.hf_config import MAX_LAYERS
from tokeff.models.layout import BIASES, POST_NORMS, QK_NORMS, Names, assemble, check
from tokeff.models.rope import frequencies

ARCHS = {  # the optional Block fields of each architecture; a llama file may or may not have biases
    "llama": (),
    "qwen2": BIASES,
    "qwen3": QK_NORMS,
    "gemma2": POST_NORMS,
    "gemma3": QK_NORMS + POST_NORMS,
}
_BLOCK = {
    "attn_norm_D": "attn_norm.weight",
    "q_NHD": "attn_q.weight",
    "k_KHD": "attn_k.weight",
    "v_KHD": "attn_v.weight",
    "o_DNH": "attn_output.weight",
    "ffn_norm_D": "ffn_norm.weight",
    "gate_FD": "ffn_gate.weight",
    "up_FD": "ffn_up.weight",
    "down_DF": "ffn_down.weight",
    "q_bias_NH": "attn_q.bias",
    "k_bias_KH": "attn_k.bias",
    "v_bias_KH": "attn_v.bias",
    "q_norm_H": "attn_q_norm.weight",
    "k_norm_H": "attn_k_norm.weight",
    "post_attn_norm_D": "post_attention_norm.weight",
    "post_ffn_norm_D": "post_ffw_norm.weight",
}
NAMES = Names("token_embd.weight", "output_norm.weight", "output.weight", {f: f"blk.{{i}}.{n}" for f, n in _BLOCK.items()})
FREQS = "rope_freqs.weight"  # Llama 3.1's scaling, as one divisor per frequency


class GgufTensors:
    """Tensors of a GGUF file, dequantised to float32 one at a time."""

    def __init__(self, header: Header, buffer: mmap.mmap, where: str):
        self.where = where
        self.shapes = {name: info.shape for name, info in header.tensors.items()}
        self._infos, self._buffer = header.tensors, buffer

    def read(self, name: str) -> np.ndarray:
        from gguf import dequantize
        from gguf.constants import GGMLQuantizationType as Type

        info = self._infos[name]
        plain = {Type.F32: np.float32, Type.F16: np.float16}.get(info.type)
        raw = np.frombuffer(self._buffer, np.uint8, info.bytes, info.start)
        raw = raw.view(plain) if plain else raw.reshape(*info.shape[:-1], -1)
        return dequantize(raw, info.type).reshape(info.shape)


def load_gguf(path: Path, name: str, precision: Precision) -> tuple[Config, Params, Header]:
    """Config, weights (dequantised, then cast) and the header, whose metadata also holds the tokenizer."""
    header, buffer = read_header(path)
    source = GgufTensors(header, buffer, str(path))
    arch = str(header.metadata.get("general.architecture"))[:60]
    if arch not in ARCHS:
        raise UserError(f"{path}: GGUF architecture {arch!r} is not supported; supported: {', '.join(ARCHS)}")
    cfg = _config(header, name, arch, source, path)
    biased = arch == "llama" and "blk.0.attn_q.bias" in source.shapes
    wanted = NAMES.of(cfg, BIASES if biased else ARCHS[arch])
    check(source, wanted, cfg, lambda name: name == FREQS)

    def fix(field: str, array: np.ndarray) -> np.ndarray:
        turned = arch == "llama" and field in ("q_NHD", "k_KHD", "q_bias_NH", "k_bias_KH")
        return unpermute(array, cfg.H) if turned else array

    return cfg, assemble(source, wanted, cfg, precision, fix), header


def unpermute(w: np.ndarray, H: int) -> np.ndarray:
    """Rows of (heads*H, ...) from interleaved rotary pairs (0, 1), (2, 3) to halves (0, H/2), (1, H/2 + 1)."""
    heads = w.shape[0] // H
    return w.reshape(heads, H // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _config(header: Header, name: str, arch: str, source: GgufTensors, path: Path) -> Config:
    f = Fields({k.removeprefix(f"{arch}."): v for k, v in header.metadata.items()}, str(path))
    D, N, L = f.whole("embedding_length"), f.whole("attention.head_count"), f.whole("block_count", high=MAX_LAYERS)
    K = f.whole("attention.head_count_kv", N)
    H = f.whole("attention.key_length", max(D // N, 1))
    if N % K or H % 2 or f.whole("attention.value_length", H) != H or f.whole("rope.dimension_count", H) != H:
        raise UserError(f"{path}: {N} query heads, {K} key/value heads of size {H}, or a partial rotary, are not supported")
    gemma = arch.startswith("gemma")
    deep = (arch, L) in (("gemma2", 46), ("gemma3", 62))  # the 27B models scale by D/N instead of H, as llama.cpp knows
    windows = _windows(f, arch, L)
    return Config(
        name=name,
        V=source.shapes.get(NAMES.embed, (0,))[0],
        D=D,
        F=f.whole("feed_forward_length"),
        L=L,
        N=N,
        K=K,
        H=H,
        rope=_rope(f, source, H),
        local_rope=Rope(f.number("rope.freq_base_swa", 10_000.0, low=1.0)) if arch == "gemma3" else None,
        windows=windows,
        eps=f.number("attention.layer_norm_rms_epsilon"),
        act="gelu_tanh" if gemma else "silu",
        scale=(D / N if deep else H) ** -0.5,
        softcap=f.number("attn_logit_softcapping", 50.0) if arch == "gemma2" else 0.0,
        final_softcap=f.number("final_logit_softcapping", 30.0 if arch == "gemma2" else 0.0) if gemma else 0.0,
        embed_scale=math.sqrt(D) if gemma else 1.0,
        tied=NAMES.head not in source.shapes,
        max_len=f.whole("context_length"),
        eos=tuple(dict.fromkeys(i for k in ("eos", "eot", "eom") for i in f.ids(f"tokenizer.ggml.{k}_token_id"))),
        bos=next(iter(f.ids("tokenizer.ggml.bos_token_id")), None),
    )


def _windows(f: Fields, arch: str, L: int) -> tuple[int | None, ...]:
    """Sliding window per layer: every layer of a llama file that names one (Mistral), Gemma's patterns, else none."""
    key = "attention.sliding_window"
    if arch.startswith("qwen") or not f.get(key, 0):
        return (None,) * L
    every = {"llama": 0, "gemma2": 2, "gemma3": f.whole("attention.sliding_window_pattern", 6)}[arch]
    return tuple(None if every and (i + 1) % every == 0 else f.whole(key) for i in range(L))


def _rope(f: Fields, source: GgufTensors, H: int) -> Rope:
    base, kind = f.number("rope.freq_base", 10_000.0, low=1.0), f.word("rope.scaling.type", "none")
    if FREQS in source.shapes:
        return _llama3(source, base, H)
    if kind == "none":
        return Rope(base)
    factor = f.number("rope.scaling.factor", 1.0, low=1e-3)
    if kind == "linear":
        return Rope(base, "linear", factor)
    if kind != "yarn":
        raise UserError(f"{f.where}: rope scaling {kind[:60]!r} is not supported; supported: none, linear, yarn, llama3")
    original = f.whole("rope.scaling.original_context_length", f.whole("context_length"))
    gain = f.number("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(max(factor, 1.0)))
    fast, slow = (f.number(f"rope.scaling.yarn_beta_{k}", d) for k, d in (("fast", 32.0), ("slow", 1.0)))
    return Rope(base, "yarn", factor, original, beta_fast=fast, beta_slow=slow, attention_factor=gain)


def _llama3(source: GgufTensors, base: float, H: int) -> Rope:
    """The rule behind a table of frequency divisors: Llama 3.1 to 3.3 all use low 1, high 4 and 8192 original tokens."""
    if source.shapes[FREQS] != (H // 2,):
        raise UserError(f"{source.where}: tensor {FREQS} has shape {source.shapes[FREQS]}, expected {(H // 2,)}")
    divisors = source.read(FREQS)
    if not np.all(divisors >= 1):
        raise UserError(f"{source.where}: tensor {FREQS} holds divisors below 1; download the file again")
    rope = Rope(base, "llama3", float(divisors.max()), 8192)
    if not np.allclose(frequencies(Rope(base), H) / divisors, frequencies(rope, H), rtol=1e-4):
        raise UserError(f"{source.where}: the divisors in {FREQS} are not Llama 3.1's rule; use the safetensors folder")
    return rope
