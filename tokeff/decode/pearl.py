"""PEARL (Liu et al. 2024): the draft model and the target run at the same time, each on its own devices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

from tokeff.decode.draft import Draft, last_token
from tokeff.decode.draft_model import FULL, OwnModel, onto
from tokeff.decode.sample import Sampling, draw
from tokeff.decode.self_draft import chain_parents
from tokeff.errors import UserError
from tokeff.kv.cache import Rows
from tokeff.models.config import Config
from tokeff.models.transformer import embed, stack, unembed
from tokeff.sharding import beside

if TYPE_CHECKING:
    from tokeff.decode.loop import Decoding


class Ahead(struct.PyTreeNode):
    """The draft model's side: its cache, and the last token it wrote with that token's order. A slot is an order, so rows behind a token
    that was refused are simply written over."""

    layers: tuple[Rows, ...]
    token_B: jax.Array
    order_B: jax.Array


class Pending(struct.PyTreeNode):
    """The target's side: drafts behind the text that are not verified. count_B: all of them, or none where the last turn refused one."""

    tokens_BW: jax.Array
    count_B: jax.Array


class Told(struct.PyTreeNode):
    """What the draft model must know of the last turn: whether it may go on, else the token to start from and its order."""

    on_B: jax.Array
    token_B: jax.Array
    order_B: jax.Array


@dataclass(frozen=True)
class Pearl(OwnModel):
    """Draft and target at the same time (PEARL, Liu et al. 2024).

    In each turn the draft model writes its next `length` tokens while the target verifies the ones before. When all were right, and the
    token behind them is the first of the new ones, the others are pending and the draft model just goes on (post-verify). Else it starts
    anew from the text, and the target's next pass, over one row, says what the first of its new drafts is worth (pre-verify). The best
    `length` is the ratio of the times that a target's pass and a draft row take.

    The draft model may lie on other devices: place its weights there before they are attached. Only tokens and orders go across. Drafts are
    draws with the target's noise, so the text is plain decoding's, greedy or sampled; the paper resamples where it refuses.
    """

    def __post_init__(self):
        if self.length < 2:
            raise UserError(f"length={self.length} leaves no draft to verify behind the one that is checked first; give 2 or more")
        if not self.rule.same:
            raise UserError("what is exchanged are tokens, not their laws; leave out rule")

    @property
    def nodes(self) -> int:
        return self.length

    @property
    def depth(self) -> int:
        return self.length - 1

    def prepare(self, m, tokens_BT, length_B, new) -> tuple[Ahead, Pending]:
        B = tokens_BT.shape[0]
        layers = self.read(m, tokens_BT, length_B, new, more=2 * self.length)  # drafts may pass the limit
        ahead = Ahead(layers, jnp.zeros(B, jnp.int32), jnp.zeros(B, jnp.int32))
        return ahead, Pending(jnp.zeros((B, self.depth), jnp.int32), jnp.zeros(B, jnp.int32))

    def drive(self, params, cfg, s: Decoding, steps: int, *, policy, how, eos) -> Decoding:
        """Both sides of a turn are dispatched before either is waited for, and whether all rows are done is asked a turn late."""
        side = dict(params.side or {})
        own, params = side.pop(self.name), params.replace(side=side)
        (ahead, pending), s = s.drafter, s.replace(drafter=())
        ahead, fixed = onto(own, ahead), onto(own, {"key_B": jnp.copy(s.key_B), "gone_B": jnp.copy(s.gone_B)})
        over = s.done_B.all()
        for _ in range(steps):
            told = onto(own, _told(s.tokens_BS, s.count_B, pending.count_B))
            with beside(own):
                more, ahead = _write(own, ahead, told, **fixed, cfg=self.cfg, length=self.length, how=how)
            s, grown_B, now = _verify(params, s, pending, cfg=cfg, policy=policy, drafter=self, how=how, eos=eos)
            pending = _agreed(s.tokens_BS, s.count_B, s.done_B, pending.count_B, grown_B, **onto(params, more))
            if bool(over):
                break
            over = now
        return s.replace(drafter=(ahead, pending))


@jax.jit
def _told(tokens_BS, count_B, pending_B) -> Told:
    return Told(pending_B > 0, last_token(tokens_BS, count_B)[:, 0], count_B - 1)


@partial(jax.jit, static_argnames=("cfg", "length", "how"), donate_argnames="ahead")
def _write(own, ahead: Ahead, told: Told, key_B, gone_B, *, cfg: Config, length: int, how: Sampling):
    """The next `length` tokens of the draft model, in certain rows: it believes itself until told otherwise."""
    token_B, order_B = (jnp.where(told.on_B, a, b) for a, b in ((ahead.token_B, told.token_B), (ahead.order_B, told.order_B)))
    layers = tuple(layer.replace(live_B=order_B) for layer in ahead.layers)

    def one(i, carry):
        layers, token_B, more_BW = carry
        order = (order_B + i)[:, None]
        flow, layers, _ = stack(own, cfg, embed(own, cfg, token_B[:, None], order), layers, policy=FULL)
        token_B = draw(unembed(own, cfg, flow.x_BTD), order + 1 - gone_B[:, None], key_B, how)[:, 0]
        return layers, token_B, more_BW.at[:, i].set(token_B)

    none = jnp.zeros((token_B.shape[0], length), jnp.int32)
    layers, token_B, more_BW = jax.lax.fori_loop(0, length, one, (layers, token_B, none))
    return {"more_BW": more_BW}, Ahead(layers, token_B, order_B + length)


@partial(jax.jit, static_argnames=("cfg", "policy", "drafter", "how", "eos"), donate_argnames="s")
def _verify(params, s: Decoding, pending: Pending, *, cfg, policy, drafter: Pearl, how: Sampling, eos):
    """(the target's pass over what is pending, how many tokens came of it, whether all rows are done)."""
    from tokeff.decode.loop import verify

    root = last_token(s.tokens_BS, s.count_B)
    tokens = jnp.concatenate([root, pending.tokens_BW], axis=1)
    valid = jnp.arange(tokens.shape[1]) <= pending.count_B[:, None]
    draft = Draft(tokens, chain_parents(drafter.depth, root.shape[0]), valid)
    after = verify(params, cfg, s, draft, policy, drafter, how, eos)
    return after, after.count_B - s.count_B, after.done_B.all()


@jax.jit
def _agreed(tokens_BS, count_B, done_B, pending_B, grown_B, more_BW) -> Pending:
    """What is pending now: the new drafts but the first, where that is the token behind drafts that were all right."""
    right = ~done_B & (grown_B == pending_B + 1) & (more_BW[:, 0] == last_token(tokens_BS, count_B)[:, 0])
    return Pending(more_BW[:, 1:], jnp.where(right, more_BW.shape[1] - 1, 0))
