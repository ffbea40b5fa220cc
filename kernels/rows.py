"""Queries as rows: the T queries of the G heads that share a kv head form one (R, H) block, R = T * G, for a kernel."""

import jax.numpy as jnp

NOTHING = -2  # as `hi` of a padding row: below every order, so the row sees nothing


def round_up(n, multiple):
    """Return the smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


def head_rows(x_BTNx, K, R):
    """Group by kv head and pad with zeros: (B, T, N, ...) -> (B, K, R, ...). Row t * G + g is query t, group head g."""
    B, T, N, *rest = x_BTNx.shape
    x_BKRx = x_BTNx.reshape(B, T, K, N // K, *rest).swapaxes(1, 2).reshape(B, K, -1, *rest)
    return _pad_rows(x_BKRx, 2, R, 0)


def token_rows(x_BT, G, R, fill):
    """Repeat per-token values for the G heads and pad: (B, T) -> (B, R), in the row order of `head_rows`."""
    return _pad_rows(jnp.repeat(x_BT, G, 1), 1, R, fill)


def tokens(x_BKRx, T, N):
    """Undo `head_rows`: (B, K, R, ...) -> (B, T, N, ...)."""
    B, K, _, *rest = x_BKRx.shape
    x_BKTGx = x_BKRx[:, :, : T * (N // K)].reshape(B, K, T, N // K, *rest)
    return x_BKTGx.swapaxes(1, 2).reshape(B, T, N, *rest)


def _pad_rows(x, axis, R, fill):
    return jnp.pad(x, [(0, R - n if i == axis else 0) for i, n in enumerate(x.shape)], constant_values=fill)
