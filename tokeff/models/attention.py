"""Attention of many query rows over many stored rows, and the pieces that others build theirs from."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokeff.kernels.attend import NEG, combine, scores, softmax, wide
from tokeff.kernels.flash_prefill import flash_prefill

__all__ = ["NEG", "combine", "flash", "scores", "softmax", "wide"]


def flash(
    q_BTNH: jax.Array,
    k_BKCH: jax.Array,
    v_BKCH: jax.Array,
    lo_BT: jax.Array,
    hi_BT: jax.Array,
    order_BKC: jax.Array,
    *,
    scale: float,
    softcap: float = 0.0,
    first: int | None = None,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN): each query reads the rows whose order lies in [lo, hi]. order_BKC is (B, 1, C) where heads hold the same rows.

    The kernel `flash_prefill`, with NEG in the place of -inf for a query that sees nothing. `first`: query t stands at stored row
    `first + t`, so rows after it, and those more than `window` before it, are not even touched; None when the queries are an
    arbitrary subset.
    """
    out, lse = flash_prefill(
        q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, scale=scale, softcap=softcap, first=first, window=window, finite=True
    )
    return out, jnp.where(lse == -jnp.inf, NEG, lse)
