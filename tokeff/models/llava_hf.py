"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision out of a Hugging Face folder: tower, projector and decoder of one set of files.

Defaults of absent keys follow the configuration classes of transformers 5.2 (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokeff.errors import UserError
from tokeff.models.anyres import Size
from tokeff.models.config import Precision
from tokeff.models.fields import Fields, read_json
from tokeff.models.hf import SafeTensors, read_decoder, weight_files
from tokeff.models.hf_config import Described, describe
from tokeff.models.llava import Llava, LlavaConfig, LlavaParams
from tokeff.models.load import Model, active
from tokeff.models.pixels import read_preprocessing
from tokeff.models.tokenizer import read_tokenizer
from tokeff.models.vit_config import ViTConfig
from tokeff.models.vit_hf import BUFFERS, Reader, describe_vit, read_tower

_NEXT = {"image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]}
_SIDES = [384 * n for n in range(1, 7)]
_ONE = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
_BASE = {"image_token_index": 32000, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llava": _BASE,
    "llava_next": {**_BASE, **_NEXT},
    "llava_onevision": {
        **_ONE, "image_token_index": 151646, "video_token_index": 151647, "image_grid_pinpoints": [[y, x] for y in _SIDES for x in _SIDES],
    },
}  # fmt: skip
_LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000}
TEXTS = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "intermediate_size": 14336},
    "qwen2": {**_LLAMA, "intermediate_size": 22016, "vocab_size": 151936},
    "qwen3": {**_LLAMA, "intermediate_size": 22016, "vocab_size": 151936},
}
OURS = ("vision_tower.", "multi_modal_projector.", "image_newline")


def load_llava(folder: str | Path, precision: Precision | None = None) -> Llava:
    """A LLaVA from a local folder. Raises UserError, one line, for anything missing, damaged or unsupported."""
    folder, precision = Path(folder).expanduser(), precision or Precision.default()
    where, name, raw = str(folder / "config.json"), folder.resolve().name, read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    eos = Fields(read_json(generation), str(generation)).ids("eos_token_id") if generation.is_file() else ()
    cfg, text = describe_llava(raw, name, where, eos)
    source = SafeTensors(weight_files(folder))
    r = Reader(source, precision)
    params = _read(r, cfg, text)
    decoder = read_decoder(source, text, precision, besides=OURS)
    r.check_rest(lambda n: not any(part in n for part in OURS) or n.endswith(BUFFERS))
    model = Model(active(text.cfg, precision), decoder, read_tokenizer(folder, text.cfg.V), precision, name)
    return Llava(cfg, params, model, read_preprocessing(folder), name)


def describe_llava(raw: Mapping[str, Any], name: str, where: str, eos: tuple[int, ...] = ()) -> tuple[LlavaConfig, Described]:
    """Parse a config.json. Raises UserError naming the field for what is not supported or out of range."""
    kind = str(raw.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"{where}: model_type {kind[:60]!r} is no LLaVA; supported: {', '.join(FAMILIES)}")
    f = Fields({**FAMILIES[kind], **raw, **_renamed(raw)}, where)
    if f.word("projector_hidden_act", "gelu") != "gelu":
        raise f.fail("projector_hidden_act", "gelu")
    tower = {"model_type": "siglip_vision_model" if kind == "llava_onevision" else "clip_vision_model", **f.table("vision_config")}
    vit = describe_vit(tower, name, f"{where} vision_config")
    strategy = f.word("vision_feature_select_strategy")
    if strategy not in ("default", "full") or (strategy == "default" and not vit.cls):
        raise f.fail("vision_feature_select_strategy", "full, or default where the tower has a class row")
    text = _text(f, kind, name, eos)
    image, video = f.whole("image_token_index", low=0), f.whole("video_token_index", low=0) if kind == "llava_onevision" else None
    if max(image, video or 0) >= text.cfg.V:
        raise UserError(f"{where}: image token {image} or video token {video} is outside the vocabulary of {text.cfg.V}")
    most = _most(f) if kind == "llava_onevision" else None
    canvases = () if kind == "llava" else _canvases(f, vit)
    return LlavaConfig(vit, image, _layers(f, vit), vit.cls and strategy == "full", canvases, most, video), text


def _renamed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Newer files say image_token_id for image_token_index."""
    return {f"{x}_token_index": raw[f"{x}_token_id"] for x in ("image", "video") if raw.get(f"{x}_token_id") is not None}


def _text(f: Fields, kind: str, name: str, eos: tuple[int, ...]) -> Described:
    table = f.table("text_config")
    family = table.get("model_type") or ("qwen2" if kind == "llava_onevision" else "llama")
    if family not in TEXTS:
        raise UserError(f"{f.where} text_config: model_type {str(family)[:60]!r} is not supported; supported: {', '.join(TEXTS)}")
    tied = f.flag("tie_word_embeddings", False) or bool(table.get("tie_word_embeddings"))
    present = {key: value for key, value in table.items() if value is not None}
    return describe({**TEXTS[family], **present, "model_type": family, "tie_word_embeddings": tied}, name, f"{f.where} text_config", eos)


def _layers(f: Fields, vit: ViTConfig) -> tuple[int, ...]:
    """Blocks whose rows are the features. In the file 0 is what enters the first block, 1 what leaves it, -1 what leaves the last."""
    value = f.get("vision_feature_layer")
    given = value if isinstance(value, list) else [value]
    if not given or not all(type(i) is int and (1 <= i <= vit.L or -vit.L <= i < 0) for i in given):
        raise f.fail("vision_feature_layer", f"layers from 1 to {vit.L}, or from -1 down")
    return tuple(i - 1 if i > 0 else vit.L + i for i in given)


def _canvases(f: Fields, vit: ViTConfig) -> tuple[Size, ...]:
    value = f.get("image_grid_pinpoints")
    good = isinstance(value, list) and 0 < len(value) <= 1024 and all(isinstance(p, list) and len(p) == 2 for p in value)
    if not good or not all(type(n) is int and 0 < n <= 1 << 14 and n % side == 0 for p in value for n, side in zip(p, vit.image)):
        raise f.fail("image_grid_pinpoints", f"pairs of height and width, multiples of the tower's {vit.image}")
    return tuple((height, width) for height, width in value)


def _most(f: Fields) -> int:
    """k of 'anyres_max_k'."""
    word = f.word("vision_aspect_ratio").removeprefix("anyres_max_")
    if not word.isdecimal() or not 0 < int(word) < 1000:
        raise f.fail("vision_aspect_ratio", "anyres_max_ and a number")
    return int(word)


class _Sizes:
    """Numbers for the letters of what stands between tower and decoder."""

    def __init__(self, cfg: LlavaConfig, text: Described):
        self.D, self.I = text.cfg.D, cfg.tower.D * len(cfg.layers)


def _read(r: Reader, cfg: LlavaConfig, text: Described) -> LlavaParams:
    sizes, tail = _Sizes(cfg, text), "multi_modal_projector.linear_1.weight"
    found = [n for n in r.source.shapes if n.endswith(tail)]
    if len(found) != 1:
        raise UserError(f"{r.source.where} has {len(found)} tensors named ...{tail}, expected one; it is not a supported LLaVA")
    prefix = found[0].removesuffix(tail)

    def bias(name: str):
        full = f"{prefix}multi_modal_projector.{name}.bias"
        return r.take("bias_D", full, sizes) if full in r.source.shapes else None

    return LlavaParams(
        read_tower(r, cfg.tower),
        r.take("into_DI", found[0], sizes),
        r.take("out_DD", f"{prefix}multi_modal_projector.linear_2.weight", sizes),
        bias("linear_1"),
        bias("linear_2"),
        r.take("newline_D", f"{prefix}image_newline", sizes) if cfg.canvases else None,
    )
