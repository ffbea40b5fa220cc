"""`tokeff bench verify-cost`: what a pass over n draft rows costs, as T(n) / T(1).

That ratio is how many tokens a pass must commit before drafting pays. The drafts are wrong on purpose, so every pass commits one
token and all widths decode the same context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax.numpy as jnp

from tokeff.bench import common
from tokeff.bench.common import READ_BYTES, bandwidth, interleave, ratio
from tokeff.bench.decode import Loop
from tokeff.decode.draft import Draft, Drafter, Plain, last_token
from tokeff.kv.policy import Full
from tokeff.models.load import Model

WIDTHS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Chain(Drafter):
    """A chain of `width` nodes that follow the last token by number: hardly ever what a model says."""

    width: int

    @property
    def nodes(self) -> int:
        return self.width

    @property
    def depth(self) -> int:
        return self.width - 1

    def propose(self, state, tokens_BS, count_B) -> Draft:
        i = jnp.arange(self.width)[None]
        tokens = last_token(tokens_BS, count_B) + i
        parent = jnp.broadcast_to(jnp.maximum(i - 1, 0), tokens.shape)
        return Draft(tokens, parent, jnp.ones(tokens.shape, bool))


def rows(
    m: Model, contexts: Sequence[int], widths: Sequence[int] = WIDTHS, *, passes: int = 8, rounds: int = 7, nbytes: int = READ_BYTES
) -> list[dict[str, Any]]:
    """One row a context and width."""
    found = []
    for context in contexts:
        wide = {n: Loop(m, Full(), context, passes, Plain() if n == 1 else Chain(n)) for n in dict.fromkeys((1, *widths))}
        seconds = interleave({**{str(n): loop for n, loop in wide.items()}, **common.reads(nbytes)}, rounds, f"verify {context}")
        per_second = bandwidth(seconds, nbytes)
        for n in widths:
            took, floor = seconds[str(n)], (common.weight_bytes(m) + wide[n].read) / per_second
            found.append({
                "context": context,
                "rows": n,
                "ms_per_pass": median(took) * 1e3,
                "of_one_row": ratio(took, seconds["1"]),
                "read_floor_ms": floor * 1e3,
                "of_read_floor": floor / median(took),
                "bandwidth_gb_per_s": per_second / 1e9,
                "rounds": len(took),
            })  # fmt: skip
    return found


def main(args: list[str]) -> None:
    """Command line."""
    p = common.parser("verify-cost", "What a pass over n draft rows costs, as T(n)/T(1).", rounds=7)
    common.model_options(p, (512,), peer=False)
    p.add_argument("--widths", type=common.positive, nargs="+", default=list(WIDTHS), help="rows of a pass")
    p.add_argument("--passes", type=common.positive, default=8, help="passes of each timing (default: %(default)s)")
    known = p.parse_args(args)
    common.check_out(known.out)
    m = common.open_model(known.model, known.contexts, known.passes + 16)
    found = rows(m, known.contexts, known.widths, passes=known.passes, rounds=known.rounds)
    common.finish("verify-cost", found, known.out, args)
