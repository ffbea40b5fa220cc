"""shared_prefix for NVIDIA GPUs (Triton): decode_attention's kernel over blocks of a group's queries.

That kernel holds R = T * G query rows of a kv head in registers, split over programs by slots. A group's queries go in blocks of as many
rows as it takes.

HBM bytes: 2 * C * H * itemsize for each (J, K) and block of rows (later ones mostly from L2), where each sequence by itself would read
that much.
"""

from functools import partial

from tokeff.kernels.decode_attention import pallas_gpu
from tokeff.kernels.shared_prefix.pallas_tpu import first_block, in_blocks, tokens_of_block


def refusal(q_JTNH, k_JKCH, v_JKCH, order_JKC, lo_JT, hi_JT, **options):
    """Return in one line why this kernel cannot take the call, or None."""
    q, lo, hi = (first_block(x, tokens_of_block(q_JTNH, k_JKCH, _rows(q_JTNH))) for x in (q_JTNH, lo_JT, hi_JT))
    return pallas_gpu.refusal(q, k_JKCH, v_JKCH, order_JKC, lo, hi, page_size=1, **options)


def run(q_JTNH, k_JKCH, v_JKCH, order_JKC, lo_JT, hi_JT, *, interpret=False, **options):
    """Same contract as the public op, for calls that `refusal` accepts. interpret: as of `pl.pallas_call`."""
    attend = partial(pallas_gpu.run, page_size=1, interpret=interpret, **options)
    return in_blocks(attend, _rows(q_JTNH), q_JTNH, k_JKCH, v_JKCH, order_JKC, lo_JT, hi_JT)


def _rows(q_JTNH):
    """Return how many query rows of this head size and dtype the kernel holds; none in a dtype it does not take."""
    return max(1, pallas_gpu.MAX_TILE.get(q_JTNH.dtype.name, 0) // q_JTNH.shape[3])
