"""`tokeff bench end-to-end`: a model with its kernels and without, prefill and decoding, next to what must be read or multiplied.

Each setting is compiled twice: as the ops choose by themselves, and with one implementation forced on every op. Both take turns in one
run. What is left out is XLA's path on an accelerator, and on a CPU, where that path is what the ops choose, the plain float32 definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from tokeff.bench import common, prefill
from tokeff.bench.common import READ_BYTES, Timer, bandwidth, interleave, ratio
from tokeff.bench.decode import Loop
from tokeff.bench.verify_cost import Chain
from tokeff.decode.draft import Draft, Drafter, Plain, last_token
from tokeff.errors import UserError, nearest
from tokeff.kernels.bench import SIDE
from tokeff.kernels.dispatch import forced
from tokeff.kv.methods import kivi
from tokeff.kv.policy import Full, Policy
from tokeff.models.config import Config, Precision
from tokeff.models.layout import abstract
from tokeff.models.load import Model
from tokeff.sparse.methods import quest

WITHOUT = {"cpu": "reference", "other": "xla"}  # what is forced where the kernels are left out
CONTEXTS = {"cpu": (512, 2048), "other": (8192, 32768)}  # of a prefill, and of decoding
SHAPES = {
    "cpu": Config("smol-random", V=49152, D=576, F=1536, L=30, N=9, K=3, H=64, max_len=8192),
    "other": Config("8b-quarter-random", V=128256, D=4096, F=14336, L=8, N=32, K=8, H=128, max_len=2**17),
}
SHOWN = ("setting", "context", "ms", "without_ms", "speedup", "floor_ms", "of_floor", "slowest_of_fastest")


@dataclass(frozen=True)
class Tree(Chain):
    """A binary tree of `width` nodes, hardly any of which is what a model says."""

    @property
    def depth(self) -> int:
        return self.width.bit_length() - 1

    def propose(self, state, tokens_BS, count_B) -> Draft:
        i = jnp.arange(self.width)[None]
        tokens = last_token(tokens_BS, count_B) + i
        return Draft(tokens, jnp.broadcast_to(jnp.maximum((i - 1) // 2, 0), tokens.shape), jnp.ones(tokens.shape, bool))


def settings(share: float = 0.1, width: int = 16) -> dict[str, tuple[Policy, Drafter] | None]:
    """{name: (policy, drafter)}; None for the prefill. share: of the rows that selected pages hold. width: rows of a draft."""
    return {
        "prefill": None,
        "dense": (Full(), Plain()),
        "pages": (quest(share, dense=()), Plain()),
        "int8": (kivi(8), Plain()),
        "int4": (kivi(4), Plain()),
        "tree": (Full(), Tree(width)),
    }


def here(table: dict[str, Any]) -> Any:
    """The entry for this machine's device: 'cpu', or 'other'."""
    return table.get(jax.default_backend(), table["other"])


def random_model(cfg: Config, precision: Precision) -> Model:
    """A model of this shape with random weights: speed does not depend on what they are."""
    leaves, tree = jax.tree.flatten(abstract(cfg, precision))
    make = jax.jit(lambda key, like: 0.02 * jax.random.normal(key, like.shape, like.dtype), static_argnums=1)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return Model(cfg, jax.tree.unflatten(tree, [make(key, like) for key, like in zip(keys, leaves)]), None, precision, cfg.name)


def row(
    m: Model, setting: str, contexts: Sequence[int], *, without: str | None = None, steps: int = 8, rounds: int = 7,
    parts: dict[str, tuple[Policy, Drafter] | None] | None = None, nbytes: int | None = None, side: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure one setting.

    Args:
      setting: a name in `parts`.
      contexts: tokens of a prefill, and of the context that is decoded behind.
      without: the implementation that the other half is forced to, by default `WITHOUT`.
      steps: model passes of a timing.
      parts: as `settings` returns them.

    Returns:
      {setting, context, ms and without_ms of a prefill or of one model pass in decoding, speedup (the median of without / with over
      the rounds), floor_ms (bytes of weights and cache by the bandwidth; of a prefill, its operations by those of a large matrix
      product, both measured in the same run), of_floor (floor_ms / ms), ...}.
    """
    policy_drafter, without = (parts or settings())[setting], without or here(WITHOUT)
    context, ways = contexts[policy_drafter is not None], {"with": None, "without": without}
    nbytes, square = nbytes or READ_BYTES, int(side or here(SIDE))
    if policy_drafter is None:
        timers = {name: _within(way, prefill.whole(m, context, ())) for name, way in ways.items()}
        floors = {"product": product(m.precision.weights, square)}
        work = flops(m.cfg, context) / (2 * square**3)  # in products
    else:
        timers, floors = {name: _loop(way, m, *policy_drafter, context, steps) for name, way in ways.items()}, common.reads(nbytes)
        work = common.weight_bytes(m) + timers["with"].read
    seconds = interleave({**timers, **floors}, rounds, setting)
    floor = work * min(seconds["product"]) if policy_drafter is None else work / bandwidth(seconds, nbytes)
    took = seconds["with"]
    return {
        "op": "end-to-end",  # for the file of a device, whose rows are told apart by op and case
        "case": setting,
        "setting": setting,
        "model": m.name,
        "context": context,
        "ms": median(took) * 1e3,
        "without_ms": median(seconds["without"]) * 1e3,
        "without": without,
        "speedup": ratio(seconds["without"], took),
        "floor_ms": floor * 1e3,
        "of_floor": floor / median(took),
        "slowest_of_fastest": max(took) / min(took),
        "rounds": rounds,
    }


def flops(cfg: Config, rows: int) -> float:
    """Floating-point operations of a prefill: a product with every weight but the embedding's, and attention to the rows before."""
    block = 2 * cfg.D * cfg.H * (cfg.N + cfg.K) + 3 * cfg.D * cfg.F
    return 2.0 * rows * cfg.L * block + 2.0 * cfg.V * cfg.D + 2.0 * cfg.L * cfg.N * cfg.H * rows * (rows + 1)


def product(dtype: str, side: int) -> Timer:
    """A timer of one product of two square matrices."""
    x = jnp.ones((side, side), dtype)
    return common.timed(jax.jit(jnp.matmul), x, x)


def _forced(implementation: str | None) -> Any:
    return nullcontext() if implementation is None else forced(implementation)


def _within(implementation: str | None, timer: Callable[[], float]) -> Timer:
    """A timer that runs with every op forced to an implementation."""

    def run() -> float:
        with _forced(implementation):
            return timer()

    return run


def _loop(implementation: str | None, m: Model, policy: Policy, drafter: Drafter, context: int, steps: int) -> Loop:
    with _forced(implementation):
        return Loop(m, policy, context, steps, drafter)


def main(args: list[str]) -> None:
    """Command line."""
    p = common.parser("end-to-end", "Prefill and decoding of a model with its kernels and without.", rounds=7)
    p.add_argument("--model", help=f"what tokeff.load takes (default: random weights in the shape {here(SHAPES).name})")
    p.add_argument("--settings", nargs="+", default=list(settings()), help=f"which (default: {', '.join(settings())})")
    p.add_argument("--contexts", type=common.positive, nargs=2, default=here(CONTEXTS), help="of a prefill, and of decoding")
    p.add_argument("--without", choices=("xla", "reference"), default=here(WITHOUT), help="forced instead (default: %(default)s)")
    p.add_argument("--share", type=float, default=0.1, help="share of the rows in selected pages (default: %(default)s)")
    p.add_argument("--tree", type=common.positive, default=16, help="rows of a draft (default: %(default)s)")
    p.add_argument("--tokens", type=common.positive, default=8, help="model passes of each timing (default: %(default)s)")
    known = p.parse_args(args)
    parts = settings(known.share, known.tree)
    for name in known.settings:
        if name not in parts:
            raise UserError(f"no setting {name!r}; {nearest(name, parts)}")
    common.check_out(known.out)
    if known.model is None:
        m = random_model(here(SHAPES), Precision.default())
    else:
        m = common.open_model(known.model, known.contexts, known.tokens + 16)
    how = dict(without=known.without, steps=known.tokens, rounds=known.rounds, parts=parts)
    found = [row(m, name, known.contexts, **how) for name in known.settings]
    common.finish("end-to-end", found, known.out, args, SHOWN)
