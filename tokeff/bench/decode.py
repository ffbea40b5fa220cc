"""`tokeff bench decode`: tokens a second by method and context, next to what reading weights and cache must take.

The floor of a step is (bytes of weights + bytes of cache it reads) / read bandwidth, the bandwidth measured in the same
interleaved run. Cached rows are random: speed does not depend on what they hold. Ratios to transformers compare one token at a
time on the same weights and threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff import listing
from tokeff.bench import common
from tokeff.bench.common import READ_BYTES, bandwidth, interleave, ratio
from tokeff.bench.peer import Peer, peer
from tokeff.decode.draft import Drafter, Plain
from tokeff.decode.loop import Decoding, run
from tokeff.errors import UserError, nearest
from tokeff.evals.cost import dense_bytes, read_bytes
from tokeff.generation import Setup, decoding
from tokeff.kv.extend import pack
from tokeff.kv.policy import Policy, Prefilled
from tokeff.models.load import Model

CONTEXTS = (2048, 8192)
METHODS = ("Full", "SnapKV", "H2O")
PEER = "transformers"
SHOWN = (
    "method", "context", "tokens_per_s", "floor_tokens_per_s", "of_floor", "of_dense", "of_transformers", "cache_read_mb",
    "slowest_of_fastest",
)  # fmt: skip


def rows_of(m: Model, policy: Policy, n: int, seed: int = 0) -> tuple[Prefilled, ...]:
    """A prefill of n rows that holds random numbers."""
    cfg, rng = m.cfg, np.random.default_rng(seed)

    def rows():
        return jnp.asarray(rng.standard_normal((1, cfg.K, n, cfg.H), np.float32), m.precision.cache)

    def noted(like):
        random = rng.integers(0, cfg.V, like.shape) if jnp.issubdtype(like.dtype, jnp.integer) else rng.random(like.shape)
        return jnp.asarray(random, like.dtype)

    evidence = {ask: jax.tree.map(noted, ask.like(1, n, cfg)) for ask in policy.needs()}
    order = jnp.arange(n, dtype=jnp.int32)[None, None]
    return tuple(Prefilled(rows(), rows(), order, jnp.array([n], jnp.int32), jnp.int32(i), evidence) for i in range(cfg.L))


class Loop:
    """The compiled decode loop of one combination on a random context. Calling it gives the seconds of one model pass.

    A context of c ends at c: it is made of c - steps - 1 rows and what is generated behind them. Every call starts again.
    """

    def __init__(self, m: Model, policy: Policy, context: int, steps: int, drafter: Drafter | None = None):
        policy, n = policy.fit(m), context - steps - 1
        setup = Setup(policy, None, drafter or Plain())
        policy.check(dataclasses.replace(m.cfg, max_len=2 * m.cfg.max_len), n)  # nothing is prefilled, so nothing is told a second time
        self.layers = pack(policy, rows_of(m, policy, n), setup.room(steps + 1), m.cfg)
        length = jnp.array([n], jnp.int32)
        tokens, logits = jnp.zeros((1, n), jnp.int32), jnp.zeros((1, m.cfg.V), jnp.float32)
        self.start = decoding(self.layers, tokens, length, length, logits, setup, steps + 1, 0, ())
        self.params, self.steps, self.read = m.params, jnp.int32(steps), read_bytes(setup, self.layers, m.cfg)
        args = dict(policy=policy.onward(), drafter=setup.decode, how=setup.sampling, eos=())
        self.program = run.lower(m.params, m.cfg, self.start, self.steps, **args).compile()

    def __call__(self) -> float:
        fresh: Decoding = jax.block_until_ready(jax.tree.map(jnp.copy, self.start))  # the loop consumes its state
        ends: list[Decoding] = []
        took = common.timed(lambda: ends.append(self.program(self.params, fresh, self.steps)) or ends[0].tokens_BS)()
        return took / int(ends[0].passes_B[0])


def policies(names: Sequence[str], budget: float) -> dict[str, Policy]:
    """Listed cache policies by name, at one budget."""
    known = {method.name: method for method in listing.methods() if method.part == "kv"}
    for name in names:
        if name not in known:
            raise UserError(f"no cache policy {name!r}; {nearest(name, known)}")
    return {n: known[n].make(**({"budget": budget} if known[n].budgeted_by else {})) for n in names}


def rows(
    m: Model, contexts: Sequence[int], methods: Sequence[str], *, budget: float = 0.1, tokens: int = 16, rounds: int = 7,
    other: Peer | None = None, nbytes: int = READ_BYTES,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row a context and method. Dense decoding and transformers take part in every context, listed or not."""
    chosen, found = policies(["Full", *methods], budget), []
    for context in contexts:
        loops = {name: Loop(m, policy, context, tokens) for name, policy in chosen.items()}
        timers = {**loops, **common.reads(nbytes)}
        if other is not None:
            n = context - tokens - 1
            timers[PEER] = lambda n=n: other.decode(n, tokens) / tokens
        seconds = interleave(timers, rounds, f"decode {context}")
        found += [_row(m, name, context, loops[name], seconds, bandwidth(seconds, nbytes)) for name in methods]
    return found


def _row(m: Model, name: str, context: int, loop: Loop, seconds: dict[str, list[float]], per_second: float) -> dict[str, Any]:
    took, floor = seconds[name], (common.weight_bytes(m) + loop.read) / per_second
    theirs = seconds.get(PEER)
    return {
        "method": name,
        "context": context,
        "tokens_per_s": 1 / median(took),
        "floor_tokens_per_s": 1 / floor,
        "of_floor": floor / median(took),
        "of_dense": ratio(seconds["Full"], took),
        "of_transformers": ratio(theirs, took) if theirs else None,
        "transformers_tokens_per_s": 1 / median(theirs) if theirs else None,
        "cache_read_mb": loop.read / 1e6,
        "cache_read_of_dense": loop.read / dense_bytes(m.cfg, context, m.precision.cache),
        "weights_mb": common.weight_bytes(m) / 1e6,
        "bandwidth_gb_per_s": per_second / 1e9,
        "slowest_of_fastest": max(took) / min(took),
        "rounds": len(took),
    }


def main(args: list[str]) -> None:
    """Command line."""
    p = common.parser("decode", "Decode tokens/s against the bandwidth floor and against transformers.", rounds=7)
    common.model_options(p, CONTEXTS)
    p.add_argument("--methods", nargs="+", default=list(METHODS), help=f"cache policies (default: {' '.join(METHODS)})")
    p.add_argument("--budget", type=float, default=0.1, help="share of rows that budgeted methods keep (default: %(default)s)")
    p.add_argument("--tokens", type=common.positive, default=16, help="tokens of each timing (default: %(default)s)")
    known = p.parse_args(args)
    policies(known.methods, known.budget)
    common.check_out(known.out)
    m = common.open_model(known.model, known.contexts, known.tokens + 16)
    with peer(m, not known.no_peer) as other:
        found = rows(
            m, known.contexts, known.methods, budget=known.budget, tokens=known.tokens, rounds=known.rounds, other=other
        )
    common.finish("decode", found, known.out, args, SHOWN)
