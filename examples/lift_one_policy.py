"""Use one cache policy in your own JAX stack: bare arrays in, bare arrays out, none of our model code.

Run: python examples/lift_one_policy.py
"""

import jax
import jax.numpy as jnp

from tokeff.kv import snapkv
from tokeff.kv.cache import Room
from tokeff.kv.policy import Ask, Prefilled
from tokeff.models.config import Config
from tokeff.models.flow import Flow, Here

B, S, N, K, H = 2, 96, 4, 2, 16
keys = jax.random.split(jax.random.key(0), 6)

# What your prefill left for one layer: rotated keys, values, and the attention mass that the last 8 queries gave to every row.
k_BKSH = jax.random.normal(keys[0], (B, K, S, H))
v_BKSH = jax.random.normal(keys[1], (B, K, S, H))
order_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
mass_BKS = jax.nn.softmax(3 * jax.random.normal(keys[2], (B, K, S)))

policy = snapkv(budget=0.25, window=8)
here = Here(0, Config("mine", V=1, D=N * H, F=1, L=1, N=N, K=K, H=H))
rows = Prefilled(k_BKSH, v_BKSH, order_BS[:, None], jnp.full(B, S), jnp.int32(0), {Ask(last=8): mass_BKS})
cache = policy.pack_layer(rows, Room(rows=4), here)
print(f"kept {int(cache.live_B[0])} of {S} rows per head; cache {cache.k_BKCH.shape}, was {k_BKSH.shape}")

# One decode step of your model: this token's query, key and value, unrotated, and where it stands.
q_B1NH, k_B1KH, v_B1KH = (jax.random.normal(key, (B, 1, n, H)) for key, n in zip(keys[3:], (N, K, K), strict=True))
at_B1 = jnp.full((B, 1), S, jnp.int32)
flow = Flow(jnp.zeros((B, 1, N * H)), at_B1, at_B1, at_B1)
out_B1NH, cache, _ = jax.jit(policy.attend, static_argnames="here")(q_B1NH, k_B1KH, v_B1KH, flow, flow, cache, None, None, here=here)
print(f"attention output {out_B1NH.shape}, rows now {int(cache.live_B[0])}")
