"""Drafting changes no token: every listed lossless drafter against plain greedy decoding, on SmolLM2 over real prompts.

    python experiments/lossless.py --draft checkpoints/smollm2-135m-draft    # all 13: 55 minutes on 2 cores
    python experiments/lossless.py --only PromptLookup SWIFT                 # 200 prompts, 32 tokens each; 3 minutes a drafter

Without --draft, those that run a draft model are left out.

Claim: under each of them every text is that of plain decoding, under the tie rule (tokeff/evals/ties.py): more than 2% of prompts cut, or
one cut where plain decoding's two best logits are further apart than 1e-3, fails. Prompts of one kind, of unequal lengths, go eight at a
time, plain decoding's too. Settings are the scaled ones. Those of the papers, where they differ (trees of 60 drafts and
more), are decoded for 4 prompts of each kind (--papers).

Writes experiments/results/lossless.json, and a row a prompt to lossless.jsonl beside it, from which an interrupted run goes on; it measures
what is missing there, so a drafter that is listed later costs its own time alone. No figure is a time: configs/leaderboard/decoding.py has
those.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

import tokeff
from tokeff.compat import forget_programs
from tokeff.data.sources import PROMPT_KINDS, Prompt, prompts
from tokeff.decode.draft import Drafter
from tokeff.decode.draft_model import OwnModel
from tokeff.errors import UserError
from tokeff.evals.comparison import compile_cache
from tokeff.evals.continuations import Continuation, ids, read
from tokeff.evals.drafting import Drafting, entries
from tokeff.evals.ties import CUT_SHARE, MARGIN, cut_of, margins
from tokeff.generation import Setup
from tokeff.listing import methods
from tokeff.models.load import Model, fingerprint
from tokeff.report.environment import cpu_model

RESULTS = Path(__file__).parent / "results"


def drafters(model: str, draft: str | None = None, setting: str = "scaled", only: Sequence[str] = ()) -> dict[str, Drafter]:
    """Every listed lossless drafter, or those named, under its settings of one kind, by name."""
    listed = [m for m in methods() if m.part == "decode" and m.lossless]
    if unknown := set(only) - {m.name for m in listed}:
        raise UserError(f"{min(unknown)!r} is no lossless drafter; give some of {', '.join(m.name for m in listed)}")
    listed = [m for m in listed if m.name in only or not only]
    return {row.method: row.decode for row in Drafting("lossless", entries(listed, setting), model, draft).settled().rows}


def digest(drafter: Drafter, weights: str) -> str:
    """Tells settings apart, and of drafters that run a draft model its weights."""
    said = repr(drafter) + (weights if isinstance(drafter, OwnModel) else "")
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def missing(row: dict[str, Any], wanted: dict[str, Drafter], weights: str = "") -> dict[str, Drafter]:
    """The drafters that a row does not have yet, or has under other settings."""
    return {name: d for name, d in wanted.items() if row.get(name, {}).get("settings") != digest(d, weights)}


def measure(m: Model, some: Sequence[Prompt], wanted: dict[str, Drafter], new: int = 32, weights: str = "") -> list[dict[str, Any]]:
    """Some prompts, read together, under plain decoding and these drafters: a row each, of passes, tokens and cuts."""
    tokens = [ids(m, prompt) for prompt in some]
    prefilled = read(m, tokens)
    decoders = {"plain": Continuation(m, prefilled, Setup(), new)}
    decoders |= {name: Continuation(m, prefilled, Setup(decode=d), new) for name, d in wanted.items()}
    for run in decoders.values():
        run()
    true = decoders["plain"].texts
    rows = []
    for i, (prompt, margin) in enumerate(zip(some, margins(m, prefilled, true, new), strict=True)):
        row: dict[str, Any] = {"kind": prompt.kind, "prompt_tokens": len(tokens[i]), "new_tokens": len(true[i])}
        row["close"] = int((margin < MARGIN).sum())
        for name, run in decoders.items():
            cut = cut_of(run.texts[i], true[i], margin)
            row[name] = {"passes": run.passes[i], "tokens": len(run.texts[i]), "cut": None if cut is None else vars(cut)}
            row[name] |= {"settings": digest(wanted[name], weights)} if name in wanted else {}
        rows.append(row)
    return rows


def verdict(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """Whether a drafter is lossless under the tie rule."""
    cuts = [row[name]["cut"] for row in rows if row[name]["cut"]]
    wide = [cut for cut in cuts if cut["margin"] >= MARGIN]
    return {
        "prompts": len(rows),
        "cuts": len(cuts),
        "cuts_above_margin": len(wide),
        "largest_margin_of_a_cut": max((cut["margin"] for cut in cuts), default=None),
        "passed": not wide and len(cuts) <= CUT_SHARE * len(rows),
    }


def tokens_per_pass(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """Of all prompts together; None where the prompt's own logits ended every text."""
    rows = [row for row in rows if row[name]["tokens"] > 1]
    tokens, passes = (sum(row[name][field] for row in rows) for field in ("tokens", "passes"))
    return (tokens - len(rows)) / passes if rows else None


def summary(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Verdicts and tokens a pass, in all and by kind of prompt."""
    found = {}
    for name in names:
        mine = [row for row in rows if name in row]
        kinds = [kind for kind in PROMPT_KINDS if any(row["kind"] == kind for row in mine)]
        groups = {"all": mine} | {kind: [row for row in mine if row["kind"] == kind] for kind in kinds}
        found[name] = verdict(mine, name) | {"tokens_per_pass": {group: tokens_per_pass(g, name) for group, g in groups.items()}}
    near = sum(row["close"] for row in rows)
    return {"drafters": found, "positions": sum(row["new_tokens"] for row in rows), "positions_closer_than_margin": near}


def resumed(path: Path, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows by prompt that an interrupted run with the same facts left, the newest of each; a half-written last line is dropped."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    if not lines:
        path.write_text(json.dumps(facts) + "\n")
        return {}
    if other := [name for name, value in json.loads(lines[0]).items() if facts.get(name) != value]:
        raise UserError(f"{path} holds rows of another {', '.join(other)}; write to another file with --out, or remove this one")
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return {row["prompt"]: row for row in map(json.loads, lines[1:])}


def table(found: dict[str, Any]) -> str:
    """The result as text."""
    kinds = ["all", *PROMPT_KINDS]
    lines = ["tokens a pass".ljust(22) + "".join(kind.rjust(10) for kind in kinds)]
    for name, v in found["drafters"].items():
        lines.append(name.ljust(22) + "".join(f"{v['tokens_per_pass'].get(kind) or 1:10.2f}" for kind in kinds))
    for name, v in found["drafters"].items():
        said = f"{v['cuts']} of {v['prompts']} prompts cut, {v['cuts_above_margin']} of them above the margin"
        lines.append(f"{name}: {'lossless' if v['passed'] else 'FAILED'} ({said})")
    near = found["positions_closer_than_margin"]
    return "\n".join([*lines, f"{near} of {found['positions']} positions have a margin below {MARGIN}"])


def write(path: Path, value: dict[str, Any]) -> None:
    """Write JSON whole: to a temporary name first."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def options() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description="Drafting changes no token.")
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--draft", help="folder of a draft model, for drafters that run one")
    p.add_argument("--new", type=int, default=32, help="tokens a prompt (default: %(default)s)")
    p.add_argument("--batch", type=int, default=8, help="prompts read together (default: %(default)s)")
    p.add_argument("--only", nargs="+", default=(), metavar="NAME", help="these drafters alone")
    p.add_argument("--limit", type=int, help="only so many prompts of each kind")
    p.add_argument("--papers", type=int, default=4, help="prompts of each kind under the papers' settings (default: %(default)s)")
    p.add_argument("--out", type=Path, default=RESULTS / "lossless.json")
    return p.parse_args()


def measured(
    m: Model, known: argparse.Namespace, wanted: Sequence[dict[str, Drafter]], facts: dict[str, Any], weights: str
) -> list[dict[str, Any]]:
    """A row a prompt, under scaled and the first few of a kind under the papers' settings; what the file has is not measured again."""
    file = known.out.with_suffix(".jsonl")
    rows, chosen = resumed(file, facts), {kind: prompts(kind)[: known.limit] for kind in PROMPT_KINDS}
    parts = [(kind, slice(i, i + known.batch), wanted[0]) for kind, some in chosen.items() for i in range(0, len(some), known.batch)]
    parts += [(kind, slice(known.papers), wanted[1]) for kind in chosen if known.papers and wanted[1]]
    for kind, part, drafters in tqdm(parts, desc="batches", disable=None):
        some = chosen[kind][part]
        keys = [f"{kind} {i}" for i in range(part.start or 0, (part.start or 0) + len(some))]
        lacking = [missing(rows.get(key, {}), drafters, weights) for key in keys]
        if not (new := {name: d for one in lacking for name, d in one.items()}):
            continue
        forget_programs()
        found = measure(m, some, new, known.new, weights)
        rows |= {key: rows.get(key, {}) | row | {"prompt": key} for key, row in zip(keys, found, strict=True)}
        with file.open("a") as lines:
            lines.write("".join(json.dumps(rows[key]) + "\n" for key in keys))
    return [rows[f"{kind} {i}"] for kind, some in chosen.items() for i in range(len(some))]


def main() -> int:
    """Measure what is missing, write the summary, and return 1 if anything is not lossless."""
    known = options()
    if known.limit and known.out == RESULTS / "lossless.json":
        raise UserError("--limit proves a part; write to a file of its own with --out")
    wanted = [drafters(known.model, known.draft, setting, known.only) for setting in ("scaled", "paper")]
    every = [drafters(known.model, known.draft, setting) for setting in ("scaled", "paper")]
    hardware = {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), "device": jax.devices()[0].device_kind}
    facts = {"model": known.model, "new": known.new, "batch": known.batch, "jax": jax.__version__, **hardware}
    known.out.parent.mkdir(parents=True, exist_ok=True)
    compile_cache()
    m = tokeff.load(known.model)
    d = None if known.draft is None else tokeff.load(known.draft)
    weights = "" if d is None else fingerprint(d)
    rows = measured(m if d is None else m.attach(draft=d.params), known, wanted, facts, weights)
    found = summary(rows, [name for name in every[0] | every[1] if any(name in row for row in rows)])
    write(known.out, {"command": " ".join(["python", *sys.argv]), **facts, "prompts": len(rows), **found, "rows": rows})
    print(table(found))
    return 0 if all(v["passed"] for v in found["drafters"].values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
