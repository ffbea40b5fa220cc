"""KVShare, our reading: a prompt from the cache of an earlier one that says nearly the same (Yang et al. 2025).

The two prompts are aligned token by token. Rows of tokens that both have are taken over, their keys turned to the new places; rows of
changed tokens, those of taken rows that deviate most, and the end of the prompt are computed, as in kv/blend.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.kv.blend import Loaded, Recompute, fuse, turned
from tokeff.kv.evidence import Evidence
from tokeff.kv.policy import Prefilled
from tokeff.kv.prefill import Gather, Prompt, prefill
from tokeff.models.flow import EMPTY, Here
from tokeff.models.transformer import alike, orders

if TYPE_CHECKING:
    from tokeff.models.load import Model


@dataclass(frozen=True)
class Similar(Recompute):
    """The rows of an earlier prompt, where the two prompts agree in runs of at least `block` tokens (Yang et al. 2025, prefill stage).

    earlier: the ids of that prompt, prefilled as part of this prefill; a server has its cache, which `reuse` takes as given. The paper also
    corrects rows while decoding and schedules requests by what they can reuse; neither is here. Without an earlier prompt, or with one that
    shares nothing, this is the dense prefill.
    """

    earlier: tuple[int, ...] = ()

    def check(self, cfg, length: int) -> None:
        super().check(cfg, length)
        if any(not 0 <= t < cfg.V for t in self.earlier) or len(self.earlier) > cfg.max_len:
            raise UserError(f"earlier must be at most {cfg.max_len} token ids, 0 to {cfg.V - 1} in {cfg.name}")

    def load(self, params, cfg, tokens_BT: jax.Array, length_B: jax.Array, dtype: str) -> Loaded:
        earlier = self.earlier or (0,)
        T = -(-len(earlier) // 64) * 64
        tokens = jnp.asarray([(*earlier, *[0] * (T - len(earlier)))], jnp.int32)
        there = prefill(params, cfg, tokens, jnp.asarray([len(self.earlier)], jnp.int32), dtype=dtype)
        return take(self, cfg, there, tokens_BT, length_B)


def align(earlier: Sequence[int], ids: Sequence[int], least: int) -> np.ndarray:
    """source_S: for each token of `ids` the place of the same token in `earlier`, EMPTY for none. Places ascend; runs shorter than
    `least` tokens are not taken."""
    source = np.full(len(ids), EMPTY, np.int32)
    for a, b, size in SequenceMatcher(None, list(earlier), list(ids), autojunk=False).get_matching_blocks():
        if size >= least:
            source[b : b + size] = np.arange(a, a + size)
    return source


def take(how: Similar, cfg, earlier: Prompt, tokens_BT: jax.Array, length_B: jax.Array) -> Loaded:
    """What these prompts take over from the earlier one."""
    known = np.asarray(earlier.tokens_BT)[0, : int(earlier.length_B[0])].tolist()
    source = np.full(tokens_BT.shape, EMPTY, np.int32)
    for row, ids, n in zip(source, np.asarray(tokens_BT), np.asarray(length_B), strict=True):
        row[:n] = align(known, ids[:n].tolist(), how.block)
    order, taken = orders(length_B, source.shape[1]), jnp.asarray(source)
    sure = (order != EMPTY) & ((taken == EMPTY) | how.last(order, length_B))
    layers = tuple(_taken(layer, taken, length_B, here=Here(alike(Gather(), None, cfg, i), cfg)) for i, layer in enumerate(earlier.layers))
    most = int(sure.sum(axis=1).max())
    return Loaded(layers, sure, min(-(-most // 64) * 64, source.shape[1]))  # in steps, so that prompts share compiled code


@partial(jax.jit, static_argnames="here")
def _taken(layer: Prefilled, source_BT: jax.Array, length_B: jax.Array, *, here: Here) -> Prefilled:
    """One layer of the rows named in `source`, at their new places."""
    at = jnp.maximum(source_BT, 0)

    def rows(x_1KSH):
        return jnp.moveaxis(jnp.take(x_1KSH[0], at, axis=1), 1, 0)

    k = turned(rows(layer.k_BKSH), at[:, None], jnp.arange(at.shape[1]), here)
    order = orders(length_B, at.shape[1])[:, None]
    return layer.replace(k_BKSH=k, v_BKSH=rows(layer.v_BKSH), order_BKS=order, length_B=length_B)


def reuse(
    m: Model, earlier: Prompt, ids: Sequence[int], how: Similar | None = None, evidence: tuple[Evidence, ...] = ()
) -> Prompt:  # fmt: skip
    """The prompt `ids` from the cache of an earlier one (`tokeff.generation.read(m, [its ids], Setup())`), which stays as it is.

    how: its `share`, `layer`, `dense` and `block`. Any policy packs the result. Raises UserError for no ids, or several earlier prompts.
    """
    how = Similar(8, 1) if how is None else how
    if not len(ids):
        raise UserError("the prompt is empty; give at least one token")
    if earlier.tokens_BT.shape[0] != 1:
        raise UserError("the earlier prefill holds several prompts; give the one to take rows from")
    how.check(m.cfg, len(ids))
    T = -(-len(ids) // 64) * 64
    tokens, length_B = jnp.asarray([[*ids, *[0] * (T - len(ids))]], jnp.int32), jnp.asarray([len(ids)], jnp.int32)
    return fuse(m.params, m.cfg, tokens, length_B, take(how, m.cfg, earlier, tokens, length_B), how, evidence, m.precision.cache)
