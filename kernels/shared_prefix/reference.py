"""shared_prefix in plain float32 jax.numpy: the definition every other implementation is tested against."""

import jax.numpy as jnp

from tokeff.kernels.decode_attention import reference


def run(q_JTNH, k_JKCH, v_JKCH, order_JKC, lo_JT, hi_JT, *, scale, softcap, finite=False):
    """Give every query a copy of its group's rows. Same contract as the public op, with a group's queries in one axis."""
    J, T, N, H = q_JTNH.shape
    k, v, order = (jnp.repeat(x, T, axis=0) for x in (k_JKCH, v_JKCH, order_JKC))
    alone = q_JTNH.reshape(J * T, 1, N, H), k, v, order, lo_JT.reshape(-1, 1), hi_JT.reshape(-1, 1)
    out, lse = reference.run(*alone, page_size=1, scale=scale, softcap=softcap)
    return out.reshape(J, T, N, H), lse.reshape(J, T, N)
