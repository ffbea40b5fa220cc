"""What reading a prompt in bounded memory costs in quality: the same policies over the whole prompt, and with rows let go between pieces.

    python experiments/bounded_reading.py [--texts 3] [--length 2048] [--budget 0.25] [--out experiments/results/bounded_reading.json]

Prints and writes the KL to the full cache on held-out tokens and the most rows a layer held while reading. About 8 minutes on two cores.

Expected, pieces of 256 against the whole: SnapKV .050 / .062, H2O .098 / .096, Expected Attention .066 / .070, KeyDiff .145 / .113.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import tokeff
from tokeff.data import tasks
from tokeff.data.haystack import encoder
from tokeff.evals.fidelity import Reader, encode_example
from tokeff.generation import Setup
from tokeff.report.environment import describe

PIECES = (None, 1024, 512, 256)


def policies(budget: float):
    return {
        "SnapKV": tokeff.kv.snapkv(budget), "H2O": tokeff.kv.h2o(budget, evict=0),
        "ExpectedAttention": tokeff.kv.expected_attention(budget),
        "KeyDiff": tokeff.kv.keydiff(budget, evict=0), "Recent": tokeff.kv.recent_rows(budget), "Random": tokeff.kv.random_rows(budget),
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--texts", type=int, default=3)
    p.add_argument("--length", type=int, default=2048)
    p.add_argument("--budget", type=float, default=0.25)
    p.add_argument("--out", type=Path, default=Path("experiments/results/bounded_reading.json"))
    known = p.parse_args()
    m, rows = tokeff.load("smollm2-135m"), []
    made = [tasks.make("perplexity", seed, known.length, encoder(m.tok)) for seed in range(known.texts)]
    readers = [Reader(m, encode_example(m, example)) for example in made]
    full = [reader.quality(Setup()) for reader in readers]
    for name, policy in policies(known.budget).items():
        for piece in PIECES:
            setup, kl, most = Setup(policy, bounded=piece), [], 0
            for reader, base in zip(readers, full, strict=True):
                kl.append(float(reader.quality(setup).kl(base).mean()))
                most = max(most, *(layer.k_BKSH.shape[2] for layer in reader.context(setup).layers))
                reader._contexts.clear()
            rows.append({"method": name, "piece": piece, "rows_held": most, "kl": float(np.mean(kl)), "kl_by_text": kl})
            print(f"{name:<18} piece {piece or 'whole':>6}  rows {most:>5}  KL {np.mean(kl):.4f}", flush=True)
    about = {"length": known.length, "budget": known.budget, "texts": known.texts, "environment": describe(sys.argv)}
    known.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
