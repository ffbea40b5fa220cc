"""Scores of keys that are kept as a low-rank product before rotation: rebuilt, rotated and multiplied without being written."""

import jax

from tokeff.kernels import dispatch
from tokeff.kernels.lowrank_scores import pallas_gpu, pallas_tpu, reference, xla


def lowrank_scores(
    q_BTNH, low_BSY, basis_BYKH, angle_BS, page_BKTM, freq_h, *, gain=1.0, page_size=1, scale, implementation=None, mesh=None
) -> jax.Array:
    """Return the scores of each query against the rows of pages that it names for each kv head.

    The key of row s and kv head k before rotation is low_BSY[s] @ basis_BYKH[:, k] (Sun et al. 2024, ShadowKV, sec. 4.1); it is turned by
    angle_BS[s] and multiplied with the query. Differentiable in q, low and basis, through the XLA path.

    Args:
      q_BTNH: queries, rotated. N = K * G, and head n reads kv head n // G.
      low_BSY, basis_BYKH: the two factors, of rank Y, same dtype as q.
      angle_BS: int32 rotary position of each row.
      page_BKTM: int32 pages, -1 for none. Page p is the `page_size` rows from p * page_size on; it must lie inside S.
      freq_h: H / 2 frequencies of the rotary embedding; number i of a key is paired with number i + H / 2.
      gain: factor on rotated keys (YaRN's attention factor).
      page_size: rows a page.
      scale: factor on q . k, usually H ** -0.5.
      implementation, mesh: as in `decode_attention`; rows stay whole on every device.

    Returns:
      score_BKTGX float32 of the X = M * page_size rows, page after page; -inf for those of page -1.

    Raises:
      ValueError: a named implementation does not support the call (the message says which constraint), or shapes do not fit.
    """
    (B, T, N, H), (_, S, Y), K = q_BTNH.shape, low_BSY.shape, basis_BYKH.shape[2]
    if low_BSY.shape[0] != B or basis_BYKH.shape != (B, Y, K, H) or N % K or angle_BS.shape != (B, S):
        shapes = q_BTNH.shape, low_BSY.shape, basis_BYKH.shape, angle_BS.shape
        raise ValueError(f"q, low, basis and angle are not BTNH, BSY, BYKH and BS: {shapes}")
    if page_BKTM.shape[:3] != (B, K, T) or freq_h.shape != (H // 2,):
        raise ValueError(f"page {page_BKTM.shape} and freq {freq_h.shape} must be (B, K, T, M) and (H / 2,) of B, K, T, H = {(B, K, T, H)}")
    arrays = (q_BTNH, low_BSY, basis_BYKH, angle_BS, page_BKTM, freq_h)
    return dispatch.call(OP, implementation, mesh, arrays, gain=float(gain), page_size=page_size, scale=float(scale))


OP = dispatch.Op(
    name="lowrank_scores",
    run=dispatch.implementations(reference, xla, pallas_tpu, pallas_gpu),
    refusal=dispatch.refusals(pallas_tpu, pallas_gpu),
    dims=("BTNH", "BSY", "BYKH", "BS", "BKTM", "h"),
    out_dims="BKTGX",
    floats=3,
    localise=lambda arrays, shard, options: arrays,
    combine=lambda score, *_: score,
)
