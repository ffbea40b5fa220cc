"""What sharing a prefix saves in decoding: one copy of its rows against one a sequence, on SmolLM2-135M.

    python experiments/shared_prefix.py               # 1, 4 and 16 sequences on 2048 shared rows; about 3 minutes on 2 cores

Claim: with Hydragen the bytes of a decode step no longer grow with the batch times the prefix. Both programs decode the same
tokens from the same prefill, for sequences that were forked from one context and asked different questions; rounds take turns, each
starting with the other one. `bytes` are all arrays of the caches, `peak` what the compiled loop needs beside the weights. Tokens a
second are those of the whole batch: of the median round, and of the fastest. `load` is the machine's load average at the end of a row's
rounds: above the number of cores, other programs took part of it.
Writes experiments/results/shared_prefix.json.

Expected: 16 sequences take a twelfth of the bytes (131 MB for 1557) and decode more than twice as fast; one sequence gains nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import tokeff
from tokeff.bench.common import interleave, ratio
from tokeff.data import sources, tasks
from tokeff.data.haystack import encoder
from tokeff.decode.loop import Decoding, run
from tokeff.evals.cost import peak_bytes
from tokeff.generation import Setup, decoding, new_tokens, read
from tokeff.kv import full, hydragen
from tokeff.kv.extend import extend, pack
from tokeff.kv.policy import tree_bytes
from tokeff.models.load import Model
from tokeff.report.environment import describe

PREFIX, QUESTION, NEW = 2048, 16, 32
RESULTS = Path(__file__).parent / "results"
POLICIES = {"copied": full(), "shared": hydragen()}


def forked(m: Model, prompt, setup: Setup, questions: jax.Array) -> Decoding:
    """The state in which every question has been read behind the one prefix."""
    B, T = questions.shape
    layers = setup.kv.fork(pack(setup.kv, prompt.layers, setup.room(T + NEW), m.cfg), B, setup.room(T + NEW))
    length = jnp.full(B, T)
    logits, layers = extend(m.params, m.cfg, layers, questions, jnp.full(B, PREFIX), length, setup.kv)
    tokens = jnp.concatenate([jnp.repeat(prompt.tokens_BT[:, :PREFIX], B, axis=0), questions], axis=1)
    known = jnp.full(B, PREFIX + T)
    return decoding(layers, tokens, known, known, logits[:, -1], setup, NEW, 0, ())


def measure(m: Model, prompt, ids: list[int], B: int, rounds: int) -> dict[str, Any]:
    """Bytes and tokens a second of both ways with B sequences."""
    questions = jnp.asarray(np.reshape(ids[: B * QUESTION], (B, QUESTION)), jnp.int32)
    steps, timers, texts = jnp.int32(NEW), {}, {}
    row: dict[str, Any] = {"B": B}
    for name, policy in POLICIES.items():
        setup = Setup(policy)
        s = forked(m, prompt, setup, questions)
        args = dict(policy=policy, drafter=setup.decode, how=setup.sampling, eos=())
        program = run.lower(m.params, m.cfg, s, steps, **args).compile()
        row[name] = {"bytes": tree_bytes(s.layers), "peak": peak_bytes(program, m.params)}

        def timer(s=s, program=program, name=name) -> float:
            given = jax.block_until_ready(jax.tree.map(jnp.copy, s))
            start = time.perf_counter()
            end = jax.block_until_ready(program(m.params, given, steps))
            took = time.perf_counter() - start
            texts[name] = new_tokens(end)
            return took

        timers[name] = timer
    seconds = interleave(timers, rounds, f"{B} sequences")
    for name in POLICIES:
        row[name] |= {"tokens_per_s": B * (NEW - 1) / median(seconds[name]), "fastest": B * (NEW - 1) / min(seconds[name])}
    row["load"] = os.getloadavg()[0]
    row["speedup"] = ratio(seconds["copied"], seconds["shared"])
    row["same_text"] = float(np.mean([a == b for a, b in zip(texts["copied"], texts["shared"], strict=True)]))
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--out", type=Path, default=RESULTS / "shared_prefix.json")
    known = p.parse_args()
    m = tokeff.load("smollm2-135m")
    text = tasks.perplexity(0, PREFIX + 1024, encoder(m.tok), source=sources.PROSE).context
    ids = list(encoder(m.tok)(text))
    prompt = read(m, [ids[:PREFIX]], Setup())
    rows = [measure(m, prompt, ids[PREFIX:], B, known.rounds) for B in known.batches]
    about = {"command": "python experiments/shared_prefix.py"}
    settings = {"model": m.name, "prefix": PREFIX, "question": QUESTION, "new": NEW, "rounds": known.rounds}
    known.out.write_text(json.dumps({"environment": describe([]) | about, **settings, "rows": rows}, indent=1) + "\n")
    for row in rows:
        a, b = row["copied"], row["shared"]
        print(f"B={row['B']:>3}: {a['tokens_per_s']:.1f} tokens/s and {a['bytes'] / 1e6:.0f} MB copied, {b['tokens_per_s']:.1f} and "
              f"{b['bytes'] / 1e6:.0f} MB shared; {row['speedup']:.2f} times as fast, same text {row['same_text']:.0%}")  # fmt: skip


if __name__ == "__main__":
    main()
