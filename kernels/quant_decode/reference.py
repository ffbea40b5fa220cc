"""quant_decode in plain float32 jax.numpy: the definition every other implementation is tested against."""

import jax.numpy as jnp

from tokeff.kernels.decode_attention import reference
from tokeff.kernels.quant_decode.codes import dequantise


def run(
    q_BTNH, k_zero_BKPRQ, k_step_BKPRQ, v_zero_BKPRQ, v_step_BKPRQ, k_code_BKPRZ, v_code_BKPRZ, order_BKPR, lo_BT, hi_BT, *,
    bits, scale, softcap, finite=False,
):  # fmt: skip
    """Undo the code of every row, then attend as `decode_attention` does. Same contract as the public op."""
    flat = (*order_BKPR.shape[:2], -1)
    k, v = (
        dequantise(code, zero.astype(jnp.float32), step.astype(jnp.float32), bits).reshape(*flat, q_BTNH.shape[3])
        for code, zero, step in ((k_code_BKPRZ, k_zero_BKPRQ, k_step_BKPRQ), (v_code_BKPRZ, v_zero_BKPRQ, v_step_BKPRQ))
    )
    return reference.run(q_BTNH, k, v, order_BKPR.reshape(flat), lo_BT, hi_BT, page_size=1, scale=scale, softcap=softcap)
