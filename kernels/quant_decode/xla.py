"""quant_decode in jax.numpy that XLA compiles on any platform.

Keys and values of one layer are written out in the dtype of zero and step, for this call only, and attended to. XLA fuses shifts,
masks and scaling into that one write; it reads the codes, and writes and rereads what they stand for.
"""

import jax.numpy as jnp

from tokeff.kernels.attend import combine, scores, seen_by_any, sees, softmax
from tokeff.kernels.quant_decode.codes import dequantise


def run(
    q_BTNH, k_zero_BKPRQ, k_step_BKPRQ, v_zero_BKPRQ, v_step_BKPRQ, k_code_BKPRZ, v_code_BKPRZ, order_BKPR, lo_BT, hi_BT, *,
    bits, scale, softcap, finite=False, clean=False,
):  # fmt: skip
    """Same contract as the public op. clean: empty unseen slots up front, as gradients need (0 * NaN is NaN)."""
    (B, K, P, R), (T, N, H) = order_BKPR.shape, q_BTNH.shape[1:]
    order_BKC = order_BKPR.reshape(B, K, P * R)
    k_BKCH = dequantise(k_code_BKPRZ, k_zero_BKPRQ, k_step_BKPRQ, bits).reshape(B, K, P * R, H)
    v_BKCH = dequantise(v_code_BKPRZ, v_zero_BKPRQ, v_step_BKPRQ, bits).reshape(B, K, P * R, H)
    if clean or not finite:
        seen_BKC1 = seen_by_any(order_BKC, lo_BT, hi_BT)[..., None]
        k_BKCH, v_BKCH = (jnp.where(seen_BKC1, x, 0) for x in (k_BKCH, v_BKCH))
    seen_BK1TC = sees(order_BKC[:, :, None, None], lo_BT[:, None, None, :, None], hi_BT[:, None, None, :, None])
    p, lse_BKGT = softmax(scores(q_BTNH, k_BKCH, scale, softcap), seen_BK1TC)
    lse_BTN = jnp.moveaxis(jnp.where(seen_BK1TC.any(-1), lse_BKGT, -jnp.inf), 3, 1).reshape(B, T, N)
    return combine(p, v_BKCH).astype(q_BTNH.dtype), lse_BTN
