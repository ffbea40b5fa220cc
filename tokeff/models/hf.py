"""A Hugging Face model folder: config.json, safetensors (one file or sharded), tokenizer. Never a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tokeff.errors import UserError
from tokeff.models.config import Config, Params, Precision
from tokeff.models.fields import Fields, read_json
from tokeff.models.hf_config import Described, describe
from tokeff.models.layout import Names, assemble, check, is_norm

DTYPES = ("F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"
_PICTURES = ("vision_tower.", "multi_modal_projector.")
_ATTENTION = {
    "attn_norm_D": "input_layernorm.weight",
    "q_NHD": "self_attn.q_proj.weight",
    "k_KHD": "self_attn.k_proj.weight",
    "v_KHD": "self_attn.v_proj.weight",
    "o_DNH": "self_attn.o_proj.weight",
    "q_bias_NH": "self_attn.q_proj.bias",
    "k_bias_KH": "self_attn.k_proj.bias",
    "v_bias_KH": "self_attn.v_proj.bias",
    "q_norm_H": "self_attn.q_norm.weight",
    "k_norm_H": "self_attn.k_norm.weight",
    "gate_FD": "mlp.gate_proj.weight",
    "up_FD": "mlp.up_proj.weight",
    "down_DF": "mlp.down_proj.weight",
}
_LLAMA = {**_ATTENTION, "ffn_norm_D": "post_attention_layernorm.weight"}
_GEMMA = {
    **_ATTENTION,
    "post_attn_norm_D": "post_attention_layernorm.weight",
    "ffn_norm_D": "pre_feedforward_layernorm.weight",
    "post_ffn_norm_D": "post_feedforward_layernorm.weight",
}


class SafeTensors:
    """Tensors of one or several safetensors files. Headers are checked by the safetensors package, data read on demand."""

    def __init__(self, files: list[Path]):
        from safetensors import SafetensorError, safe_open

        self.where = str(files[0] if len(files) == 1 else files[0].parent)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._from: dict[str, Any] = {}
        for file in files:
            try:
                handle: Any = safe_open(file, framework="numpy")
                for name in handle.offset_keys():  # in file order, so that data is read front to back
                    self._add(name, handle, file)
            except (SafetensorError, OSError, ValueError) as e:
                raise UserError(f"{file} is truncated or not a safetensors file ({e}); download it again") from None

    def _add(self, name: str, handle: Any, file: Path) -> None:
        view = handle.get_slice(name)
        if name in self.shapes:
            raise UserError(f"{file}: tensor {name} is also in another shard; download the folder again")
        if view.get_dtype() not in DTYPES:
            raise UserError(f"{file}: tensor {name} has type {view.get_dtype()}; supported: {', '.join(DTYPES)}")
        self.shapes[name], self._from[name] = tuple(view.get_shape()), handle

    def read(self, name: str) -> np.ndarray:
        import ml_dtypes  # noqa: F401  (lets numpy hold bfloat16)

        return self._from[name].get_tensor(name)


def load_hf(folder: Path, name: str, precision: Precision) -> tuple[Config, Params]:
    """Config and weights of a Hugging Face folder. Raises UserError, one line, for anything missing, damaged or unsupported."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; give a Hugging Face model folder, a .gguf file or a saved tokeff folder")
    generation = folder / "generation_config.json"
    eos = Fields(read_json(generation), str(generation)).ids("eos_token_id") if generation.is_file() else ()
    raw = read_json(folder / "config.json")
    model = describe(raw, name, str(folder / "config.json"), eos)
    source, multimodal = SafeTensors(weight_files(folder)), raw.get("model_type") == "gemma3"
    return model.cfg, read_decoder(source, model, precision, besides=_PICTURES if multimodal else ())


def read_decoder(source: SafeTensors, model: Described, precision: Precision, besides: tuple[str, ...] = ()) -> Params:
    """The weights of a decoder, under whatever prefix the file has them. Tensors whose names hold one of `besides` belong to something
    else. Raises UserError for what is missing, has another shape or has no place in the model."""
    names = _names(source.shapes, model.family.gemma, source.where)
    wanted = names.of(model.cfg, model.optional)

    def ignore(name: str) -> bool:
        return name == names.head or name.endswith("rotary_emb.inv_freq") or any(part in name for part in besides)

    check(source, wanted, model.cfg, ignore)
    fix = _plus_one if model.family.gemma else _as_is
    return assemble(source, wanted, model.cfg, precision, fix)


def _as_is(field: str, array: np.ndarray) -> np.ndarray:
    return array


def _plus_one(field: str, array: np.ndarray) -> np.ndarray:
    """Gemma stores w and multiplies by 1 + w."""
    return array.astype(np.float32) + 1 if is_norm(field) else array


def weight_files(folder: Path) -> list[Path]:
    """The weight files to read: those the index names, else model.safetensors, else the only one there is."""
    if (folder / INDEX).is_file():
        table = Fields(read_json(folder / INDEX), str(folder / INDEX)).table("weight_map")
        names = sorted({str(v) for v in table.values()})
        bad = [n for n in names if Path(n).name != n or not n.endswith(".safetensors") or not (folder / n).is_file()]
        if bad or not names:
            raise UserError(f"{folder / INDEX} names {(bad or ['no file'])[0][:80]!r}, which is not a shard in this folder")
        return [folder / n for n in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise UserError(f"{folder} has {len(found)} safetensors files and no {INDEX}; download the index too")
    pickles = [p.name for ext in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{ext}")]
    if pickles:
        raise UserError(f"{folder / pickles[0]} is a pickle, which can run code and is never opened; convert it to safetensors")
    raise UserError(f"{folder} has no safetensors file")


def _names(shapes: Mapping[str, tuple[int, ...]], gemma: bool, where: str) -> Names:
    """Tensor names under whatever prefix the file uses (model., language_model.model., or none)."""
    tail = "embed_tokens.weight"
    found = [n for n in shapes if n.endswith(tail) and "vision" not in n]
    if len(found) != 1:
        raise UserError(f"{where} has {len(found)} tensors named ...{tail}, expected one; it is not a supported decoder")
    prefix = found[0].removesuffix(tail)
    heads = [n for n in shapes if n.endswith("lm_head.weight")]
    block = {f: f"{prefix}layers.{{i}}.{n}" for f, n in (_GEMMA if gemma else _LLAMA).items()}
    return Names(found[0], f"{prefix}norm.weight", heads[0] if heads else "lm_head.weight", block)
