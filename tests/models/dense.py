"""A plain causal forward pass for tests: the decoder's own `stack` with a policy that keeps nothing between calls."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from tokeff.models.attention import flash
from tokeff.models.config import Config, Params
from tokeff.models.transformer import embed, stack, unembed


@dataclass(frozen=True)
class Causal:
    """Every row reads the rows of this call that are not after it and lie in its layer's window."""

    def role(self, layer):
        return None

    def attend(self, q_BTNH, k_BTKH, v_BTKH, ask, new, layer, accepted, across, here):
        q, k = here.rotate(q_BTNH, ask.angle_BT[..., None]), here.rotate(k_BTKH, new.angle_BT[..., None])
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v_BTKH, 1, 2)
        lo, cfg = here.lo(ask.order_BT), here.cfg
        out, _ = flash(q, k, v, lo, ask.hi_BT, new.order_BT[:, None], scale=cfg.scale, softcap=cfg.softcap)
        return out, layer, across


@partial(jax.jit, static_argnums=1)
def forward(params: Params, cfg: Config, tokens_BT: jax.Array) -> jax.Array:
    """float32 logits_BTV."""
    order = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    flow, *_ = stack(params, cfg, embed(params, cfg, tokens_BT, order), (None,) * cfg.L, policy=Causal())
    return unembed(params, cfg, flow.x_BTD)
