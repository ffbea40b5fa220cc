"""bipartite_match in plain float32 jax.numpy: the definition every other implementation is tested against."""

import jax.numpy as jnp


def run(metric_BSH, *, protected):
    """Build all cosines, forbid those of protected rows, take the best of every row. Same contract as the public op."""
    x = metric_BSH.astype(jnp.float32)
    length = jnp.sqrt((x * x).sum(-1))
    product_BAE = jnp.einsum("bah,beh->bae", x[:, ::2], x[:, 1::2], precision="highest")
    cosine_BAE = product_BAE / jnp.maximum(length[:, ::2, None], 1e-20) / jnp.maximum(length[:, None, 1::2], 1e-20)
    row = jnp.arange(x.shape[1])
    free_AE = (row[::2, None] >= protected) & (row[None, 1::2] >= protected)
    cosine_BAE = jnp.where(free_AE & ~jnp.isnan(cosine_BAE), cosine_BAE, -jnp.inf)
    return cosine_BAE.max(-1), jnp.argmax(cosine_BAE, -1).astype(jnp.int32)
