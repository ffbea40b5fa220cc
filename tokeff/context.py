"""A context read once and kept: compress it, ask it several questions, save it, load it in another process."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tokeff.decode.draft import Drafter, Plain
from tokeff.errors import UserError
from tokeff.generation import Setup, bucket, encode, read
from tokeff.kv import compact as coding
from tokeff.kv.compact import Compact
from tokeff.kv.extend import pack
from tokeff.kv.policy import Full, Policy, Prefilled, tree_bytes
from tokeff.kv.some_heads import SomeHeads
from tokeff.listing import methods
from tokeff.models.config import Config
from tokeff.models.flow import Here
from tokeff.models.load import Model, fingerprint
from tokeff.models.transformer import Pass
from tokeff.sharding import beside, field_of
from tokeff.sparse.pattern import Pattern
from tokeff.sparse.patterns import PerHead

FORMAT = 2  # of saved contexts; those of another one are refused


def choices() -> dict[str, type]:
    """The classes a saved context may name: those of the listed methods, under both of their settings and with rows on the host, and of
    their parts. Nothing else is ever built from one."""
    found: dict[str, type] = {}

    def walk(value: Any) -> None:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found[type(value).__name__] = type(value)
            for f in dataclasses.fields(value):
                walk(getattr(value, f.name))

    published = (method.build(**method.settings("paper")) for method in methods() if method.published is not None and method.bare)
    hosted = (method.make(host=True) for method in methods() if "host" in inspect.signature(method.make).parameters)
    parts = (Setup(), Compact(), PerHead(1, 0), SomeHeads(Full()))
    for part in (*parts, *(method.make() for method in methods() if method.bare), *published, *hosted):
        walk(part)
    return found


@dataclass(frozen=True, eq=False)
class Compressed:
    """One context under one policy. `room` tokens (a question and its answer) fit behind it.

    `tokens` are the context's own ids, `next` the order of the row that comes next, `logits_1V` what follows the last token. `lossy`:
    how coarsely keys and values were once written to a file; None where they are as they were computed.
    """

    setup: Setup
    layers: tuple[Any, ...]
    tokens: tuple[int, ...]
    next: int
    logits_1V: jax.Array
    room: int
    rows: tuple[tuple[int, int], ...]
    model: str
    lossy: Compact | None = None

    @property
    def bytes(self) -> int:
        """Bytes of every array of the cache."""
        return tree_bytes(self.layers)

    def save(self, folder: str | Path, compact: Compact | str | None = None) -> None:
        """Write the arrays (safetensors) and the printed policy (JSON). The folder appears whole or not at all.

        compact: 'exact' writes smaller files of the same numbers, `tokeff.kv.compact.Compact(...)` much smaller ones in which keys and
        values lie within half a bin of theirs. Both take seconds to write and read.
        """
        folder = Path(folder)
        coding.check(compact)
        if not self.setup.kv.lasts:
            raise UserError(f"caches of {type(self.setup.kv).__name__} cannot be saved; keep the context in memory, or change kv")
        if folder.exists():
            raise UserError(f"{folder} exists; save to a new folder")
        about = {
            "format": FORMAT, "setup": to_json(self.setup), "tokens": list(self.tokens), "next": self.next, "room": self.room,
            "rows": list(self.rows), "model": self.model, "compact": to_json(compact),
            "lossy": to_json(compact if isinstance(compact, Compact) else self.lossy),
        }  # fmt: skip
        leaves = [(name, third, np.asarray(x)) for name, third, x in named_leaves((self.layers, self.logits_1V))]
        arrays = coding.write(leaves, compact) if compact else {str(i): x for i, (*_, x) in enumerate(leaves)}
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as part:
                save_file(arrays, Path(part) / "cache.safetensors")
                seal = {"about": digest(about), "arrays": file_digest(Path(part) / "cache.safetensors")}
                (Path(part) / "context.json").write_text(json.dumps(about | {"seal": seal}))
                (Path(part) / "done").mkdir()
                os.rename(Path(part) / "cache.safetensors", Path(part) / "done" / "cache.safetensors")
                os.rename(Path(part) / "context.json", Path(part) / "done" / "context.json")
                os.rename(Path(part) / "done", folder)
        except OSError as e:
            raise UserError(f"cannot write {folder}: {e.strerror or e}; choose another folder") from e

    @staticmethod
    def load(m: Model, folder: str | Path) -> Compressed:
        """A saved context, for the model it was made with. Refused where its policy, or a byte of its arrays, is not what was saved."""
        try:
            about = json.loads((Path(folder) / "context.json").read_text())
            if about.get("format") != FORMAT:
                raise UserError(f"{folder} is no context of format {FORMAT}, which this version writes; compress the text again")
            compact, lossy = from_json(about.get("compact")), from_json(about.get("lossy"))
            model, tokens = str(about["model"]), tuple(map(int, about["tokens"]))
            rows = tuple((int(here), int(whole)) for here, whole in about["rows"])
            room, next_, setup = int(about["room"]), int(about["next"]), from_json(about["setup"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as e:
            why = " ".join(str(e).split())[:120]
            raise UserError(f"{folder} is not a saved context ({why}); make one with compress(...).save(folder)") from e
        if model != fingerprint(m):
            raise UserError(f"{folder} was made with another model; load that model, or compress the text again with {m.cfg.name}")
        check_seal(Path(folder), about)
        if not isinstance(setup, Setup):
            raise UserError(f"{folder} holds no setup; make a context with compress(...).save(folder)")
        setup.check_kinds()
        most = bucket(m.cfg.max_len)
        fits = len(rows) == m.cfg.L and all(0 <= here <= most and 0 <= whole <= most for here, whole in rows)
        if not fits or room < 1 or len(tokens) + room > m.cfg.max_len:
            raise UserError(f"{folder} claims other rows than {m.cfg.name} can have read; compress the text again")
        layers = abstract(m.cfg, setup, rows, room, m.precision.cache)
        like = (layers, jax.ShapeDtypeStruct((1, m.cfg.V), "float32"))
        given = arrays_of(Path(folder), like, compact)
        layers, logits = jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(g) for g in given])
        layers = setup.kv.place(layers)
        return Compressed(setup, layers, tokens, next_, logits, room, rows, model, lossy)


def digest(about: dict[str, Any]) -> str:
    """Of what a saved context says of itself: its policy, its model, its tokens and how its arrays are written."""
    return hashlib.sha256(json.dumps({k: v for k, v in about.items() if k != "seal"}, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_seal(folder: Path, about: dict[str, Any]) -> None:
    """Refuse a saved context that is not as it was written: another constant of a policy, or other numbers, may change no shape."""
    seal, arrays = about.get("seal"), folder / "cache.safetensors"
    known = seal if isinstance(seal, dict) else {}
    if known.get("about") != digest(about):
        raise UserError(f"{folder / 'context.json'} is not as it was saved; compress the text again")
    try:
        same = known.get("arrays") == file_digest(arrays)
    except OSError as e:
        raise UserError(f"the arrays in {folder} cannot be read ({e.strerror or e}); compress the text again") from e
    if not same:
        raise UserError(f"{arrays} is not as it was saved; compress the text again")


def named_leaves(tree: tuple[Any, jax.Array]) -> list[tuple[str, int, Any]]:
    """(field name, third of the layers it lies in, array) of every array of (layers, logits)."""
    flat, L = jax.tree_util.tree_flatten_with_path(tree)[0], len(tree[0])
    return [(field_of(path), path[1].idx * 3 // L if len(path) > 1 else 0, x) for path, x in flat]


def arrays_of(folder: Path, like: Any, compact: Any) -> list[np.ndarray]:
    """The arrays of a saved context, which must be those that `like` names. Nothing is allocated by what the file says of itself."""
    leaves = named_leaves(like)
    try:
        coding.check(compact)
        with safe_open(folder / "cache.safetensors", "np") as file:
            known = set(file.keys())

            def get(name: str) -> np.ndarray:
                if name not in known:
                    raise KeyError(name)
                return file.get_tensor(name)

            given = coding.read(leaves, compact, get) if compact else [get(str(i)) for i in range(len(leaves))]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        why = " ".join(str(e).split())[:120]
        raise UserError(f"the arrays in {folder} cannot be read ({why}); compress the text again") from e
    if any(g.shape != x.shape or g.dtype != x.dtype for g, (*_, x) in zip(given, leaves, strict=True)):
        raise UserError(f"the arrays in {folder} do not fit its policy; compress the text again")
    return given


def compress(
    m: Model, text: str, kv: Policy | None = None, *, cut: Pass | None = None, decode: Drafter | None = None,
    prefill: Pattern | None = None, bounded: int | None = None, room: int = 256,
) -> Compressed:  # fmt: skip
    """Read `text` once and pack it under a policy, with room for `room` further tokens.

    Give the drafter here if answers are to be drafted: its rows need space in the cache.
    """
    if not isinstance(text, str):
        raise UserError("compress takes one text; call it once for each")
    setup = Setup(Full() if kv is None else kv, cut, Plain() if decode is None else decode, prefill=prefill, bounded=bounded)
    ids = encode(m, text)
    setup.check(m, [len(ids[0])], room)
    setup = setup.fit(m)
    prompt = read(m, ids, setup)
    with beside(m.params):
        setup = dataclasses.replace(setup, kv=setup.kv.plan(prompt.layers, m.cfg))
        layers = pack(setup.kv, prompt.layers, setup.room(room), m.cfg)
    rows = tuple((layer.order_BKS.shape[2], layer.whole or 0) for layer in prompt.layers)
    return Compressed(setup, layers, tuple(ids[0]), int(prompt.next_B[0]), prompt.logits_BV, room, rows, fingerprint(m))


def abstract(cfg: Config, setup: Setup, rows: tuple[tuple[int, int], ...], room: int, dtype: str):
    """The packed layers as shapes and dtypes, without computing them. rows: of each layer how many it was packed from, and, where it was
    read in bounded memory, how many came in all."""

    def layer(i: int) -> Any:
        S, whole = rows[i]
        here = Here(i, cfg).fewer(cfg.K if setup.cut is None else setup.cut.heads_in(i, cfg)).cfg
        kv = jax.ShapeDtypeStruct((1, here.K, S, cfg.H), dtype)
        order, length, index = (jax.ShapeDtypeStruct(shape, "int32") for shape in ((1, here.K if whole else 1, S), (1,), ()))
        heads = None if here.K == cfg.K else jax.ShapeDtypeStruct((1, here.K), "int32")
        like: Any = Prefilled  # shapes in the place of arrays
        return like(kv, kv, order, length, index, {ask: ask.like(1, S, here) for ask in setup.kv.needs()}, length if whole else None,
                    whole or None, heads)  # fmt: skip

    return jax.eval_shape(lambda layers: setup.kv.pack(layers, setup.room(room), cfg), tuple(map(layer, range(cfg.L))))


def to_json(value: Any) -> Any:
    """A choice as JSON: a dataclass is {'type': name, field: ...}, a tuple {'tuple': [...]}."""
    if dataclasses.is_dataclass(value):
        return {"type": type(value).__name__} | {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"tuple": [to_json(v) for v in value]} if isinstance(value, tuple) else value


def from_json(value: Any) -> Any:
    """The inverse, for the classes in `choices` only."""
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(from_json(v) for v in value["tuple"])
    cls = choices().get(str(value.get("type")))
    if cls is None:
        raise UserError(f"the saved context uses {value.get('type')!r}, which this version does not know; compress the text again")
    try:
        return cls(**{k: from_json(v) for k, v in value.items() if k != "type"})
    except TypeError as e:
        raise UserError(f"the saved {cls.__name__} has other fields than this version's ({e}); compress the text again") from e
