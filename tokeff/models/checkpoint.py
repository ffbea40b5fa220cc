"""Save and load a model as an orbax checkpoint: config.json (ours), the tokenizer, and arrays/.

The arrays are one nested dict, {"embed_VD", "norm_D", "head_VD", "blocks": {"0": {...}}}, without the fields a
model lacks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from tokeff.errors import UserError
from tokeff.models.config import Block, Config, Params, Precision, Rope
from tokeff.models.fields import Fields, read_json
from tokeff.models.hf_config import MAX_LAYERS
from tokeff.models.layout import OPTIONAL, abstract, optional_fields
from tokeff.models.tokenizer import Tokenizer, read_tokenizer, write_tokenizer

FORMAT = "tokeff-1"


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes that name when what is written there is complete. UserError if the path exists or
    cannot be written."""
    if path.exists():
        raise UserError(f"{path} exists; choose another folder or delete it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(prefix=".save-", dir=path.parent))
        try:
            yield tmp
            tmp.chmod(0o755)
            os.rename(tmp, path)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None


def save(path: str | Path, cfg: Config, params: Params, tokenizer: Tokenizer | None = None) -> Path:
    """Write a model folder. It appears under its name only when it is complete. One process only.

    Raises UserError if the path exists or cannot be written.
    """
    path = Path(path).absolute()
    if any(block.side for block in params.blocks):
        raise UserError("these weights carry a method's learned parts, which a model folder does not hold; save them with side=None")
    head = {"format": FORMAT, "optional": optional_fields(params), "config": dataclasses.asdict(cfg)}
    with new_folder(path) as tmp:
        (tmp / "config.json").write_text(json.dumps(head, indent=1), encoding="utf-8")
        if tokenizer is not None:
            write_tokenizer(tokenizer, tmp)
        with _checkpointer() as checkpointer:
            checkpointer.save(tmp / "arrays", _tree(params))
    return path


def is_saved(folder: Path) -> bool:
    """Whether a folder is one that `save` wrote."""
    return (folder / "arrays").is_dir() and (folder / "config.json").is_file()


def load_saved(
    folder: str | Path, precision: Precision, shard: Callable[[Params], Any] | None = None
) -> tuple[Config, Params, Tokenizer | None]:
    """Read a model folder, each array cast to `precision` on the way in.

    `shard` maps the abstract `Params` (of jax.ShapeDtypeStruct) to the same structure of `jax.sharding.Sharding`; without
    it everything goes to the first local device. Raises UserError for a folder that is incomplete or not ours.
    """
    folder = Path(folder).absolute()
    head = read_json(folder / "config.json")
    where = Fields(head, str(folder / "config.json"))
    if where.word("format", "") != FORMAT:
        raise UserError(f"{where.where} is not of a folder saved by tokeff (format {FORMAT}); save the model again")
    cfg = config_from_json(where.table("config"), where.where)
    optional = where.get("optional")
    if not isinstance(optional, list) or not set(map(str, optional)) <= set(OPTIONAL):
        raise where.fail("optional", f"a list out of {', '.join(OPTIONAL)}")
    shapes = abstract(cfg, precision, optional)
    return cfg, _restore(folder, shapes, shard), read_tokenizer(folder, cfg.V)


def _restore(folder: Path, shapes: Params, shard: Callable[[Params], Any] | None) -> Params:
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = shard(shapes) if shard else jax.tree.map(lambda _: first, shapes)
    target = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)
    wanted, where = _tree(target), folder / "arrays"
    try:
        with _checkpointer() as checkpointer:
            _check(checkpointer.metadata(where).item_metadata.tree, wanted, where)
            tree = checkpointer.restore(where, wanted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{where} is damaged ({' '.join(str(e).split())[:160]}); save the model again") from None
    blocks = tuple(Block(**tree["blocks"][str(i)]) for i in range(len(shapes.blocks)))
    return Params(tree["embed_VD"], blocks, tree["norm_D"], tree.get("head_VD"))


def _check(stored: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """The checkpoint's own list of arrays is the one its config.json describes. Nothing has been read yet."""

    def shapes(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}

    found, expected = shapes(stored), shapes(wanted)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            pair = f"shape {found.get(name, 'none')}, config.json says {expected.get(name, 'none')}"
            raise UserError(f"{where}: array {name} has {pair}; save the model again")


def config_from_json(table: dict[str, Any], where: str) -> Config:
    """`Config` from `dataclasses.asdict(cfg)` after a trip through JSON. Raises UserError naming an ill-formed one."""
    f = Fields(table, where)
    known = {x.name: x.type for x in dataclasses.fields(Config)}
    if table.keys() != known.keys():
        odd = sorted(table.keys() ^ known.keys())
        raise UserError(f"{where}: the config lacks or adds fields ({', '.join(odd)[:120]}); save the model again")
    kinds = {"int": f.whole, "float": f.number, "str": f.word, "bool": lambda key: f.flag(key, False)}
    values: dict[str, Any] = {name: kinds[str(kind)](name) for name, kind in known.items() if str(kind) in kinds}
    windows = f.get("windows")
    good = isinstance(windows, list) and all(w is None or (type(w) is int and w > 0) for w in windows)
    if not good or f.whole("L", high=MAX_LAYERS) != len(windows):
        raise f.fail("windows", f"one window or null for each of {values['L']} layers")
    local = _rope(f.table("local_rope"), where) if table["local_rope"] is not None else None
    values |= {"rope": _rope(f.table("rope"), where), "local_rope": local, "windows": tuple(windows)}
    values |= {"eos": f.ids("eos"), "bos": next(iter(f.ids("bos")), None)}
    try:
        return Config(**values)
    except ValueError as e:
        raise UserError(f"{where}: {e}") from None


def _rope(table: dict[str, Any], where: str) -> Rope:
    f = Fields(table, f"{where} rope")
    kinds = {"int": lambda key: f.whole(key, low=0), "float": f.number, "str": f.word}
    return Rope(**{x.name: kinds[str(x.type)](x.name) for x in dataclasses.fields(Rope)})


def _tree(params: Params) -> dict[str, Any]:
    """Params as nested dicts without empty fields."""

    def present(node: Any) -> dict[str, Any]:
        pairs = ((f.name, getattr(node, f.name)) for f in dataclasses.fields(node) if f.name != "blocks")
        return {name: value for name, value in pairs if value is not None}

    return {**present(params), "blocks": {str(i): present(b) for i, b in enumerate(params.blocks)}}


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    """An orbax checkpointer that finishes its writes before it is left, without orbax's log lines."""
    import orbax.checkpoint as ocp

    level = logging.getLogger("absl").level
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            yield checkpointer
    finally:
        logging.getLogger("absl").setLevel(level)
