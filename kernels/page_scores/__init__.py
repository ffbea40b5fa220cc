"""Which pages of a cache are worth reading: summaries of pages against queries, and the best pages of each."""

import jax
import jax.numpy as jnp

from tokeff.kernels import dispatch
from tokeff.kernels.page_scores import pallas_gpu, pallas_tpu, reference, xla


def page_scores(
    q_BTNH, low_BKPH, high_BKPH, open_BKTP, *, most, chunks=1, scale=1.0, implementation=None, mesh=None
) -> tuple[jax.Array, jax.Array]:
    """Return the worth and the numbers of the `most` pages of each query and kv head that are worth most.

    With two summaries a page, its smallest and largest key channel by channel, the worth is the bound sum over channels of
    max(q * low, q * high) (Tang et al. 2024, Quest, sec. 3.2); with one (its mean, say), high None, it is q . low. The query heads of a kv
    head are added up. Of equal pages the first counts. Differentiable in q and summaries, through the XLA path.

    Args:
      q_BTNH: queries, rotated. N = K * G, and head n reads kv head n // G.
      low_BKPH, high_BKPH: summaries of P pages, or of P chunks of which a page has `chunks`; high None where there is one summary.
      open_BKTP: bool, which pages each query may choose, with an axis of P / chunks; summaries of the others may hold anything, NaN too.
      most: how many pages are named, at most P / chunks.
      chunks: chunks a page; it is worth what its best one is (Yang et al. 2025, LServe, sec. 3.4).
      scale, implementation, mesh: as in `decode_attention`; pages are split over 'seq', or over 'model' where it does not divide K.

    Returns:
      worth_BKTM float32, falling, and page_BKTM int32; -inf and -1 where a query has fewer open pages. NaN is never chosen.

    Raises:
      ValueError: a named implementation does not support the call (the message says which constraint), or shapes do not fit.
    """
    (B, T, N, H), (_, K, P, _) = q_BTNH.shape, low_BKPH.shape
    if low_BKPH.shape != (B, K, P, H) or N % K or (high_BKPH is not None and high_BKPH.shape != low_BKPH.shape):
        raise ValueError(f"q {q_BTNH.shape} and summaries {low_BKPH.shape} are not BTNH and BKPH")
    if P % chunks or open_BKTP.shape != (B, K, T, P // chunks) or not 1 <= most <= P // chunks:
        raise ValueError(f"open {open_BKTP.shape} is not (B, K, T, {P} / {chunks}), or most={most} is more than its pages")
    arrays = (q_BTNH, low_BKPH, high_BKPH, open_BKTP)
    return dispatch.call(OP, implementation, mesh, arrays, most=most, chunks=chunks, scale=float(scale))


def _combine(outs, axis, arrays, options):
    """Rank again the best pages of each shard: as many as are wanted of all, or every page that it has."""
    (worth_BKTM, page_BKTM), pages = outs, arrays[3].shape[3]
    page_BKTM = jnp.where(page_BKTM < 0, -1, page_BKTM + jax.lax.axis_index(axis) * pages)
    worth_BKTM, page_BKTM = (jax.lax.all_gather(x, axis, axis=3, tiled=True) for x in (worth_BKTM, page_BKTM))
    worth_BKTM, at_BKTM = jax.lax.top_k(worth_BKTM, options["most"])
    return worth_BKTM, jnp.take_along_axis(page_BKTM, at_BKTM, axis=3)


OP = dispatch.Op(
    name="page_scores",
    run=dispatch.implementations(reference, xla, pallas_tpu, pallas_gpu),
    refusal=dispatch.refusals(pallas_tpu, pallas_gpu),
    dims=("BTNH", "BKCH", "BKCH", "BKTC"),  # C: pages, or the chunks of pages
    out_dims=("BKTM", "BKTM"),
    floats=3,
    localise=lambda arrays, shard, options: arrays,
    combine=_combine,
    pages=True,
)
