"""Heads on the target's features (Medusa's shape, untrained): shows that a drafter can have weights, and see what layers put out."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from adversaries import tree_of

from tokeff.decode.draft import Chained, Drafter, last_token
from tokeff.models.transformer import rms_norm


@dataclass(frozen=True)
class Probe(Chained, Drafter):
    """Head i names the token i + 2 behind the node whose features it reads: the last accepted one, as it left `layer`."""

    layer: int
    length: int

    @property
    def taps(self):
        return (self.layer,)

    def weights(self, cfg, clever: bool = True) -> dict[str, jax.Array]:
        """heads_YVD, random; or the model's own head with its rows moved along the successors towards which that leans."""
        head, (_, successor) = np.asarray(tiny.params(cfg, "float64").head_VD), tiny.weights(cfg)
        rows, heads = np.arange(cfg.V), []
        for _ in range(self.length):
            rows = successor[rows]
            heads.append(np.empty_like(head))
            heads[-1][rows] = head
        random = np.random.default_rng(3).normal(size=(self.length, *head.shape))
        return {"heads_YVD": jnp.asarray(np.stack(heads) if clever else random)}

    def prepare(self, m, tokens_BT, length_B, new):
        return jnp.zeros((tokens_BT.shape[0], m.cfg.D), m.precision.activations)

    def draft(self, s, target):
        x = rms_norm(s.drafter, target.params.norm_D, target.cfg.eps)
        named = jnp.argmax(jnp.einsum("bd,yvd->byv", x, target.params.side["probe"]["heads_YVD"]), axis=-1).astype(jnp.int32)
        return tree_of((0, *range(self.length)), jnp.concatenate([last_token(s.tokens_BS, s.count_B), named], axis=1)), s

    def observe(self, state, draft, result):
        last = jnp.take_along_axis(result.path_BW, jnp.maximum(result.count_B - 1, 0)[:, None], axis=1)
        return jnp.take_along_axis(result.taps[self.layer], last[..., None], axis=1)[:, 0]
