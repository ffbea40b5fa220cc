"""Image towers and LLaVAs as Hugging Face folders, which `load_vit` and `load_llava` read: for what our own recipes train.

Weights are stored as float16, norms as float32. config.json has, under `about`, what else is to be known of the training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tokeff.errors import UserError
from tokeff.models.checkpoint import new_folder
from tokeff.models.config import Config, Params
from tokeff.models.hf import _LLAMA
from tokeff.models.layout import is_norm
from tokeff.models.llava_rows import Llava
from tokeff.models.pixels import Preprocessing
from tokeff.models.tokenizer import write_tokenizer
from tokeff.models.vit_config import ViTConfig, ViTParams
from tokeff.models.vit_hf import _VIT_BLOCK, ACTS, ImageModel

_ENDS = {
    "place_SD": "embeddings.position_embeddings",
    "norm_D": "layernorm.weight",
    "norm_bias_D": "layernorm.bias",
    "patch_bias_D": "embeddings.patch_embeddings.projection.bias",
    "cls_D": "embeddings.cls_token",
}


def save_vit(path: str | Path, m: ImageModel, about: dict[str, Any]) -> Path:
    """A supervised ViT with its head. Raises UserError if the path exists or cannot be written, or for another kind of tower."""
    tensors = tower_tensors(m.cfg, m.params, "vit.")
    if m.params.head_VD is not None and m.params.head_bias_V is not None:
        tensors |= {"classifier.weight": _half(m.params.head_VD), "classifier.bias": _half(m.params.head_bias_V)}
    config = {"architectures": ["ViTForImageClassification"], **tower_config(m.cfg), "about": about}
    return _write(Path(path), config, tensors, _preprocessor(m.preprocessing, "ViTImageProcessor"), None)


def save_llava(path: str | Path, v: Llava, about: dict[str, Any]) -> Path:
    """A LLaVA-OneVision with a ViT for its tower and a Llama for its decoder. Raises UserError as `save_vit`."""
    cfg, p = v.cfg, v.params
    tensors = tower_tensors(cfg.tower, p.tower, "vision_tower.") | decoder_tensors(v.text.params, "language_model.model.")
    ends = {"linear_1.weight": p.into_DI, "linear_1.bias": p.into_bias_D, "linear_2.weight": p.out_DD, "linear_2.bias": p.out_bias_D}
    tensors |= {f"multi_modal_projector.{name}": _half(x) for name, x in ends.items() if x is not None}
    if p.newline_D is None or cfg.video is None or not cfg.canvases:
        raise UserError(f"{v.name} is no LLaVA-OneVision: it needs canvases, a video token and a newline")
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision",
        "image_token_index": cfg.image, "video_token_index": cfg.video, "projector_hidden_act": "gelu",
        "vision_feature_layer": [i - cfg.tower.L for i in cfg.layers], "vision_feature_select_strategy": "full" if cfg.cls else "default",
        "vision_aspect_ratio": f"anyres_max_{cfg.most}", "image_grid_pinpoints": [list(size) for size in cfg.canvases],
        "tie_word_embeddings": v.text.cfg.tied, "vision_config": tower_config(cfg.tower), "text_config": text_config(v.text.cfg),
        "about": about,
    }  # fmt: skip
    tensors["image_newline"] = _half(p.newline_D)
    return _write(Path(path), config, tensors, _preprocessor(v.preprocessing, "LlavaOnevisionImageProcessor"), v)


def tower_tensors(cfg: ViTConfig, params: ViTParams, prefix: str) -> dict[str, np.ndarray]:
    """The weights by the names of a ViT. UserError for CLIP's and SigLIP's towers."""
    if cfg.pre_norm or cfg.attention_pool or not cfg.cls:
        raise UserError(f"{cfg.name} is no supervised ViT; only those are saved")
    if params.side:
        raise UserError("this tower carries a method's learned parts, which a model folder does not hold; save it with side=None")
    patch = _half(params.patch_DI).reshape(cfg.D, cfg.channels, cfg.patch, cfg.patch)
    found: dict[str, Any] = {f"{prefix}embeddings.patch_embeddings.projection.weight": patch}
    for field, name in _ENDS.items():
        x = _stored(field, getattr(params, field))
        found[prefix + name] = x.reshape(1, 1, -1) if field == "cls_D" else x[None] if field == "place_SD" else x
    for i, block in enumerate(params.blocks):
        found |= {f"{prefix}encoder.layer.{i}.{name}": _folded(field, getattr(block, field)) for field, name in _VIT_BLOCK.items()}
    return found


def decoder_tensors(params: Params, prefix: str) -> dict[str, np.ndarray]:
    """The weights by the names of a Llama with a tied embedding."""
    found = {f"{prefix}embed_tokens.weight": _half(params.embed_VD), f"{prefix}norm.weight": np.asarray(params.norm_D, np.float32)}
    for i, block in enumerate(params.blocks):
        fields = {field: name for field, name in _LLAMA.items() if getattr(block, field) is not None}
        found |= {f"{prefix}layers.{i}.{name}": _folded(field, getattr(block, field)) for field, name in fields.items()}
    return found


def tower_config(cfg: ViTConfig) -> dict[str, Any]:
    act = next(theirs for theirs, ours in ACTS.items() if ours == cfg.act)
    return {
        "model_type": "vit", "hidden_size": cfg.D, "intermediate_size": cfg.F, "num_hidden_layers": cfg.L, "num_attention_heads": cfg.N,
        "image_size": cfg.image[0] if cfg.image[0] == cfg.image[1] else list(cfg.image), "patch_size": cfg.patch,
        "num_channels": cfg.channels, "hidden_act": act, "layer_norm_eps": cfg.eps, "qkv_bias": True,
    }  # fmt: skip


def text_config(cfg: Config) -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": cfg.V, "hidden_size": cfg.D, "intermediate_size": cfg.F, "num_hidden_layers": cfg.L,
        "num_attention_heads": cfg.N, "num_key_value_heads": cfg.K, "head_dim": cfg.H, "rms_norm_eps": cfg.eps, "hidden_act": cfg.act,
        "max_position_embeddings": cfg.max_len, "rope_theta": cfg.rope.base, "tie_word_embeddings": cfg.tied,
        "eos_token_id": list(cfg.eos), "bos_token_id": cfg.bos,
    }  # fmt: skip


def _preprocessor(p: Preprocessing | None, kind: str) -> dict[str, Any] | None:
    if p is None or p.exact is None:
        return None
    return {
        "image_processor_type": kind, "size": {"height": p.exact[0], "width": p.exact[1]}, "do_resize": True, "do_center_crop": False,
        "resample": p.resample, "do_rescale": True, "rescale_factor": p.scale, "do_normalize": True, "image_mean": list(p.mean),
        "image_std": list(p.std),
    }  # fmt: skip


def _half(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32).astype(np.float16)


def _stored(field: str, x: Any) -> np.ndarray:
    return np.asarray(x, np.float32) if is_norm(field) else _half(x)


def _folded(field: str, x: Any) -> np.ndarray:
    """A weight with the axes of its heads as one."""
    x, letters = _stored(field, x), field.rpartition("_")[2]
    at = next((letters.find(pair) for pair in ("NH", "KH") if pair in letters), -1)
    return x if at < 0 else x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])


def _write(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], preprocessor: Any, v: Llava | None) -> Path:
    from safetensors.numpy import save

    path = path.absolute()
    with new_folder(path) as tmp:
        (tmp / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (tmp / "model.safetensors").write_bytes(save({name: np.ascontiguousarray(x) for name, x in tensors.items()}))
        if preprocessor is not None:
            (tmp / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n", encoding="utf-8")
        if v is not None and v.text.tokenizer is not None:
            write_tokenizer(v.text.tokenizer, tmp)
    return path
