"""Where arrays lie on a mesh: one table from dimension letters to mesh axes.

Every array of ours names its dimensions in the suffix of its field (`k_BKCH`, `embed_VD`, `owner_BP`), so the layout of any
tree of them follows from field names alone and no method holds a line about devices. A field that holds a dict, a tuple or a
bare array passes its suffix on to the arrays inside (`mass_BKS: dict[Ask, Array]`).

A dimension that its mesh axis does not divide stays whole on every device: 3 kv heads on model=2, 3 prompts on data=2. Query
heads follow their kv heads: where K stays whole N does too, though N alone might divide, because the G query heads of one kv
head must be where its keys are. The feed-forward and the vocabulary are split all the same.

Virtual CPU devices (`--xla_force_host_platform_device_count=8`) also need PJRT_NPROC=32 in the environment: XLA:CPU starts one
thread per device, and two programs in flight at once can then wait for each other until XLA aborts the process.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tokeff.compat import context_mesh, shard_map
from tokeff.errors import UserError

# Fully sharded weights are one more entry: D="data". `seq` is for kernels that are given such a mesh; `mesh` makes none.
RULES: Mapping[str, str] = {"B": "data", "N": "model", "K": "model", "F": "model", "V": "model", "P": "model", "C": "seq", "J": "data"}

Tree = TypeVar("Tree")


def mesh(data: int = 1, model: int = 1, devices: Iterable[Any] | None = None) -> Mesh:
    """A data x model mesh over the first data * model devices. Model neighbours are adjacent: they talk most."""
    found = list(jax.devices() if devices is None else devices)
    if data < 1 or model < 1:
        raise UserError(f"a mesh of data={data} x model={model} has no devices; give at least 1 x 1")
    if data * model > len(found):
        raise UserError(f"data={data} x model={model} needs {data * model} devices, {len(found)} are here; lower one of the two")
    grid = np.array(found[: data * model]).reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def letters(name: str) -> str:
    """The dimension letters in a field name: 'BKCH' of 'k_BKCH', '' of 'index'."""
    suffix = name.rpartition("_")[2]
    return suffix if "_" in name and suffix.isupper() else ""


def spec(name: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, whole: str = "") -> PartitionSpec:
    """The layout of one array from its name. Letters in `whole` are not split; a mesh axis goes to its first letter."""
    dims = letters(name)
    if len(dims) != len(shape):
        raise ValueError(f"field {name!r} names {len(dims)} dimensions, its array has {len(shape)}; name each by a letter")
    axes: list[str | None] = []
    for letter, size in zip(dims, shape):
        axis = RULES.get(letter)
        fits = axis in mesh.shape and axis not in axes and letter not in whole and size % mesh.shape[axis] == 0
        axes.append(axis if fits else None)
    return PartitionSpec(*axes)


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """The same tree with a NamedSharding for every array (or ShapeDtypeStruct). What lies in host memory stays there."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    named = [(field_of(path), x.shape, getattr(getattr(x, "sharding", None), "memory_kind", None)) for path, x in flat]
    heads = {n for name, shape, _ in named for letter, n in zip(letters(name), shape) if letter == "K"}
    heads = heads - {1} or heads  # what all heads of a layer share has an axis of length 1 for them
    whole = "NK" if any(K % mesh.shape.get(RULES["K"], 1) for K in heads) else ""
    found = [NamedSharding(mesh, spec(name, shape, mesh, whole), memory_kind=kind) for name, shape, kind in named]
    return jax.tree.unflatten(treedef, found)


def field_of(path: tuple[Any, ...]) -> str:
    """The innermost name with letters on the way to a leaf (a dataclass field or a dict key), else the innermost name."""
    names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in reversed(path)]
    return next(filter(letters, names), names[0] if names else "")


def shard(tree: Tree, mesh: Mesh) -> Tree:
    """The tree with its arrays laid out over the mesh."""
    return jax.device_put(tree, shardings(tree, mesh))


def place(model: Any, mesh: Mesh) -> Any:
    """A loaded model with its weights laid out over the mesh. Generation follows the weights: prompts and caches go there too."""
    return dataclasses.replace(model, params=shard(model.params, mesh))


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of more than one device that a tree's arrays lie on, or None."""
    for x in jax.tree.leaves(tree):
        if isinstance(where := getattr(x, "sharding", None), NamedSharding) and where.mesh.size > 1:
            assert isinstance(where.mesh, Mesh)
            return where.mesh
    return None


def follow(params: Any, tree: Tree) -> Tree:
    """The tree laid out over the mesh of the weights; the tree itself where the weights lie on one device."""
    on = mesh_of(params)
    return tree if on is None else shard(tree, on)


def beside(params: Any):
    """A context in which kernels find the mesh of the weights (Mosaic calls must be told; they do not partition themselves)."""
    on = mesh_of(params)
    return contextlib.nullcontext() if on is None else jax.set_mesh(on)


def top_k(x: jax.Array, k: int, dims: str) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` over the last axis of an array with these dimension letters; the same result, ties included.

    Left alone, XLA gathers all of x on every device. Here each device ranks its own batch rows and heads; where the last axis is
    split too (logits over the vocabulary), each ranks its part, and the n * k winners are ranked again.
    """
    on = context_mesh()
    if on is None or on.size == 1:
        return jax.lax.top_k(x, k)
    layout = spec(f"x_{dims}", x.shape, on)

    def local(x):
        value, index = jax.lax.top_k(x, min(k, x.shape[-1]))
        if (axis := layout[-1]) is None:
            return value, index
        index = index + jax.lax.axis_index(axis) * x.shape[-1]
        value, index = (jax.lax.all_gather(y, axis, axis=y.ndim - 1, tiled=True) for y in (value, index))
        value, at = jax.lax.top_k(value, k)
        return value, jnp.take_along_axis(index, at, axis=-1)

    out = PartitionSpec(*layout[:-1], None)
    return shard_map(local, on, (layout,), (out, out))(x)
