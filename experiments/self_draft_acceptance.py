"""How often the layers of an untuned model draft rightly: SmolLM2 under EarlyExit, DEL and SWIFT, its halves given or searched.

    python experiments/self_draft_acceptance.py              # 4 drafters, 2 prompts of 5 classes; some 5 minutes on 2 idle cores
    python experiments/self_draft_acceptance.py --only swift # rows whose name has this in it; the others in the file stay

Claim: these are mechanisms for models that were trained for them (LayerSkip, DEL), or that have 13 billion parameters and more (SWIFT).
Published are 1.3 to 1.6 times plain decoding for SWIFT and 2.2 to 2.8 for DEL.

Greedy, batch 1, 48 tokens behind each prompt. `mat`: tokens a pass of the model commits, those of plain decoding are 1. `drafts`: how many
follow each other in a pass. `right`: the share of them that a pass accepts, leaves in their place included. `share`: of the weights that
a pass and its drafting read, those that drafting reads; every draft row reads its layers once more, and the head. `gain`: mat by what a
pass reads in all, in plain passes: the speed, plain decoding = 1, where reading weights is all that takes time. `same`: how many texts are
those of plain decoding. No figure is a time. SWIFT's given halves are found by `find_skips` on a chat prompt that is not measured, and its
answer. Its own search goes by the last 16 tokens; every choice tried counts as one more row that drafting reads for, half of whose halves
are of each kind, and `worth` is what the best was worth in the end. Writes experiments/results/self_draft_acceptance.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from tqdm import tqdm

import tokeff
from tokeff.decode.draft import Drafter
from tokeff.decode.dynamic_exit import DynamicExit
from tokeff.decode.methods import dynamic_exit, early_exit, plain, swift
from tokeff.decode.rule import Coupled
from tokeff.decode.swift import Swift, find_skips, left_out
from tokeff.decode.swift_online import OnlineSwift
from tokeff.evals.comparison import compile_cache
from tokeff.evals.continuations import CLASSES, ids, of_class, read
from tokeff.generation import Setup, go, new_tokens, start
from tokeff.kv.prefill import Prompt
from tokeff.models.load import Model
from tokeff.report.environment import describe

RESULTS = Path(__file__).parent / "results" / "self_draft_acceptance.json"
PROMPTS, NEW, TRIES, TAIL = 2, 48, 100, 16


@dataclass(frozen=True)
class Watched(Coupled):
    """`Coupled`, which also writes down of every pass below which layer its draft left off, how many drafts follow each other, and how
    many tokens came of it."""

    seen: ClassVar[list[tuple[int, int, int]]] = []

    def judge(self, draft, logits_BWV, place_BW, key_B, how, depth):
        path, emitted, count = super().judge(draft, logits_BWV, place_BW, key_B, how, depth)
        chain = draft.valid_BW[0, 1 : depth + 1].sum()
        jax.debug.callback(lambda n, c: self.seen.append((draft.below, int(n), int(c))), chain, count[0], ordered=True)
        return path, emitted, count


def weights(cfg) -> tuple[float, float, float]:
    """How many weights an attention, a feed-forward and the head have."""
    return cfg.D * cfg.H * 2 * (cfg.N + cfg.K), 3 * cfg.D * cfg.F, cfg.V * cfg.D


def row_of(drafter: Drafter, cfg, below: int) -> float:
    """Weights that a draft row reads, without the head."""
    attention, ffn, _ = weights(cfg)
    if isinstance(drafter, Swift):
        return (cfg.L - len(drafter.attention)) * attention + (cfg.L - len(drafter.ffn)) * ffn
    if isinstance(drafter, OnlineSwift):
        return (cfg.L - left_out(drafter.share, cfg.L) / 2) * (attention + ffn)
    return below * (attention + ffn)


def read_by(drafter: Drafter, cfg, below: int, n: int) -> tuple[float, float]:
    """(weights that drafting reads in a pass of n drafts, those that the pass reads)."""
    attention, ffn, head = weights(cfg)
    rows = 1 + (n if below else min(n, drafter.depth - 1))  # where every layer runs again the last draft is only named
    heads = min(n + 1, drafter.depth) if not below else n + isinstance(drafter, DynamicExit)  # a chain that stops has asked once more
    return rows * row_of(drafter, cfg, below) + heads * head, (cfg.L - below) * (attention + ffn) + head


def decoded(m: Model, prompt: Prompt, drafter: Drafter) -> tuple[list[int], list[tuple[int, int, int]], Any]:
    """(the text, what was seen of each pass, the drafter's last state)."""
    Watched.seen.clear()
    setup = Setup(decode=replace(drafter, rule=Watched()))
    s = go(m, start(m, prompt, setup, NEW, eos=m.cfg.eos), setup, NEW, m.cfg.eos)
    text = new_tokens(s)[0]
    jax.effects_barrier()
    return text, list(Watched.seen), s.drafter


def figures(m: Model, drafter: Drafter, texts, true, seen: list[tuple[int, int, int]], tried: int) -> dict[str, Any]:
    """Of one drafter on the texts of one class. The last pass of a text may emit less than it accepts."""
    attention, ffn, head = weights(m.cfg)
    committed, drafts = sum(len(text) - 1 for text in texts), sum(n for _, n, _ in seen)
    draft, passes = np.sum([read_by(drafter, m.cfg, below, n) for below, n, _ in seen], axis=0)
    draft, plainly = draft + tried * (row_of(drafter, m.cfg, 0) + head), m.cfg.L * (attention + ffn) + head
    return {
        "tokens": committed, "passes": len(seen), "mat": committed / len(seen), "drafts": drafts / len(seen),
        "right": sum(count - 1 for *_, count in seen) / max(drafts, 1), "share": draft / (draft + passes),
        "gain": committed * plainly / (draft + passes), "same": sum(a == b for a, b in zip(texts, true, strict=True)),
    }  # fmt: skip


def drafters(m: Model, only: str) -> dict[str, Drafter]:
    """Those whose names have `only` in them."""
    found: dict[str, Drafter] = {"early exit": early_exit(), "DEL": dynamic_exit(), "SWIFT, searching": swift(tail=TAIL)}
    name = "SWIFT, given"
    if only.lower() in name.lower():
        asked = ids(m, of_class("chat")[PROMPTS])  # none of those it is measured on
        text, _, _ = decoded(m, read(m, [asked]), plain())
        found[name] = swift(*find_skips(m, [*asked, *text], tail=min(TAIL * 2, len(text) - 1), tries=TRIES))
    return {name: drafter for name, drafter in found.items() if only.lower() in name.lower()}


def measure(m: Model, drafter: Drafter, prompts: list[Prompt], true: list[list[int]]) -> dict[str, Any]:
    """The figures of one drafter on one class."""
    found = [decoded(m, prompt, drafter) for prompt in prompts]
    seen = [one for _, passes, _ in found for one in passes]
    states = [state for *_, state in found] if isinstance(drafter, OnlineSwift) else []
    tried, more = [int(state.tried) for state in states], {}
    if states:
        more = {"worth": [float(state.worth) for state in states], "tried": tried}
    if isinstance(drafter, DynamicExit):
        more = {"exits": sorted({below for below, *_ in seen})}
    return figures(m, drafter, [text for text, *_ in found], true, seen, sum(tried)) | more


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--only", default="", metavar="NAME", help="only drafters with this in their names; other rows of the file stay")
    p.add_argument("--out", type=Path, default=RESULTS)
    known = p.parse_args()
    compile_cache()
    m = tokeff.load(known.model)
    about = {"environment": describe([]) | {"command": "python experiments/self_draft_acceptance.py"}}
    about |= {"model": known.model, "prompts": PROMPTS, "new": NEW, "tries": TRIES, "tail": TAIL}
    before = json.loads(known.out.read_text()) if known.only and known.out.exists() else {"rows": []}
    if before["rows"] and any(before[name] != value for name, value in about.items() if name != "environment"):
        raise SystemExit(f"{known.out} is of another model or other settings; write to another file with --out, or leave out --only")
    rows: list[dict[str, Any]] = before["rows"]
    prompts = {kind: [read(m, [ids(m, prompt)]) for prompt in of_class(kind)[:PROMPTS]] for kind in CLASSES}
    true = {kind: [decoded(m, prompt, plain())[0] for prompt in some] for kind, some in prompts.items()}
    for name, drafter in tqdm(drafters(m, known.only).items(), disable=None):
        rows = [row for row in rows if row["drafter"] != name]
        for kind, some in prompts.items():
            what = {"drafter": name, "settings": repr(drafter), "class": kind, "prompts": len(some)}
            rows.append(what | measure(m, drafter, some, true[kind]))
            known.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    for row in rows:
        said = ", ".join(f"{key} {row[key]:.2f}" for key in ("mat", "drafts", "right", "share", "gain"))
        print(f"{row['drafter']:<17} {row['class']:<11} {said}, {row['same']} of {row['prompts']} texts the same")


if __name__ == "__main__":
    main()
