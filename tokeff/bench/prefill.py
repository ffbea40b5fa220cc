"""`tokeff bench prefill`: seconds to read a prompt, next to transformers on the same weights, and what evidence adds.

Evidence is what a policy asks the prefill for: the mass of a window of last queries (SnapKV) or of every query (H2O). The
second is one more pass over the keys per layer, so it is given as a multiple of the attention of the same layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.bench import common
from tokeff.bench.common import Timer, interleave, ratio
from tokeff.bench.peer import Peer, peer
from tokeff.kernels import column_mass
from tokeff.kv.policy import Ask
from tokeff.kv.prefill import prefill
from tokeff.models.attention import flash
from tokeff.models.load import Model

CONTEXTS = (512, 2048, 4096)
WINDOW = 16
PEER = "transformers"


def whole(m: Model, context: int, evidence: tuple[Ask, ...]) -> Timer:
    """A timer of one prefill."""
    rng, length = np.random.default_rng(context), jnp.array([context], jnp.int32)
    tokens = jnp.asarray(rng.integers(0, m.cfg.V, (1, context)), jnp.int32)
    return common.timed(lambda: prefill(m.params, m.cfg, tokens, length, evidence=evidence, dtype=m.precision.cache))


def parts(m: Model, context: int) -> dict[str, Timer]:
    """Timers of one layer's attention and of its column mass, on random rows."""
    cfg, rng = m.cfg, np.random.default_rng(context)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32), m.precision.cache)

    q, k, v = normal(1, context, cfg.N, cfg.H), normal(1, cfg.K, context, cfg.H), normal(1, cfg.K, context, cfg.H)
    hi = jnp.arange(context, dtype=jnp.int32)[None]
    lo, weight = jnp.zeros_like(hi), jnp.ones(hi.shape, jnp.float32)
    stored = jnp.broadcast_to(hi[:, None], (1, cfg.K, context))
    attend = jax.jit(lambda q, k, v: flash(q, k, v, lo, hi, hi[:, None], scale=cfg.scale, softcap=cfg.softcap, first=0))
    lse = attend(q, k, v)[1]
    mass = jax.jit(lambda q, k, lse: column_mass(q, k, lse, stored, lo, hi, weight, scale=cfg.scale, softcap=cfg.softcap))
    return {"attention": common.timed(attend, q, k, v), "mass": common.timed(mass, q, k, lse)}


def rows(m: Model, contexts: Sequence[int], *, rounds: int = 3, other: Peer | None = None) -> list[dict[str, Any]]:
    """One row a context."""
    found = []
    for context in contexts:
        timers = {
            "plain": whole(m, context, ()),
            "window": whole(m, context, (Ask(WINDOW),)),
            "all": whole(m, context, (Ask(),)),
            **parts(m, context),
        }
        if other is not None:
            timers[PEER] = lambda n=context: other.prefill(n)
        found.append(_row(m, context, interleave(timers, rounds, f"prefill {context}")))
    return found


def _row(m: Model, context: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    plain, theirs = seconds["plain"], seconds.get(PEER)
    return {
        "context": context,
        "seconds": median(plain),
        "tokens_per_s": context / median(plain),
        "of_transformers": ratio(theirs, plain) if theirs else None,
        "transformers_seconds": median(theirs) if theirs else None,
        "window_adds": ratio(seconds["window"], plain) - 1,
        "mass_adds": ratio(seconds["all"], plain) - 1,
        "mass_of_attention": ratio(seconds["mass"], seconds["attention"]),
        "attention_seconds": median(seconds["attention"]) * m.cfg.L,
        "rounds": len(plain),
    }


def main(args: list[str]) -> None:
    """Command line."""
    p = common.parser("prefill", "Prefill seconds, against transformers, and what evidence adds.", rounds=3)
    common.model_options(p, CONTEXTS)
    known = p.parse_args(args)
    common.check_out(known.out)
    m = common.open_model(known.model, known.contexts)
    with peer(m, not known.no_peer) as other:
        found = rows(m, known.contexts, rounds=known.rounds, other=other)
    common.finish("prefill", found, known.out, args)
