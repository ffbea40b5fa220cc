"""What a text model loses and gains under a pass: answers, loss and divergence on real text, and seconds of a prefill in turns with the
dense one. The text part of `tokeff.evals.reduction`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.bench import common
from tokeff.data import tasks
from tokeff.data.haystack import encoder
from tokeff.evals import mean_rows
from tokeff.evals.cost import dense_bytes
from tokeff.evals.fidelity import Quality, Reader, encode_example
from tokeff.evals.leaderboard import Batch, ahead
from tokeff.evals.mean_rows import Family, Placed
from tokeff.evals.stats import mean, perplexity
from tokeff.generation import Setup, start
from tokeff.kv.extend import pack
from tokeff.kv.policy import tree_bytes
from tokeff.kv.prefill import Prompt, prefill
from tokeff.listing import Method, find, methods
from tokeff.models.load import Model
from tokeff.models.transformer import Pass
from tokeff.reduce.cascade import LastRowCascade
from tokeff.reduce.methods import shrinking
from tokeff.reduce.pass_baselines import PooledRows, RandomRows

FULL, STAGED = "Full", "Random in stages"


def families() -> tuple[Family, ...]:
    """Every listed pass, and three that do not look: rows at random in the first layer, at random at LazyLLM's stages, and pooled rows."""
    listed = [of_listed(m) for m in methods() if m.part == "cut"]
    lazy = find("LazyLLM").build()
    assert isinstance(lazy, LastRowCascade)
    return (
        *listed,
        Family("Random", lambda _, b: RandomRows((0,), (b,)), baseline=True),
        Family(STAGED, lambda layers, b: RandomRows(layers, shrinking(b, layers)), lazy.at, baseline=True),
        Family("Pooled", lambda _, b: PooledRows(keep=(b,)), baseline=True),
    )


def of_listed(m: Method) -> Family:
    """A listed pass with its budget for a knob, its other settings the default ones."""
    given, baseline = m.settings(), m.family == "baseline"
    if "layer" in given:
        return Family(m.name, lambda layers, b: m.build(budget=b, layer=layers[0]), (given["layer"],), baseline)
    if "at" in given:
        return Family(m.name, lambda layers, b: m.build(budget=b, at=layers), given["at"], baseline)
    return Family(m.name, lambda _, b: m.build(budget=b), (), baseline)


@dataclass(eq=False)
class Reading:
    """The model, and the texts being read; only one batch is held at a time.

    timed: tokens of the prompt whose prefill is timed. rounds: how often.
    """

    m: Model
    batches: Sequence[Batch]
    timed: int
    rounds: int
    at: int | None = None
    reader: Reader | None = None
    full: list[Quality] | None = None

    def placed(self, method: str, share: float) -> Placed | None:
        """The pass of a row, at the share of the timed prompt; None for the full model."""
        if method == FULL:
            return None
        return mean_rows.place(next(f for f in families() if f.name == method), share, self.m.cfg, self.timed)

    def texts(self, i: int) -> tuple[Reader, list[Quality]]:
        """Batch i, and what the full model makes of it."""
        if self.at != i or self.reader is None or self.full is None:
            self.reader = self.full = None  # its prefills go before the next ones come
            b = self.batches[i]
            made = [tasks.make(b.task, b.seed + j, b.length, encoder(self.m.tok)) for j in range(b.n)]
            self.reader = Reader(self.m, *(ahead(encode_example(self.m, example), b.ahead) for example in made))
            self.full, self.at = self.reader.qualities(Setup()), i
        return self.reader, self.full

    def quality(self, cut: Pass | None, i: int) -> dict[str, Any]:
        """Quality on batch i; what differs by text is a list. `paired`: what texts are compared by, higher is better."""
        reader, base = self.texts(i)
        mine = base if cut is None else reader.qualities(Setup(cut=cut))
        kl = [float(q.kl(b).mean()) for q, b in zip(mine, base, strict=True)]
        return {
            "context": self.batches[i].length, "exact": [int(q.exact.sum()) for q in mine], "asked": [len(q.exact) for q in mine],
            "answer_logprob": [float(q.logprob.mean()) for q in mine if len(q.logprob)], "kl": kl, "paired": [-x for x in kl],
            "nll": [float(q.nll.sum()) for q in mine], "tokens": [len(q.nll) for q in mine],
            "top1_agree": [float(q.top1(b).mean()) for q, b in zip(mine, base, strict=True)],
        }  # fmt: skip

    def speed(self, cut: Pass | None) -> dict[str, Any]:
        """Seconds of a prompt's prefill and to its first token, the dense prefill taking turns; what it costs by counting; bytes held."""
        m, n, rng = self.m, self.timed, np.random.default_rng(self.timed)
        tokens, length = jnp.asarray(rng.integers(0, m.cfg.V, (1, n)), jnp.int32), jnp.asarray([n], jnp.int32)
        mine = Turn(m, tokens, length, cut)
        dense = mine if cut is None else Turn(m, tokens, length, None)
        seconds = common.interleave({"mine": mine} if dense is mine else {"dense": dense, "mine": mine}, self.rounds, "prefill")
        took, whole, prompt = seconds["mine"], seconds.get("dense", seconds["mine"]), mine.prompt
        assert prompt is not None
        held = tree_bytes(pack(Setup().kv, prompt.layers, Setup().room(1), m.cfg))
        work, full = (mean_rows.flops(c, m.cfg, n) for c in (cut, None))
        return {
            "timed": n, "prefill_s": median(took), "dense_prefill_s": median(whole), "speedup": common.ratio(whole, took),
            "first_token_s": median(mine.first_s[1:]),  # the first round compiles
            "first_token_speedup": common.ratio(dense.first_s[1:], mine.first_s[1:]),
            "tflops": work / 1e12, "flops": work / full, "kv_mib": held / 2**20, "held": held / dense_bytes(m.cfg, n, m.precision.cache),
        }  # fmt: skip


@dataclass(eq=False)
class Turn:
    """A timer of one prefill. first_s: seconds of each call until the first token, which the packed cache and the draw take besides."""

    m: Model
    tokens_BT: jax.Array
    length_B: jax.Array
    cut: Pass | None

    def __post_init__(self):
        self.first_s: list[float] = []
        self.prompt: Prompt | None = None

    def __call__(self) -> float:
        self.prompt, m = None, self.m
        begin = time.perf_counter()
        prompt = prefill(m.params, m.cfg, self.tokens_BT, self.length_B, cut=self.cut, dtype=m.precision.cache)
        jax.block_until_ready(prompt)
        took = time.perf_counter() - begin
        jax.block_until_ready(start(m, prompt, Setup(), 1))
        self.first_s.append(time.perf_counter() - begin)
        self.prompt = prompt
        return took


def averaged(parts: Sequence[dict[str, Any]], over: Callable[[list[float]], Any]) -> dict[str, Any]:
    """The batches of one row as one line. over: a list of figures by text as an interval."""
    if not (read := [part for part in parts if "kl" in part]):
        return {}

    def flat(name: str) -> list[float]:
        return [x for part in read for x in part[name]]

    said = perplexity(flat("nll"), flat("tokens"))
    found = {"context": read[0]["context"], "needles_exact": sum(flat("exact")), "n": sum(flat("asked")), "perplexity": said.value}
    found["top1_agree"] = mean(flat("top1_agree")).value
    for name in (name for name in ("kl", "answer_logprob") if flat(name)):
        value = over(flat(name))
        found |= {name: value.value}
        if value.n > 1:
            found |= {f"{name}_lo": value.low, f"{name}_hi": value.high, f"{name}_n": value.n}
    return found
