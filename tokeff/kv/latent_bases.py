"""TransMLA's bases (Meng et al. 2025): from the keys and values of a text to the directions of one row for all heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tokeff.kv.policy import Prefilled
from tokeff.models.attention import wide
from tokeff.models.flow import EMPTY, Here

LEAST = 1e-5  # of the largest power of a direction; float32 rounding is a hundredth of that


class Bases(struct.PyTreeNode):
    """What takes a head's raw key and value, side by side in H, to its share of the Y numbers of a row: first those that keep their
    rotation, then the directions of all else, the strongest first. Queries come there by the key's half; gain_B undoes the scaling of
    keys."""

    down_BKHY: jax.Array
    gain_B: jax.Array


def rotated(rope: float | int, K: int, H: int) -> int:
    """How many numbers of a row keep their rotation: `rope` itself, or those of a share of the heads, at least one."""
    return max(1, round(rope * K)) * H if isinstance(rope, float) else rope


def rotated_first(rope: float | int, K: int, H: int) -> np.ndarray:
    """The K * H numbers of turned keys in the order in which a row has them, those that keep their rotation first: whole heads, and of the
    next one its fastest frequencies, first halves of their pairs and then the second ones. Slow ones turn least, and lose least."""
    whole, more = divmod(rotated(rope, K, H), H)
    half = np.arange(more // 2)
    near = np.concatenate([np.arange(whole * H), whole * H + half, whole * H + H // 2 + half])
    return np.concatenate([near, np.setdiff1d(np.arange(K * H), near)])


def directions(rope: float | int, K: int, H: int) -> int:
    """Into how many directions the rest goes at full rank."""
    return 2 * K * H - rotated(rope, K, H)


def side_names(rope: float | int, K: int, H: int) -> tuple[str, str]:
    """Where a converted model keeps a layer's bases and their gain, in `Block.side`."""
    name = f"latent{rotated(rope, K, H)}"
    return f"{name}_KHY", f"{name}gain"


def strongest(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(eigenvalues, eigenvectors as columns), the largest first, each vector with its largest number positive."""
    values, vectors = (x[..., ::-1] for x in jnp.linalg.eigh(gram))
    at = jnp.argmax(jnp.abs(vectors), axis=-2, keepdims=True)
    return values, vectors * jnp.sign(jnp.take_along_axis(vectors, at, axis=-2))


def turn(k_BSKH: jax.Array) -> jax.Array:
    """turn_BKHN: (B, K, H, K * H), keys turned across heads, each frequency by itself and both of its halves alike, so that the first
    head holds as much of all keys as one head can (sec. 4.2, RoRoPE). Such a turn commutes with rotary positions."""
    B, S, K, H = k_BSKH.shape
    pair = k_BSKH.reshape(B, S, K, 2, H // 2)
    _, across = strongest(jnp.einsum("bskai,bslai->bikl", pair, pair, precision="highest"))
    same = jnp.eye(2, dtype=k_BSKH.dtype), jnp.eye(H // 2, dtype=k_BSKH.dtype)
    return jnp.einsum("ac,iz,bikj->bkaijcz", *same, across).reshape(B, K, H, K * H)


def bases(k_BSKH: jax.Array, v_BSKH: jax.Array, rope: float | int, rank: int) -> Bases:
    """Of raw keys and values, 0 where no row is: keys that lose their rotation are scaled to the values' norm (sec. 4.3), and both have
    their principal directions together, of which the first `rank` are kept.

    Fewer rows than directions, or rows of the same few tokens, leave some undetermined. Short of the full rank those are 0: a row keeps no
    part of itself that rounding alone has chosen.
    """
    (B, S, K, H), k, v = k_BSKH.shape, *(x.astype(wide(x.dtype)) for x in (k_BSKH, v_BSKH))
    kept, across = rotated(rope, K, H), turn(k)[..., rotated_first(rope, K, H)]
    rest = jnp.einsum("bskh,bkhn->bsn", k, across[..., kept:], precision="highest")
    of_k, of_v = (jnp.linalg.norm(x.reshape(B, S, -1), axis=-1).sum(axis=1) for x in (rest, v))
    scale = jnp.where(of_k > 0, of_v / jnp.maximum(of_k, 1e-20), 1.0)
    flat = jnp.concatenate([rest * scale[:, None, None], v.reshape(B, S, K * H)], axis=-1)
    power, found = strongest(jnp.einsum("bsd,bse->bde", flat, flat, precision="highest"))
    if rank < found.shape[-1]:
        found = jnp.where((power > LEAST * power[:, :1])[:, None], found, 0)[..., :rank]
    far = K * H - kept
    of_key = jnp.einsum("bkhn,bny->bkhy", across[..., kept:] * scale[:, None, None, None], found[:, :far], precision="highest")
    of_value = found[:, far:].reshape(B, K, H, -1)
    key = jnp.concatenate([across[..., :kept], of_key], axis=-1)
    value = jnp.pad(of_value, ((0, 0), (0, 0), (0, 0), (kept, 0)))
    return Bases(jnp.concatenate([key, value], axis=2), 1 / scale**2)


def raw_rows(rows: Prefilled, here: Here) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(k_BSKH, v_BSKH, angle_BS) of a prompt's rows without rotation, 0 where no row is."""
    order = rows.order_BKS[:, 0]
    there, angle = (order != EMPTY)[:, :, None, None], jnp.maximum(order, 0)
    raw = here.rotate(jnp.moveaxis(rows.k_BKSH, 1, 2), angle[:, :, None], inverse=True)
    return jnp.where(there, raw, 0), jnp.where(there, jnp.moveaxis(rows.v_BKSH, 1, 2), 0), angle
