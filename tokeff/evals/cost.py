"""What one combination of parts costs in bytes and seconds: held, read, peak; prefill seconds, tokens per second."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.decode.loop import Decoding, run
from tokeff.generation import Setup, decoding, new_tokens
from tokeff.kv.extend import pack
from tokeff.kv.policy import tree_bytes
from tokeff.kv.prefill import Prompt, prefill
from tokeff.models.config import Config
from tokeff.models.flow import EMPTY, Here
from tokeff.models.load import Model
from tokeff.sparse.pattern import Pattern, own_blocks


def dense_bytes(cfg: Config, rows: int, dtype: str) -> int:
    """Bytes of K and V of `rows` tokens in every layer: what all ratios are ratios to."""
    return 2 * cfg.L * cfg.K * cfg.H * rows * np.dtype(jnp.dtype(dtype)).itemsize


@dataclass(frozen=True)
class Ratios:
    """held: every array of the caches after the prompt, spare slots, statistics and the drafter's tables included. read: bytes of
    the caches that one decode step reads. peak: what the compiled decode program needs beside the weights. All over `dense_bytes`
    of the prompt."""

    held: float
    read: float
    peak: float


@dataclass(frozen=True)
class Timing:
    """Decoding after warm-up: generated tokens, model passes, seconds of the fastest of the runs."""

    tokens: list[int]
    passes: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return (len(self.tokens) - 1) / self.seconds  # the first token came from the prefill


def read_bytes(setup: Setup, layers: tuple[Any, ...], cfg: Config) -> int:
    return sum(setup.kv.bytes_read(layer, Here(i, cfg)) for i, layer in enumerate(layers))


def cost(m: Model, prompt: Prompt, setup: Setup, new: int, runs: int = 1) -> tuple[Ratios, Timing, tuple[Any, ...]]:
    """Pack the prompt, measure its bytes, and time `new` greedy tokens. Returns the packed layers too."""
    cfg, steps = m.cfg, jnp.int32(new)
    layers = jax.block_until_ready(pack(setup.kv, prompt.layers, setup.room(new), cfg))
    state = setup.decode.prepare(m, prompt.tokens_BT, prompt.length_B, new)
    args = dict(policy=setup.kv.onward(), drafter=setup.decode, how=setup.sampling, eos=())

    def begin() -> Decoding:
        # A copy, because the loop consumes its state in place.
        s = decoding(layers, prompt.tokens_BT, prompt.length_B, prompt.next_B, prompt.logits_BV, setup, new, 0, (), state)
        return jax.block_until_ready(jax.tree.map(jnp.copy, s))

    program = run.lower(m.params, cfg, begin(), steps, **args).compile()
    jax.block_until_ready(program(m.params, begin(), jnp.int32(4)))  # warms up
    ends = [_timed(program, m.params, begin(), steps) for _ in range(runs)]
    end = ends[-1][1]
    base = dense_bytes(cfg, int(prompt.length_B[0]), m.precision.cache)
    ratios = Ratios(tree_bytes((layers, end.drafter)) / base, read_bytes(setup, layers, cfg) / base, peak_bytes(program, m.params) / base)
    return ratios, Timing(new_tokens(end)[0], int(end.passes_B[0]), min(s for s, _ in ends)), layers


def pattern_read(m: Model, pattern: Pattern, tokens_BT: jax.Array, length_B: jax.Array) -> float | None:
    """Rows that a sparse prefill's blocks of queries read / those before them, over all layers and heads of this prompt: counted while it
    is read, since a pattern may choose by what the rows hold. None for one that makes its rows in another way than by reading blocks."""
    if pattern.own_pass:
        return None
    kind, counted = type(pattern), np.zeros(2)

    def choose(self, rows, here):
        reading, R = kind.choose(self, rows, here), pattern.block
        before_Q = (own_blocks(rows, R) + 1) * R
        alone = 0 if reading.row_BKM is None else (reading.row_BKM != EMPTY).sum(axis=-1)[..., None]
        read = jnp.minimum(reading.count_BKQ * R + alone, before_Q)
        real = jnp.arange(read.shape[-1]) * R + rows.first < rows.length_B[:, None, None]
        jax.debug.callback(add, jnp.where(real, read, 0).sum(), jnp.where(real, before_Q, 0).sum() * read.shape[1])
        return reading

    def add(*more):
        counted[:] += np.asarray(more, np.float64)

    watched = type(kind.__name__, (kind,), {"choose": choose})(**{f.name: getattr(pattern, f.name) for f in fields(pattern)})
    jax.block_until_ready(prefill(m.params, m.cfg, tokens_BT, length_B, dtype=m.precision.cache, pattern=watched))
    jax.effects_barrier()
    return float(counted[0] / counted[1])


def _timed(program, params, s: Decoding, steps) -> tuple[float, Decoding]:
    start = time.perf_counter()
    end = jax.block_until_ready(program(params, s, steps))
    return time.perf_counter() - start, end


def peak_bytes(program, params) -> int:
    """Arguments, results and temporaries of a compiled program, shared buffers counted once, without the weights."""
    a = program.memory_analysis()
    whole = a.argument_size_in_bytes + a.output_size_in_bytes - a.alias_size_in_bytes + a.temp_size_in_bytes
    return max(int(whole) - tree_bytes(params), 0)
