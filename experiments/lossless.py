"""Drafting changes no token: prompt lookup and Token Recycling against plain greedy decoding, on SmolLM2 over real prompts.

    python experiments/lossless.py                # 60 prompts, 32 tokens each, 3 timings; about 12 minutes on 2 idle cores
    python experiments/lossless.py --runs 1       # quicker; the same tokens, rougher timings

Writes experiments/results/lossless.json, and a row a prompt to lossless.jsonl beside it, from which an interrupted run goes on.

The tie rule: float32 logits of a pass over one row and of a pass over many differ by about 5e-5, so a prompt may be cut at a
position where plain decoding's two best logits are closer than 1e-3, and is compared up to there. More than 2% of prompts cut, or
one cut where they are further apart, fails. Every prompt is decoded alone (batch 1), all decoders taking turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import tokeff
from tokeff.data.sources import PROMPT_KINDS, Prompt, prompts
from tokeff.decode import plain, prompt_lookup, token_recycling
from tokeff.generation import Setup, go, new_tokens, pad, start
from tokeff.kv.extend import extend, pack
from tokeff.kv.prefill import Prompt as Read
from tokeff.kv.prefill import prefill
from tokeff.models.load import Model
from tokeff.report.environment import cpu_model

DECODERS = {"plain": plain(), "prompt lookup": prompt_lookup(), "token recycling": token_recycling()}
DRAFTED = tuple(name for name in DECODERS if name != "plain")
MARGIN = 1e-3
CUT_SHARE = 0.02
LONGEST = 192  # prompts are padded to this, so that all of them share compiled code
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Cut:
    """Where drafted and plain text part, and how far apart plain decoding's two best logits are there."""

    at: int
    margin: float


def ids(m: Model, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; what a user says goes through the chat template."""
    text = m.tokenizer.chat([{"role": "user", "content": prompt.text}]) if prompt.kind == "chat" else prompt.text
    return m.tokenizer.encode(text)


def read(m: Model, tokens: Sequence[int]) -> Read:
    """The prompt's prefill, which every decoder starts from."""
    padded, length = pad([tokens], max(LONGEST, len(tokens)))
    return prefill(m.params, m.cfg, padded, length, dtype=m.precision.cache)


def decode(m: Model, prompt: Read, name: str, new: int) -> tuple[list[int], int, float]:
    """(tokens, passes, seconds without the prefill) of one greedy continuation."""
    setup = Setup(decode=DECODERS[name])
    s = jax.block_until_ready(start(m, prompt, setup, new, eos=m.cfg.eos))
    begun = time.perf_counter()
    s = jax.block_until_ready(go(m, s, setup, new, m.cfg.eos))
    return new_tokens(s)[0], int(s.passes_B[0]), time.perf_counter() - begun


def margins(m: Model, prompt: Read, tokens: Sequence[int], new: int) -> np.ndarray:
    """Distance of the two best logits at every generated position, from one teacher-forced pass over plain decoding's tokens."""
    setup = Setup()
    layers = pack(setup.kv, prompt.layers, setup.room(new), m.cfg)
    forced, length = pad([tokens], new)
    logits, _ = extend(m.params, m.cfg, layers, forced, prompt.next_B, length, setup.kv)
    best = jax.lax.top_k(jnp.concatenate([prompt.logits_BV, logits[0, : len(tokens) - 1]]), 2)[0]
    return np.asarray(best[:, 0] - best[:, 1])


def cut_of(tokens: Sequence[int], true: Sequence[int], margin: np.ndarray) -> Cut | None:
    """None for equal texts, else where they part."""
    if list(tokens) == list(true):
        return None
    longest = max(len(tokens), len(true))
    at = next(i for i in range(longest) if tokens[i : i + 1] != true[i : i + 1])
    return Cut(at, float(margin[at]) if at < len(margin) else float("inf"))


def measure(m: Model, prompt: Prompt, new: int = 32, runs: int = 1) -> dict[str, Any]:
    """One prompt under every decoder: tokens, passes, seconds of each run, cuts. Decoders take turns."""
    tokens = ids(m, prompt)
    prefilled = read(m, tokens)
    found = {name: [] for name in DECODERS}
    for i in range(runs):
        names = list(DECODERS)
        for name in names[i % 3 :] + names[: i % 3]:
            found[name].append(decode(m, prefilled, name, new))
    true = found["plain"][0][0]
    margin = margins(m, prefilled, true, new)
    row: dict[str, Any] = {"kind": prompt.kind, "prompt_tokens": len(tokens), "new_tokens": len(true)}
    row["close"] = int((margin < MARGIN).sum())
    for name, results in found.items():
        text, passes, _ = results[0]
        cut = cut_of(text, true, margin)
        row[name] = {"passes": passes, "tokens": len(text), "seconds": [r[2] for r in results]}
        row[name] |= {"cut": None if cut is None else vars(cut)}
        row[name] |= {"same_again": all(r[0] == text for r in results)}
    return row


def verdict(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Whether a drafting decoder is lossless under the tie rule."""
    cuts = [row[name]["cut"] for row in rows if row[name]["cut"]]
    wide = [cut for cut in cuts if cut["margin"] >= MARGIN]
    steady = all(row[name]["same_again"] for row in rows)
    return {
        "prompts": len(rows),
        "cuts": len(cuts),
        "cuts_above_margin": len(wide),
        "largest_margin_of_a_cut": max((cut["margin"] for cut in cuts), default=None),
        "passed": not wide and len(cuts) <= CUT_SHARE * len(rows) and steady,
    }


def speed(rows: Iterable[dict[str, Any]], name: str) -> dict[str, float]:
    """Tokens a pass, and the ratio of the medians of plain and drafted seconds a token."""
    rows = [row for row in rows if row["new_tokens"] > 1]

    def per_token(which: str) -> float:
        return median(s / (row[which]["tokens"] - 1) for row in rows for s in row[which]["seconds"] if row[which]["tokens"] > 1)

    tokens, passes = (sum(row[name][field] for row in rows) for field in ("tokens", "passes"))
    return {"tokens_per_pass": (tokens - len(rows)) / passes, "times_faster": per_token("plain") / per_token(name)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Verdicts and speeds, in all and by kind of prompt."""
    kinds = [kind for kind in PROMPT_KINDS if any(row["kind"] == kind for row in rows)]
    groups = {"all": rows} | {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}
    return {
        name: verdict(rows, name) | {"speed": {group: {"n": len(g)} | speed(g, name) for group, g in groups.items()}}
        for name in DRAFTED
    } | {"positions": sum(row["new_tokens"] for row in rows), "positions_closer_than_margin": sum(row["close"] for row in rows)}


def resumed(path: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that an interrupted run with the same settings left; a half-written last line is dropped."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    if not lines or json.loads(lines[0]) != facts:
        path.write_text(json.dumps(facts) + "\n")
        return []
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return [json.loads(line) for line in lines[1:]]


def table(found: dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{'':16} {'kind':6} {'n':>3} {'tokens/pass':>12} {'times faster':>13}"]
    for name in DRAFTED:
        for kind, s in found[name]["speed"].items():
            lines.append(f"{name:16} {kind:6} {s['n']:3} {s['tokens_per_pass']:12.2f} {s['times_faster']:13.2f}")
    for name in DRAFTED:
        v = found[name]
        said = f"{v['cuts']} of {v['prompts']} prompts cut, {v['cuts_above_margin']} of them above the margin"
        lines.append(f"{name}: {'lossless' if v['passed'] else 'FAILED'} ({said})")
    near = found["positions_closer_than_margin"]
    return "\n".join([*lines, f"{near} of {found['positions']} positions have a margin below {MARGIN}"])


def write(path: Path, value: dict[str, Any]) -> None:
    """Write JSON whole: to a temporary name first."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> int:
    """Run what is missing, write the summary, and return 1 if anything is not lossless."""
    p = argparse.ArgumentParser(description="Drafting changes no token.")
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--new", type=int, default=32, help="tokens a prompt (default: %(default)s)")
    p.add_argument("--runs", type=int, default=3, help="timings of each decoder (default: %(default)s)")
    p.add_argument("--limit", type=int, help="only so many prompts of each kind")
    p.add_argument("--out", type=Path, default=RESULTS / "lossless.json")
    known = p.parse_args()
    chosen = [prompt for kind in PROMPT_KINDS for prompt in prompts(kind)[: known.limit]]
    hardware = {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), "device": jax.devices()[0].device_kind}
    facts = {"model": known.model, "new": known.new, "runs": known.runs, "prompts": len(chosen), "jax": jax.__version__, **hardware}
    known.out.parent.mkdir(parents=True, exist_ok=True)
    rows_file = known.out.with_suffix(".jsonl")
    rows = resumed(rows_file, facts)
    m = tokeff.load(known.model)
    measure(m, chosen[0], known.new)  # compiles
    for prompt in tqdm(chosen[len(rows) :], initial=len(rows), total=len(chosen), desc="prompts", disable=None):
        rows.append(measure(m, prompt, known.new, known.runs))
        with rows_file.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    found = summary(rows)
    write(known.out, {"command": f"python experiments/lossless.py --runs {known.runs}", **facts, **found, "rows": rows})
    print(table(found))
    return 0 if all(found[name]["passed"] for name in DRAFTED) else 1


if __name__ == "__main__":
    sys.exit(main())
