"""Which 'copy' prompts are copy-heavy: how much of the dense continuation already stands in the prompt.

    python experiments/copy_heavy.py              # prompts without a share; 40 take about 2 minutes on 2 idle cores, 64 tokens each
    python experiments/copy_heavy.py --fresh      # all of them anew

Writes into tokeff/data/text/prompts.json, as `copied` of every 'copy' prompt, the share of the 8-grams of its continuation that stand in
the prompt, in tokens of SmolLM2. `tokeff.data.sources.copy_heavy()` gives the prompts with at least 70%: the class on which drafts that
copy can gain. A continuation of fewer than 8 tokens has no 8-gram and a share of 0.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

import tokeff
from tokeff.data import sources
from tokeff.evals.comparison import compile_cache
from tokeff.evals.continuations import Continuation, ids, read
from tokeff.generation import Setup
from tokeff.models.load import Model

GRAM = 8
PROMPTS = Path(sources.__file__).parent / "text" / "prompts.json"


def grams(tokens: Sequence[int], n: int = GRAM) -> list[tuple[int, ...]]:
    """Every n tokens in a row."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def share(continuation: Sequence[int], prompt: Sequence[int], n: int = GRAM) -> float:
    """The share of the continuation's n-grams that stand in the prompt."""
    there, found = set(grams(prompt, n)), grams(continuation, n)
    return sum(gram in there for gram in found) / len(found) if found else 0.0


def copied(m: Model, prompt: sources.Prompt, new: int) -> float:
    """The share for the model's own greedy continuation."""
    tokens = ids(m, prompt)
    run = Continuation(m, read(m, [tokens]), Setup(), new)
    run()
    return round(share(run.texts[0], tokens), 3)


def write(path: Path, rows: Sequence[dict]) -> None:
    """The prompts, one a line; the file appears whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n", encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """Measure every 'copy' prompt and write the shares down."""
    p = argparse.ArgumentParser(description="How much of its prompt a continuation copies.")
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--fresh", action="store_true", help="measure again what has a share")
    p.add_argument("--new", type=int, default=64, help="tokens of a continuation (default: %(default)s)")
    known = p.parse_args()
    rows = json.loads(PROMPTS.read_text(encoding="utf-8"))
    compile_cache()
    m = tokeff.load(known.model)
    for row in tqdm([row for row in rows if row["kind"] == "copy" and (known.fresh or "copied" not in row)], desc="prompts", disable=None):
        row["copied"] = copied(m, sources.Prompt(row["text"], row["kind"]), known.new)
        write(PROMPTS, rows)
    shares = [row["copied"] for row in rows if "copied" in row]
    heavy = sum(x >= sources.COPY_HEAVY for x in shares)
    print(f"{heavy} of {len(shares)} continuations have {sources.COPY_HEAVY:.0%} of their 8-grams or more from the prompt")


if __name__ == "__main__":
    main()
