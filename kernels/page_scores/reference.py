"""page_scores in plain float32 jax.numpy: the definition every other implementation is tested against."""

import jax.numpy as jnp


def run(q_BTNH, low_BKPH, high_BKPH, open_BKTP, *, most, chunks, scale):
    """Bound every product, add up a group's heads, take the best chunk of a page, sort the pages. Same contract as the public op."""
    (B, T, N, H), (_, K, P, _) = q_BTNH.shape, low_BKPH.shape
    q_BKTG1H = q_BTNH.astype(jnp.float32).reshape(B, T, K, N // K, 1, H).swapaxes(1, 2) * scale
    low, high = (x.astype(jnp.float32)[:, :, None, None] for x in (low_BKPH, low_BKPH if high_BKPH is None else high_BKPH))
    worth_BKTP = jnp.maximum(q_BKTG1H * low, q_BKTG1H * high).sum((3, 5))
    worth_BKTP = worth_BKTP.reshape(B, K, T, P // chunks, chunks).max(-1)
    worth_BKTP = jnp.where(open_BKTP & ~jnp.isnan(worth_BKTP), worth_BKTP, -jnp.inf)
    page_BKTM = jnp.argsort(-worth_BKTP, axis=-1, stable=True)[..., :most].astype(jnp.int32)
    worth_BKTM = jnp.take_along_axis(worth_BKTP, page_BKTM, -1)
    return worth_BKTM, jnp.where(worth_BKTM > -jnp.inf, page_BKTM, -1)
