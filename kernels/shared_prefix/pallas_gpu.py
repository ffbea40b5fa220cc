"""shared_prefix for NVIDIA GPUs (Triton): decode_attention's kernel over all queries of a group.

That kernel holds a tile of the R = T * G query rows of a kv head in registers, and splits slots over programs.

HBM bytes: 2 * C * H * itemsize for each (J, K) and tile of rows (later ones mostly from L2), where each sequence by itself would read
that much.
"""

from functools import partial

from tokeff.kernels.decode_attention import pallas_gpu

refusal = partial(pallas_gpu.refusal, page_size=1)
run = partial(pallas_gpu.run, page_size=1)
