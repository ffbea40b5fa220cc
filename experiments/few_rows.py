"""Which side of a product a weight must stand on when a pass carries a few rows.

    python experiments/few_rows.py

Claim: XLA:CPU multiplies 2 to 16 rows by a matrix faster when the matrix is the left operand, and `product` (models/transformer.py) puts it
there for up to `FEW` rows. Every product of one pass of SmolLM2-135M (random weights, 538 MB, read once), with rows on the left and with
weights on the left; one row is the unit. All take turns, next to reads of memory. Nothing else of a pass is here, so these are bounds on
T(n)/T(1), which `tokeff bench verify-cost` measures whole. 2 cores: a minute. Writes experiments/results/few_rows.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.bench.common import READ_BYTES, bandwidth, interleave, ratio, reads, timed
from tokeff.report.environment import describe

L, D, Q, KV, F, V = 30, 576, 576, 192, 1536, 49152
SHAPES = [(Q, D), (KV, D), (KV, D), (D, Q), (F, D), (F, D), (D, F)] * L + [(V, D)]
ROWS, ROUNDS = (1, 2, 4, 8, 16, 32), 7


@jax.jit
def rows_left(xs, ws):
    return [jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))) for x, w in zip(xs, ws, strict=True)]


@jax.jit
def weights_left(xs, ws):
    return [jax.lax.optimization_barrier(jax.lax.dot_general(w, x, (((1,), (1,)), ((), ())))).T for x, w in zip(xs, ws, strict=True)]


def main() -> None:
    """Time every form at every number of rows, and write the file."""
    rng = np.random.default_rng(0)
    ws = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in SHAPES]
    timers = reads()
    for n in ROWS:
        xs = [jnp.asarray(rng.standard_normal((n, shape[1]), np.float32)) for shape in SHAPES]
        assert all(np.allclose(a, b, atol=1e-2) for a, b in zip(rows_left(xs, ws), weights_left(xs, ws), strict=True))
        timers |= {f"{n} rows left": timed(rows_left, xs, ws), f"{n} weights left": timed(weights_left, xs, ws)}
    seconds, nbytes = interleave(timers, ROUNDS, "products"), sum(w.nbytes for w in ws)
    found = {
        str(n): {
            form.replace(" ", "_"): {
                "ms": 1e3 * median(took := seconds[f"{n} {form}"]),
                "gb_per_s": nbytes / median(took) / 1e9,
                "of_one_row": ratio(took, seconds["1 rows left"]),
            }
            for form in ("rows left", "weights left")
        }
        for n in ROWS
    }
    floor = bandwidth(seconds, READ_BYTES) / 1e9
    about = describe([]) | {"command": "python experiments/few_rows.py"}
    facts = {"weights_mb": nbytes / 1e6, "read_gb_per_s": floor, "rows": found, "environment": about}
    out = Path(__file__).parent / "results" / "few_rows.json"
    out.write_text(json.dumps(facts, indent=1) + "\n")
    for n, forms in found.items():
        print(n, {form: f"{x['gb_per_s']:.1f} GB/s, {x['of_one_row']:.2f} of one row" for form, x in forms.items()})


if __name__ == "__main__":
    main()
