"""Who is most like whom between the even and the odd rows of a sequence: the scores that token merging ranks by."""

import jax

from tokeff.kernels import dispatch
from tokeff.kernels.bipartite_match import pallas_gpu, pallas_tpu, reference, xla


def bipartite_match(metric_BSH, *, protected=0, implementation=None, mesh=None) -> tuple[jax.Array, jax.Array]:
    """Return for every even row the closest odd row and its cosine (Bolya et al. 2023, ToMe, sec. 3, steps 1 to 3).

    Of equal ones the first counts. Differentiable in the metric, through the XLA path.

    Args:
      metric_BSH: what likeness is measured on; at least 2 rows.
      protected: so many first rows neither ask nor are found.
      implementation, mesh: as in `decode_attention`.

    Returns:
      cosine_BA float32, -inf for a protected row or where no cosine is a number, and partner_BA int32, which counts odd rows; 0 there.

    Raises:
      ValueError: a named implementation does not support the call (the message says which constraint), or there are too few rows.
    """
    if metric_BSH.ndim != 3 or metric_BSH.shape[1] < 2:
        raise ValueError(f"metric {metric_BSH.shape} is not (B, S, H) with at least 2 rows")
    return dispatch.call(OP, implementation, mesh, (metric_BSH,), protected=protected)


OP = dispatch.Op(
    name="bipartite_match",
    run=dispatch.implementations(reference, xla, pallas_tpu, pallas_gpu),
    refusal=dispatch.refusals(pallas_tpu, pallas_gpu),
    dims=("BSH",),
    out_dims=("BA", "BA"),
    floats=1,
    localise=lambda arrays, shard, options: arrays,
    combine=lambda outs, *_: outs,
)
