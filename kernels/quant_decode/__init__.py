"""Attention over keys and values that are held in code, with its log-sum-exp: codes are read, and what they stand for never written."""

import jax

from tokeff.kernels import dispatch
from tokeff.kernels.decode_attention import OP as DECODE
from tokeff.kernels.quant_decode import pallas_gpu, pallas_tpu, reference, xla


def quant_decode(
    q_BTNH, k_code_BKPRZ, k_zero_BKPRQ, k_step_BKPRQ, v_code_BKPRZ, v_zero_BKPRQ, v_step_BKPRQ, order_BKPR, lo_BT, hi_BT, *,
    scale, softcap=0.0, finite=False, implementation=None, mesh=None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attend T query rows to rows in code that they may see, and return the output and its log-sum-exp.

    A number is zero + step * code (Liu et al. 2024, KIVI, eq. 1). Codes of 2, 4 or 8 bits lie packed in bytes as `codes.pack_bits` does:
    byte z of a row holds numbers z, z + Z, z + 2 Z, .... Q groups divide a row's H numbers, with a zero and a step each, written once a
    page (an axis of 1 in the place of R; with Q = H this is KIVI's grouping of keys by channel) or once a row (its values).
    What is seen is as in `decode_attention`, slot by slot; whatever unseen slots hold, NaN and garbage codes included, has no effect.
    Differentiable in q, zeros and steps, through the XLA path.

    Args:
      q_BTNH: queries, rotated. N = K * G, and head n reads kv head n // G.
      k_code_BKPRZ, v_code_BKPRZ: uint8 codes of P pages of R rows, Z = H * bits / 8 bytes a row.
      k_zero_BKPRQ, k_step_BKPRQ, v_zero_BKPRQ, v_step_BKPRQ: zeros and steps, same dtype as q. R is 1 where a page shares them.
      order_BKPR: int32 place in the sequence of each row, -1 where there is none.
      lo_BT, hi_BT: int32 first and last order a query sees, inclusive; lo > hi sees nothing.
      scale, softcap, finite, implementation: as in `decode_attention`.
      mesh: as in `decode_attention`; pages are split over 'seq', or over 'model' where it does not divide K.

    Returns:
      out_BTNH in the dtype of q, and lse_BTN float32. A query that sees nothing gets out 0 and lse -inf.

    Raises:
      ValueError: a named implementation does not support the call (the message says which constraint), or shapes do not fit.
    """
    keys, values = (k_code_BKPRZ, k_zero_BKPRQ, k_step_BKPRQ), (v_code_BKPRZ, v_zero_BKPRQ, v_step_BKPRQ)
    bits = _check_shapes(q_BTNH, keys, values, order_BKPR, lo_BT, hi_BT)
    arrays = (q_BTNH, *keys[1:], *values[1:], k_code_BKPRZ, v_code_BKPRZ, order_BKPR, lo_BT, hi_BT)
    return dispatch.call(OP, implementation, mesh, arrays, bits=bits, scale=float(scale), softcap=float(softcap), finite=finite)


def _check_shapes(q_BTNH, keys, values, order_BKPR, lo_BT, hi_BT):
    """Return the bits of a code. Raise ValueError, in one line, unless all shapes fit together."""
    (B, T, N, H), (_, K, P, R) = q_BTNH.shape, order_BKPR.shape
    if order_BKPR.shape[0] != B or N % K or lo_BT.shape != (B, T) or hi_BT.shape != (B, T):
        raise ValueError(f"q {q_BTNH.shape}, order {order_BKPR.shape} and lo {lo_BT.shape}, hi {hi_BT.shape} are not BTNH, BKPR and BT")
    bits = keys[0].shape[-1] * 8 // H
    for code, zero, step in (keys, values):
        if bits not in (2, 4, 8) or code.shape != (B, K, P, R, H * bits // 8) or code.dtype != "uint8":
            raise ValueError(f"codes {code.dtype}{code.shape} are not uint8 of 2, 4 or 8 bits for {H} numbers in pages {order_BKPR.shape}")
        if zero.shape != step.shape or zero.shape[:3] != (B, K, P) or zero.shape[3] not in (1, R) or H % zero.shape[4]:
            raise ValueError(f"zero {zero.shape} and step {step.shape} are not of groups of {H} numbers in pages {order_BKPR.shape}")
    return bits


OP = dispatch.Op(
    name="quant_decode",
    run=dispatch.implementations(reference, xla, pallas_tpu, pallas_gpu),
    refusal=dispatch.refusals(pallas_tpu, pallas_gpu),
    dims=("BTNH", "BKCRQ", "BKCRQ", "BKCRQ", "BKCRQ", "BKCRZ", "BKCRZ", "BKCR", "BT", "BT"),  # C: pages
    out_dims=("BTNH", "BTN"),
    floats=5,
    localise=lambda arrays, shard, options: arrays,  # orders say what is seen, wherever a page lies
    combine=DECODE.combine,
    pages=True,
)
