"""A Hugging Face config.json as a `Config`: every family the decoder computes, old and new layouts of the rope fields.

Field meanings and defaults follow the configuration classes of transformers 5.2 (Apache-2.0). A sliding window W there
lets a query at q see keys with q - k < W, which is our W tokens with the query itself among them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokeff.errors import UserError
from tokeff.models.config import Config, Rope
from tokeff.models.fields import Fields
from tokeff.models.layout import BIASES, POST_NORMS, QK_NORMS

MAX_LAYERS = 4096
ACTS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
PICTURES = {
    **dict.fromkeys(("llava", "llava_next", "llava_onevision"), "llava_hf.load_llava"),
    **dict.fromkeys(("vit", "clip", "clip_vision_model", "siglip", "siglip_vision_model"), "vit_hf.load_vit"),
}
ROPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}


@dataclass(frozen=True)
class Family:
    """A model_type: what its config class fills in for absent keys, and which optional weights its layers have."""

    defaults: Mapping[str, Any]
    optional: tuple[str, ...] = ()
    gemma: bool = False


_GEMMA = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_GEMMA2 = {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA3 = {"max_position_embeddings": 131072, "vocab_size": 262208}
_QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}
_LLAMA = {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2}
_MISTRAL = {**_LLAMA, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
FAMILIES = {
    "llama": Family(_LLAMA),
    "mistral": Family(_MISTRAL),
    "qwen2": Family(_QWEN, BIASES),
    "qwen3": Family({**_QWEN, "head_dim": 128}, QK_NORMS),
    "gemma2": Family({**_GEMMA, **_GEMMA2}, POST_NORMS, gemma=True),
    "gemma3_text": Family({**_GEMMA, **_GEMMA3}, QK_NORMS + POST_NORMS, gemma=True),
}


@dataclass(frozen=True)
class Described:
    """A parsed config.json: the model's numbers, its family, and the optional Block fields to expect."""

    cfg: Config
    family: Family
    optional: tuple[str, ...]


def describe(raw: Mapping[str, Any], name: str, where: str, eos: tuple[int, ...] = ()) -> Described:
    """Parse a config.json. `eos` are further end-of-text ids (from generation_config.json).

    Raises UserError naming the field for an unsupported architecture, rope kind, activation or a value out of range.
    """
    kind = raw.get("model_type")
    inner = raw.get("text_config")
    if kind == "gemma3" and isinstance(inner, dict):  # the multimodal wrapper: its text half is a Gemma 3 text model
        kind, raw = "gemma3_text", {**{k: raw[k] for k in ("eos_token_id", "bos_token_id") if k in raw}, **inner}
    if kind in PICTURES:
        raise UserError(f"{where}: {kind} reads pictures; load it with tokeff.models.{PICTURES[kind]}")
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type {str(kind)[:60]!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    f = Fields({**family.defaults, **raw}, where)
    _refuse(f)
    optional = tuple(dict.fromkeys((*family.optional, *(BIASES if f.flag("attention_bias", False) else ()))))
    return Described(_config(f, kind, family, name, eos), family, optional)


def _refuse(f: Fields) -> None:
    """What the decoder does not compute, said before anything is read."""
    if f.get("quantization_config", None) is not None:
        raise UserError(f"{f.where}: quantised safetensors are not supported; use the unquantised weights or a GGUF file")
    for key in ("mlp_bias", "use_bidirectional_attention"):
        if f.get(key, None):
            raise UserError(f"{f.where}: {key} is not supported")


def _config(f: Fields, kind: str, family: Family, name: str, eos: tuple[int, ...]) -> Config:
    D, N, L = f.whole("hidden_size"), f.whole("num_attention_heads"), f.whole("num_hidden_layers", high=MAX_LAYERS)
    K, H = f.whole("num_key_value_heads", N), f.whole("head_dim", max(D // N, 1))
    if N % K or H % 2:
        raise UserError(f"{f.where}: {N} query heads of size {H} do not fit {K} key/value heads (even sizes, whole groups)")
    full, local = _ropes(f, kind)
    scalar = f.number("query_pre_attn_scalar", H, low=1e-6) if family.gemma else H
    return Config(
        name=name,
        V=f.whole("vocab_size"),
        D=D,
        F=f.whole("intermediate_size"),
        L=L,
        N=N,
        K=K,
        H=H,
        rope=full,
        local_rope=local,
        windows=_windows(f, kind, L),
        eps=f.number("rms_norm_eps", 1e-6),
        act=_act(f, family),
        scale=scalar**-0.5,
        softcap=f.number("attn_logit_softcapping", 0.0) if family.gemma else 0.0,
        final_softcap=f.number("final_logit_softcapping", 0.0) if family.gemma else 0.0,
        embed_scale=math.sqrt(D) if family.gemma else 1.0,
        tied=f.flag("tie_word_embeddings", False),
        max_len=f.whole("max_position_embeddings"),
        eos=tuple(dict.fromkeys((*f.ids("eos_token_id"), *eos))),
        bos=next(iter(f.ids("bos_token_id")), None),
    )


def _act(f: Fields, family: Family) -> str:
    key, default = ("hidden_activation", "gelu_pytorch_tanh") if family.gemma else ("hidden_act", "silu")
    act = f.word(key, default)
    if act not in ACTS:
        raise UserError(f"{f.where}: {key} {act[:60]!r} is not supported; supported: {', '.join(ACTS)}")
    return ACTS[act]


def _windows(f: Fields, kind: str, L: int) -> tuple[int | None, ...]:
    """Sliding window per layer, None for full attention."""
    types = f.get("layer_types", None)
    if kind == "llama" or (kind == "mistral" and f.get("sliding_window", None) is None):
        return (None,) * L
    if kind == "mistral":
        sliding = [True] * L
    elif types is not None:
        if not isinstance(types, list) or len(types) != L or not set(types) <= {"full_attention", "sliding_attention"}:
            raise UserError(f"{f.where}: layer_types must name full_attention or sliding_attention for each of {L} layers")
        sliding = [t == "sliding_attention" for t in types]
    elif kind.startswith("gemma"):
        pattern = 2 if kind == "gemma2" else f.whole("sliding_window_pattern", 6)
        sliding = [(i + 1) % pattern != 0 for i in range(L)]
    else:
        first = f.whole("max_window_layers", L, low=0) if f.flag("use_sliding_window", False) else L
        sliding = [i >= first for i in range(L)]
    window = f.whole("sliding_window") if any(sliding) else None
    return tuple(window if s else None for s in sliding)


def _ropes(f: Fields, kind: str) -> tuple[Rope, Rope | None]:
    """(rope of full-attention layers, rope of sliding layers or None for the same)."""
    new, old = f.table("rope_parameters"), f.table("rope_scaling")
    if kind != "gemma3_text":
        base = f.number("rope_theta", 10_000.0, low=1.0)
        return _rope({**new, **old}, base, f), None
    nested = {k: v for k, v in new.items() if isinstance(v, dict)}
    full = nested.get("full_attention") or {**{k: v for k, v in new.items() if k not in nested}, **old}
    base, local = f.number("rope_theta", 1_000_000.0, low=1.0), f.number("rope_local_base_freq", 10_000.0, low=1.0)
    return _rope(full, base, f), _rope(nested.get("sliding_attention") or {}, local, f)


def _rope(table: Mapping[str, Any], base: float, f: Fields) -> Rope:
    """One set of rope parameters; `base` where the table has no rope_theta of its own."""
    r = Fields(table, f"{f.where} rope parameters")
    kind = r.word("rope_type", table.get("type") or "default")
    if kind not in ROPES:
        raise UserError(f"{f.where}: rope type {kind[:60]!r} is not supported; supported: {', '.join(ROPES)}")
    if r.number("partial_rotary_factor", f.number("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{f.where}: partial_rotary_factor other than 1 is not supported")
    base = r.number("rope_theta", base, low=1.0)
    if kind == "default":
        return Rope(base)
    original = (
        0
        if kind == "linear"
        else f.whole(
            "original_max_position_embeddings",
            r.whole("original_max_position_embeddings", f.whole("max_position_embeddings")),
        )
    )
    if kind == "yarn":
        return _yarn(r, base, original, f)
    factor = r.number("factor", low=1e-3)
    if kind == "linear":
        return Rope(base, "linear", factor)
    low, high = r.number("low_freq_factor"), r.number("high_freq_factor")
    if high <= low:
        raise UserError(f"{r.where}: high_freq_factor {high} must be above low_freq_factor {low}")
    return Rope(base, "llama3", factor, original, low, high)


def _yarn(r: Fields, base: float, original: int, f: Fields) -> Rope:
    """YaRN (Peng et al. 2023): the gain on cos and sin is 0.1 ln(factor) + 1 unless the config says (eq. 22)."""
    if not r.flag("truncate", True):
        raise UserError(f"{r.where}: yarn with truncate=false is not supported")
    factor = r.number("factor", f.whole("max_position_embeddings") / original, low=1e-3)

    def gain(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    top, bottom = r.number("mscale", 0.0), r.number("mscale_all_dim", 0.0)
    inferred = gain(top) / gain(bottom) if top and bottom else gain(1.0)
    fast, slow = r.number("beta_fast", 32.0) or 32.0, r.number("beta_slow", 1.0) or 1.0
    return Rope(
        base,
        "yarn",
        factor,
        original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=r.number("attention_factor", inferred, low=1e-6),
    )
