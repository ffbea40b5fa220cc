"""Rows in host memory: what one step reads is gathered there and comes over; what it does not read stays.

`place` puts arrays there between jitted calls. `rows_from_host` gathers inside a jitted function: the gather itself runs on the host, so
that only the chosen rows cross. On a platform without `pinned_host` memory arrays stay where they are and the same code is an
ordinary gather.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.core import Tracer
from jax.experimental.compute_on import compute_on

HOST = "pinned_host"


def has_host_memory(device: Any = None) -> bool:
    """Whether arrays of this device can lie in pinned host memory."""
    device = device or jax.devices()[0]
    return any(memory.kind == HOST for memory in device.addressable_memories())


def place(x: jax.Array) -> jax.Array:
    """The array in host memory, laid out over devices as it was; unchanged while a program is traced."""
    if isinstance(x, Tracer) or not isinstance(x, jax.Array) or not has_host_memory():
        return x
    return jax.device_put(x, x.sharding.with_memory_kind(HOST))


def fetch(x: jax.Array) -> jax.Array:
    """The array in its device's own memory."""
    if isinstance(x, Tracer) or not isinstance(x, jax.Array) or x.sharding.memory_kind != HOST:
        return x
    return jax.device_put(x, x.sharding.with_memory_kind(next(iter(x.devices())).default_memory().kind))


def rows_from_host(x_BKSH: Any, index_BKM: jax.Array, size: int = 1) -> Any:
    """(B, K, M * size, H): the rows of each head with these indices, and the size - 1 behind each (all in range), from host memory into
    the device's. Of a tree of such arrays the same rows of each."""
    numbers = jax.lax.GatherDimensionNumbers(
        offset_dims=(3, 4), collapsed_slice_dims=(), start_index_map=(2,), operand_batching_dims=(0, 1), start_indices_batching_dims=(0, 1)
    )

    def rows(x, i):
        found = jax.lax.gather(x, i, numbers, (1, 1, size, x.shape[-1]), mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)
        return found.reshape(*found.shape[:2], -1, found.shape[-1])

    @compute_on("device_host")
    @jax.jit
    def gather(tree, i):
        return jax.tree.map(lambda x: rows(x, i), tree)

    space = jax.memory.Space
    there = jax.device_put((x_BKSH, index_BKM[..., None]), space.Host)
    return jax.device_put(gather(*there), space.Device)


def host_bytes(tree: Any) -> int:
    """Bytes of the arrays of a pytree that lie in host memory."""
    return sum(x.nbytes for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and x.sharding.memory_kind == HOST)
