"""An image tower out of a Hugging Face folder: ViT, CLIP and SigLIP, alone or inside a model of text and images.

Defaults of absent keys follow the configuration classes of transformers 5.2 (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.models.config import Precision
from tokeff.models.fields import Fields, read_json
from tokeff.models.hf import SafeTensors, weight_files
from tokeff.models.hf_config import MAX_LAYERS
from tokeff.models.layout import dtype_of
from tokeff.models.pixels import Preprocessing, read_preprocessing
from tokeff.models.vit_config import AttentionPool, ViTBlock, ViTConfig, ViTParams

ACTS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_SIZES = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
FAMILIES = {
    "vit": {**_SIZES, "patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    "clip_vision_model": {**_SIZES, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": {**_SIZES, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
WITH_TEXT = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
OTHERS = ("text_model.", "text_projection.", "logit_", "pooler.", "vit.pooler.")  # the text tower, and pooling that is not used
BUFFERS = ("position_ids", "mask_token")

_MLP = {"up_FD": "fc1.weight", "up_bias_F": "fc1.bias", "down_DF": "fc2.weight", "down_bias_D": "fc2.bias"}
_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
_CLIP_BLOCK = {
    "attn_norm_D": "layer_norm1.weight",
    "attn_norm_bias_D": "layer_norm1.bias",
    **{f"{x}_NHD": f"self_attn.{name}.weight" for x, name in _ATTENTION.items()},
    **{f"{x}_bias_NH": f"self_attn.{name}.bias" for x, name in _ATTENTION.items()},
    "o_DNH": "self_attn.out_proj.weight",
    "o_bias_D": "self_attn.out_proj.bias",
    "ffn_norm_D": "layer_norm2.weight",
    "ffn_norm_bias_D": "layer_norm2.bias",
    **{x: f"mlp.{name}" for x, name in _MLP.items()},
}
_VIT_BLOCK = {
    "attn_norm_D": "layernorm_before.weight",
    "attn_norm_bias_D": "layernorm_before.bias",
    **{f"{x[0]}_NHD": f"attention.attention.{x}.weight" for x in ("query", "key", "value")},
    **{f"{x[0]}_bias_NH": f"attention.attention.{x}.bias" for x in ("query", "key", "value")},
    "o_DNH": "attention.output.dense.weight",
    "o_bias_D": "attention.output.dense.bias",
    "ffn_norm_D": "layernorm_after.weight",
    "ffn_norm_bias_D": "layernorm_after.bias",
    "up_FD": "intermediate.dense.weight",
    "up_bias_F": "intermediate.dense.bias",
    "down_DF": "output.dense.weight",
    "down_bias_D": "output.dense.bias",
}
_HEAD = {
    "probe_D": "probe",
    "o_DNH": "attention.out_proj.weight",
    "o_bias_D": "attention.out_proj.bias",
    "ffn_norm_D": "layernorm.weight",
    "ffn_norm_bias_D": "layernorm.bias",
    **{x: f"mlp.{name}" for x, name in _MLP.items()},
}


@dataclass(frozen=True, eq=False)
class ImageModel:
    """An image tower ready to run. preprocessing: None for a folder without preprocessor_config.json."""

    cfg: ViTConfig
    params: ViTParams
    preprocessing: Preprocessing | None
    name: str


@dataclass
class Reader:
    """Tensors of a file by name, each checked against the shape that its config says, and remembered as read."""

    source: SafeTensors
    precision: Precision
    read: set[str] = field(default_factory=set)

    def raw(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor whose shape is this one, or this one behind axes of length 1. UserError names one that is missing or has another."""
        found = self.source.shapes.get(name)
        if found is None:
            raise UserError(f"{self.source.where}: tensor {name} is missing; the file is incomplete or its config wrong")
        if found[-len(shape) :] != shape or math.prod(found) != math.prod(shape):
            raise UserError(f"{self.source.where}: tensor {name} has shape {found}, the config says {shape}")
        self.read.add(name)
        return self.source.read(name).reshape(shape)

    def take(self, letters: str, name: str, sizes: Any, stored: tuple[int, ...] | None = None) -> jax.Array:
        """The array of a field with these letters; `sizes` has a number for each. In the file the two axes of heads are one."""
        shape = tuple(getattr(sizes, letter) for letter in letters.rpartition("_")[2])
        folded = tuple(math.prod(part) for part in _fold(letters.rpartition("_")[2], shape))
        return jnp.array(self.raw(name, stored or folded).reshape(shape), dtype_of(letters, self.precision))

    def check_rest(self, ignore) -> None:
        """UserError for a tensor that was not read and has no known reason to be there."""
        extra = sorted(n for n in self.source.shapes.keys() - self.read if not ignore(n))
        if extra:
            raise UserError(f"{self.source.where}: {len(extra)} tensors have no place in this model, {extra[0][:80]} first")


def _fold(letters: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    at = letters.find("NH")
    parts = [(n,) for n in shape]
    return parts if at < 0 else [*parts[:at], shape[at : at + 2], *parts[at + 2 :]]


def describe_vit(raw: Mapping[str, Any], name: str, where: str) -> ViTConfig:
    """Parse the config of a tower. Raises UserError naming the field for what is not supported or out of range."""
    kind = raw.get("model_type")
    if kind in WITH_TEXT:
        return describe_vit({"model_type": WITH_TEXT[kind], **Fields(raw, where).table("vision_config")}, name, where)
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type {str(kind)[:60]!r} is no image tower; supported: {', '.join([*FAMILIES, *WITH_TEXT])}")
    f = Fields({**FAMILIES[kind], **raw}, where)
    image, patch, act = _sides(f, "image_size"), _sides(f, "patch_size"), f.word("hidden_act")
    D, N = f.whole("hidden_size"), f.whole("num_attention_heads")
    if act not in ACTS:
        raise UserError(f"{where}: hidden_act {act[:60]!r} is not supported; supported: {', '.join(ACTS)}")
    if patch[0] != patch[1] or image[0] % patch[0] or image[1] % patch[0] or D % N:
        raise UserError(f"{where}: patches of {patch} do not divide images of {image}, or {N} heads a width of {D}")
    return ViTConfig(
        name=name,
        D=D,
        F=f.whole("intermediate_size"),
        L=f.whole("num_hidden_layers", high=MAX_LAYERS),
        N=N,
        image=image,
        patch=patch[0],
        channels=f.whole("num_channels", 3, high=64),
        cls=kind != "siglip_vision_model",
        pre_norm=kind == "clip_vision_model",
        norm_rows=kind != "clip_vision_model",
        attention_pool=kind == "siglip_vision_model" and f.flag("vision_use_head", True),
        act=ACTS[act],
        eps=f.number("layer_norm_eps"),
    )


def _sides(f: Fields, key: str) -> tuple[int, int]:
    """A side in pixels, or a pair of (height, width)."""
    value = f.get(key)
    pair: list[Any] = value if isinstance(value, list) and len(value) == 2 else [value, value]
    if not all(type(n) is int and 1 <= n <= 1 << 16 for n in pair):
        raise f.fail(key, "a number of pixels, or height and width")
    return int(pair[0]), int(pair[1])


def read_tower(r: Reader, cfg: ViTConfig) -> ViTParams:
    """The weights of a tower, under whatever prefix the file has them. Raises UserError for what is missing or has another shape."""
    vit = not cfg.pre_norm and cfg.cls
    patch = "embeddings.patch_embeddings.projection" if vit else "embeddings.patch_embedding"
    found = [n for n in r.source.shapes if n.endswith(f"{patch}.weight")]
    if len(found) != 1:
        raise UserError(f"{r.source.where} has {len(found)} tensors named ...{patch}.weight, expected one; it holds no such image tower")
    p = found[0].removesuffix(f"{patch}.weight")
    place, norm = ("embeddings.position_embeddings", "layernorm") if vit else ("embeddings.position_embedding.weight", "post_layernorm")
    cls = p + ("embeddings.cls_token" if vit else "embeddings.class_embedding")
    names, where = (_VIT_BLOCK, "encoder.layer") if vit else (_CLIP_BLOCK, "encoder.layers")

    def block(i: int) -> ViTBlock:
        at = f"{p}{where}.{i}."
        return ViTBlock(**{f: r.take(f, at + n, cfg) for f, n in names.items() if not _absent(f, at + n, r)})

    def maybe(there: bool, letters: str, name: str):
        return r.take(letters, name, cfg) if there else None

    return ViTParams(
        r.take("patch_DI", found[0], cfg, stored=(cfg.D, cfg.channels, cfg.patch, cfg.patch)),
        r.take("place_SD", p + place, cfg),
        tuple(map(block, range(cfg.L))),
        r.take("norm_D", f"{p}{norm}.weight", cfg),
        r.take("norm_bias_D", f"{p}{norm}.bias", cfg),
        maybe(not cfg.pre_norm, "patch_bias_D", f"{p}{patch}.bias"),
        maybe(cfg.cls, "cls_D", cls),
        maybe(cfg.pre_norm, "pre_norm_D", f"{p}pre_layrnorm.weight"),
        maybe(cfg.pre_norm, "pre_norm_bias_D", f"{p}pre_layrnorm.bias"),
        _pool(r, cfg, f"{p}head.") if cfg.attention_pool else None,
    )


def _absent(field: str, name: str, r: Reader) -> bool:
    """Biases of queries, keys and values need not be there (`qkv_bias`)."""
    return field.endswith("_bias_NH") and name not in r.source.shapes


def _pool(r: Reader, cfg: ViTConfig, prefix: str) -> AttentionPool:
    """SigLIP's pooling head, whose three projections are one tensor."""
    w = r.raw(f"{prefix}attention.in_proj_weight", (3 * cfg.D, cfg.D)).reshape(3, cfg.N, cfg.H, cfg.D)
    b = r.raw(f"{prefix}attention.in_proj_bias", (3 * cfg.D,)).reshape(3, cfg.N, cfg.H)
    dtype = dtype_of("q_NHD", r.precision)
    weights = {f"{x}_NHD": jnp.array(w[i], dtype) for i, x in enumerate("qkv")}
    biases = {f"{x}_bias_NH": jnp.array(b[i], dtype) for i, x in enumerate("qkv")}
    return AttentionPool(**weights, **biases, **{f: r.take(f, prefix + n, cfg) for f, n in _HEAD.items()})


def load_vit(folder: str | Path, precision: Precision | None = None) -> ImageModel:
    """ViT, CLIP's or SigLIP's image tower from a Hugging Face folder (the text tower of CLIP and SigLIP is left out).

    Raises UserError, one line, for anything missing, damaged or unsupported.
    """
    folder = Path(folder).expanduser()
    where, name = str(folder / "config.json"), folder.resolve().name
    cfg = describe_vit(read_json(folder / "config.json"), name, where)
    r = Reader(SafeTensors(weight_files(folder)), precision or Precision.default())
    params = read_tower(r, cfg)
    for head in ("classifier", "visual_projection"):
        if f"{head}.weight" in r.source.shapes:
            cfg = replace(cfg, V=r.source.shapes[f"{head}.weight"][0])
            bias = r.take("head_bias_V", f"{head}.bias", cfg) if head == "classifier" else None
            params = params.replace(head_VD=r.take("head_VD", f"{head}.weight", cfg), head_bias_V=bias)
    r.check_rest(lambda n: n.startswith(OTHERS) or n.endswith(BUFFERS))
    return ImageModel(cfg, params, read_preprocessing(folder), name)
