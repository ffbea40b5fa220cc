"""Where Token Recycling's default tree comes from: how often each rank is right, and what a pass over so many rows costs.

    python experiments/default_tree.py              # from the committed counts, at once
    python experiments/default_tree.py --measure    # the counts anew; some 3 minutes on 2 idle cores

Claim: the default, "0 1 00", is of all trees with at least one draft the one with the most tokens by what its pass costs, on two CPU
cores over all kinds of prompts. Counts are those of SmolLM2's greedy continuations (48 tokens behind the first two prompts of each of five
classes, tables empty at the start): how often rank r was right d + 1 below the root, and how often its parent was. T(n)/T(1) is that of
benchmarks/cpu.json. Writes experiments/results/default_tree.json.

Expected: over all classes no draft pays on two cores: the default gives 1.24 tokens a pass for 1.4 times the time, the best there is.
Where a pass over many rows costs what one row does (H200 and TPU v5e, by the arithmetic of evals/machines.py) the best tree is as large as
it may be: 63 nodes give 1.47 tokens a pass, TREE_16's 15 give 1.35, the likeliest 15 nodes 1.37.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from tokeff.decode.recycling import TREE_4, TREE_16
from tokeff.decode.shape import Tree, best_tree, chances, counts, likeliest, measured_cost, rate_of

ROOT = Path(__file__).parents[1]
RESULT, CPU = Path(__file__).parent / "results" / "default_tree.json", ROOT / "benchmarks" / "cpu.json"
PROMPTS, NEW, DEPTH, RANK = 2, 48, 5, 8


def measure() -> None:
    """Counts of every class, each written down when it is done."""
    from tokeff.evals.comparison import compile_cache
    from tokeff.evals.continuations import CLASSES, ids, of_class
    from tokeff.models.load import load
    from tokeff.report.environment import describe

    compile_cache()
    m = load("smollm2-135m")
    found: dict[str, Any] = {"environment": describe([]) | {"command": "python experiments/default_tree.py --measure"}}
    found |= {"model": "smollm2-135m", "prompts": PROMPTS, "new": NEW, "classes": {}}
    for name in CLASSES:
        right, asked = counts(m, [ids(m, prompt) for prompt in of_class(name)[:PROMPTS]], NEW, DEPTH, RANK)
        found["classes"][name] = {"right": right.astype(int).tolist(), "asked": asked.astype(int).tolist()}
        RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, flush=True)


def found() -> dict[str, dict[str, Any]]:
    """For each class, and for "all" of them together: the best `tree` on these two cores, empty where no draft pays, and the best with a
    `draft` at least; `gain`, expected tokens of a pass by what it costs there (1 for no draft), of the latter; the expected tokens of the
    `default` tree, of TREE_16 (`sixteen`), of the likeliest tree of as many nodes (`same_size`), and of that of 63 (`large`), the best
    one where a pass over 64 rows costs what one row does."""
    classes = json.loads(RESULT.read_text(encoding="utf-8"))["classes"]
    count = {name: np.array([one["right"], one["asked"]], float) for name, one in classes.items()}
    cost = measured_cost(CPU)
    rows, time = zip(*cost)
    out = {}
    for name, (right, asked) in {**count, "all": sum(count.values())}.items():
        rate = rate_of(right, asked)
        tree = best_tree(rate, cost)
        by_size = [likeliest(rate, n) for n in range(1, 64)]
        gains = [tokens(one, rate) / float(np.interp(len(one) + 1, rows, time)) for one in by_size]
        draft = by_size[int(np.argmax(gains))]
        said = {"default": TREE_4, "sixteen": TREE_16, "same_size": by_size[14], "large": by_size[62]}
        out[name] = {"tree": tree, "draft": draft, "gain": max(gains)} | {key: tokens(one, rate) for key, one in said.items()}
    return out


def tokens(tree: Tree, rate: np.ndarray) -> float:
    """Expected tokens of a pass."""
    return 1 + sum(chances(tree, rate))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--measure", action="store_true", help="count anew")
    if p.parse_args().measure:
        measure()
    for name, one in found().items():
        said = " ".join("".join(map(str, path)) for path in one["draft"])
        print(f"{name:<11} best drafts on 2 cores: {said:<12} {one['gain']:.2f} times plain decoding", end="; ")
        print(f"tokens a pass of the default {one['default']:.2f}, of the likeliest 15 {one['same_size']:.2f}, of 63 {one['large']:.2f}")


if __name__ == "__main__":
    main()
