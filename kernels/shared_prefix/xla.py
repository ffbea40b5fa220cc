"""shared_prefix in jax.numpy: decode_attention's XLA path, which takes queries in blocks and each block as one matrix product."""

from functools import partial

from tokeff.kernels.decode_attention import xla

run = partial(xla.run, page_size=1)
