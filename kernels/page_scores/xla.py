"""page_scores in jax.numpy that XLA compiles well on any platform.

max(q * low, q * high) takes `high` where q is positive and `low` where it is not: two matrix products, with nothing of P x H between.
"""

import jax
import jax.numpy as jnp

from tokeff.kernels.attend import NEG, scores


def run(q_BTNH, low_BKPH, high_BKPH, open_BKTP, *, most, chunks, scale, clean=False):
    """Same contract as the public op. clean: empty summaries of pages nobody may choose, as gradients need (0 * NaN is NaN)."""
    if clean:
        seen_BKP1 = jnp.repeat(open_BKTP.any(2), chunks, -1)[..., None]
        low_BKPH = jnp.where(seen_BKP1, low_BKPH, 0)
        high_BKPH = None if high_BKPH is None else jnp.where(seen_BKP1, high_BKPH, 0)
    if high_BKPH is None:
        worth_BKGTP = scores(q_BTNH, low_BKPH, scale, 0.0)
    else:
        up, down = jnp.maximum(q_BTNH, 0), jnp.minimum(q_BTNH, 0)
        worth_BKGTP = scores(up, high_BKPH, scale, 0.0) + scores(down, low_BKPH, scale, 0.0)
    return best(worth_BKGTP.sum(axis=2), open_BKTP, most, chunks)


def best(worth_BKTP, open_BKTP, most, chunks):
    """Return (worth_BKTM, page_BKTM) of the best open pages from the worth of every chunk; of all, where a shard has fewer than `most`."""
    worth_BKTP = worth_BKTP.reshape(*open_BKTP.shape, chunks).max(axis=-1)
    worth_BKTP = jnp.where(open_BKTP & ~jnp.isnan(worth_BKTP), worth_BKTP, NEG)
    worth_BKTM, page_BKTM = jax.lax.top_k(worth_BKTP, min(most, worth_BKTP.shape[-1]))
    some_BKTM = worth_BKTM > NEG
    return jnp.where(some_BKTM, worth_BKTM, -jnp.inf).astype(jnp.float32), jnp.where(some_BKTM, page_BKTM, -1).astype(jnp.int32)
