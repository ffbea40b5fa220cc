"""A model folder that holds a few layers alone: they are of the shape of another model's, their target's, and stand under its embedding and
head. So a draft model is a few megabytes.

config.json has `format`, `name`, `layers` (which of the target's they began as), `sizes`, the `target` (name, fingerprint, precision), the
`sha256` of layers.safetensors, and under `about` what else is to be known. Head axes are folded to one, as in other checkpoints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.models.checkpoint import new_folder
from tokeff.models.config import Block, Config, Params, Precision
from tokeff.models.fields import Fields, read_json
from tokeff.models.hf import SafeTensors
from tokeff.models.layout import REQUIRED, Key, Names, check, dtype_of, optional_fields, shape_of, stored_shape
from tokeff.models.presets import PRESETS

if TYPE_CHECKING:
    from tokeff.models.load import Model

FORMAT, WEIGHTS = "tokeff-layers-1", "layers.safetensors"
STORED = Precision("bfloat16")
SIZES = "VDFNKH"


def of_layers(cfg: Config, layers: Sequence[int], name: str) -> Config:
    """The config of a model with these layers of another, in this order. UserError for layers it does not have."""
    if not layers or not all(0 <= i < cfg.L for i in layers):
        raise UserError(f"{cfg.name} has layers 0 to {cfg.L - 1}, not {list(layers)}; name some of those")
    return replace(cfg, name=name, L=len(layers), windows=tuple(cfg.windows[i] for i in layers))


def save_layers(path: str | Path, m: Model, layers: Sequence[int], target: Model, about: dict[str, Any]) -> Path:
    """Write the blocks of `m`, which began as these `layers` of `target`, and its last norm: bfloat16, norms float32.

    Raises UserError if the path exists or cannot be written, or where `m` is not of the target's shape.
    """
    from safetensors.numpy import save

    path = Path(path).absolute()
    if m.cfg != of_layers(target.cfg, layers, m.cfg.name):
        raise UserError(f"{m.name} is not made of layers of {target.name}; save it whole, with tokeff.models.checkpoint.save")
    data = save({name: _stored(m.params, key, m.cfg) for key, name in _wanted(m.cfg, m.params).items()})
    head = {
        "format": FORMAT, "name": m.cfg.name, "layers": list(layers), "sizes": _sizes(m.cfg), "target": _target(target),
        "sha256": hashlib.sha256(data).hexdigest(), "about": about,
    }  # fmt: skip
    with new_folder(path) as tmp:
        (tmp / "config.json").write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
        (tmp / WEIGHTS).write_bytes(data)
    return path


def is_layers(folder: Path) -> bool:
    """Whether a folder is one that `save_layers` wrote."""
    return (folder / WEIGHTS).is_file() and (folder / "config.json").is_file()


def target_of(folder: Path) -> str:
    """The preset whose embedding and head these layers are for. UserError where the target is no preset."""
    name = _head(folder)[1].word("name")
    if name not in PRESETS:
        raise UserError(f"{folder} holds layers for {name}, which is no preset; load it as m, then load_layers(folder, m)")
    return name


def load_layers(folder: Path, target: Model) -> Model:
    """The layers as a model, at the target's precision, under the very arrays of its embedding and head.

    Raises UserError for a folder that is damaged or not ours, and for a target that is another model.
    """
    head, made = _head(folder)
    cfg = of_layers(target.cfg, head.ids("layers"), head.word("name"))
    if (own := head.table("sizes")) != _sizes(cfg):
        odd = ", ".join(f"{letter} {own.get(letter)} and not {size}" for letter, size in _sizes(cfg).items() if own.get(letter) != size)
        raise UserError(f"{folder} does not fit {target.name} ({odd}); it is a draft for {made.word('name')}")
    if made.values != _target(target) and made.word("precision") == repr(target.precision):
        raise UserError(f"{folder} was trained for other weights than those of {target.name}; it is a draft for {made.word('name')}")
    file = folder / WEIGHTS
    if hashlib.sha256(file.read_bytes()).hexdigest() != head.word("sha256"):
        raise UserError(f"{file} has the wrong sha256; get the folder again")
    source, wanted = SafeTensors([file]), _wanted(cfg, target.params)
    check(source, wanted, cfg, lambda name: False)

    def leaf(key: Key) -> Any:
        return jnp.array(source.read(wanted[key]).reshape(shape_of(key[1], cfg)), dtype_of(key[1], target.precision))

    fields = [field for layer, field in wanted if layer == 0]
    blocks = tuple(Block(**{field: leaf((i, field)) for field in fields}) for i in range(cfg.L))
    params = Params(target.params.embed_VD, blocks, leaf((None, "norm_D")), target.params.head_VD)
    return replace(target, cfg=cfg, params=params, name=cfg.name)


def _head(folder: Path) -> tuple[Fields, Fields]:
    """config.json, and the table of its target."""
    where = folder / "config.json"
    head = Fields(read_json(where), str(where))
    if head.word("format", "") != FORMAT:
        raise UserError(f"{where} is not of a folder of layers saved by tokeff (format {FORMAT}); save them again")
    return head, Fields(head.table("target"), f"{where} target")


def _sizes(cfg: Config) -> dict[str, int]:
    return {letter: getattr(cfg, letter) for letter in SIZES}


def _target(m: Model) -> dict[str, str]:
    from tokeff.models.load import fingerprint

    return {"name": m.name, "fingerprint": fingerprint(m), "precision": repr(m.precision)}


def _wanted(cfg: Config, params: Params) -> dict[Key, str]:
    """The tensor name of every weight that is stored."""
    names = Names("", "norm_D", "", {field: f"{{i}}.{field}" for field in (*REQUIRED, *optional_fields(params))})
    return {key: name for key, name in names.of(cfg, optional_fields(params)).items() if key[1] not in ("embed_VD", "head_VD")}


def _stored(params: Params, key: Key, cfg: Config) -> np.ndarray:
    layer, field = key
    array = getattr(params if layer is None else params.blocks[layer], field)
    return np.asarray(array.astype(dtype_of(field, STORED))).reshape(stored_shape(field, cfg))
