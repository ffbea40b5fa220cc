"""What SpAtten's parts cost in quality and leave unread: heads that go, low bits of keys on demand, few values.

    python experiments/spatten_parts.py [--texts 2] [--length 512] [--steps 24] [--out experiments/results/spatten_parts.json]

Prints and writes the KL to the full cache on held-out tokens, read one at a time, the share of a full cache that is held, and how often a
kv head read its low bits. About 5 minutes on two cores that do nothing else.

Expected: a third of the kv heads gone above layer 18 .41 nats; keys of 8+4 bits .0001 whatever is read, of 4+4 .031 by the high bits
alone, .028 with a sixth of the low bits, .0001 with all; values of 30% of the rows .068, of 10% .58.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import tokeff
from tokeff.data import tasks
from tokeff.data.haystack import encoder
from tokeff.evals.fidelity import encode_example
from tokeff.generation import Setup, read
from tokeff.kv import methods as kv
from tokeff.kv.by_scores import Scored, read_again
from tokeff.kv.extend import extend, pack
from tokeff.kv.policy import tree_bytes
from tokeff.reduce import methods as reduce
from tokeff.report.environment import describe


def setups() -> dict[str, Setup]:
    found = {"full": Setup()}
    for left, first in ((2 / 3, 0.625), (1 / 3, 0.625), (2 / 3, 0.3), (1 / 3, 0.3)):
        found[f"heads {left:.2f} from {first}"] = Setup(cut=reduce.spatten_heads(1.0, heads_left=left, heads_at=(first,)))
    for high, low in ((8, 4), (4, 4)):
        for tau in (0.0, 0.1, 0.3, 2.0):
            found[f"bits {high}+{low} tau {tau}"] = Setup(kv.spatten_cache(high, low, tau, 1.0))
    for values in (0.3, 0.1, 0.03):
        found[f"values {values}"] = Setup(kv.spatten_cache(None, values=values))
    found["whole paper"] = Setup(kv.spatten_cache(), reduce.spatten_heads(0.3, heads_left=2 / 3))
    return found


def follow(m, setup: Setup, prompt, tokens) -> tuple[np.ndarray, float, float]:
    """(logits_TV of given tokens one at a time, bytes held, share of low bits read)."""
    layers = pack(setup.kv, prompt.layers, setup.room(len(tokens)), m.cfg)
    held, logits, one = tree_bytes(layers), [np.asarray(prompt.logits_BV)], jnp.ones(1, jnp.int32)
    for t, token in enumerate(tokens[:-1]):
        found, layers = extend(m.params, m.cfg, layers, jnp.asarray([[token]], jnp.int32), prompt.next_B + t, one, setup.kv)
        logits.append(np.asarray(found)[:, 0])
    rows = [getattr(layer, "rows", layer) for layer in layers]
    again = read_again(rows) if isinstance(rows[0], Scored) else 0.0
    return np.concatenate(logits), held, again


def divergence(p_TV, q_TV) -> float:
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (p_TV.astype(np.float64), q_TV.astype(np.float64)))
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--texts", type=int, default=2)
    p.add_argument("--length", type=int, default=512)
    p.add_argument("--steps", type=int, default=24)
    p.add_argument("--out", type=Path, default=Path("experiments/results/spatten_parts.json"))
    known = p.parse_args()
    m, rows, full, prompts = tokeff.load("smollm2-135m"), [], {}, {}
    texts = [encode_example(m, tasks.make("perplexity", seed, known.length, encoder(m.tok))) for seed in range(known.texts)]
    for name, setup in setups().items():
        kl, held, again = [], [], []
        for i, text in enumerate(texts):
            if (i, setup.cut) not in prompts:
                prompts[i, setup.cut] = read(m, [text.context], setup)
            logits, bytes_held, share = follow(m, setup, prompts[i, setup.cut], text.held_out[: known.steps])
            base, whole = full.setdefault(i, (logits, bytes_held))
            kl.append(divergence(base, logits))
            held.append(bytes_held / whole)
            again.append(share)
        rows.append({"row": name, "kl": float(np.mean(kl)), "kl_by_text": kl, "held": float(np.mean(held)), "again": float(np.mean(again))})
        print(f"{name:<22} KL {np.mean(kl):.4f}  held {np.mean(held):.3f}  low bits read {np.mean(again):.2f}", flush=True)
    about = {"length": known.length, "steps": known.steps, "texts": known.texts, "environment": describe(sys.argv)}
    known.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
