"""What running less of the network costs before any training: SmolLM2 under FFN-SkipLLM, SkipDecode and R2R, against itself.

    python experiments/depth_loss.py              # 9 settings, 2 texts of 128 held-out tokens; some 5 minutes on 2 idle cores
    python experiments/depth_loss.py --fresh      # all rows anew; else those in the file stay

Claim: all three are mechanisms that a model must be trained or tuned for. FFN-SkipLLM's published 25 to 30% of skipped feed-forwards is for
models of 7 to 13 billion parameters, SkipDecode's 2 to 5 times fewer layers for models fine-tuned to it, R2R's router is trained.

Each text is 256 tokens of a book and the 128 that follow, teacher-forced one by one as generation has them, batch 1. Loss is KL(model ||
shallow) of the next token in nats, the perplexity, and how often the arg-max is the model's. There is no second model with this vocabulary,
so R2R's small one is the first `layers` layers under the model's own norm and head, which were not trained for that. Its figures are of
the law that the router leaves: the small model's where its best probability reaches `sure`, the large one's elsewhere; `skipped` is the
share of tokens that are the small model's. Writes experiments/results/depth_loss.json.

Expected: perplexity 32 dense. FFN-SkipLLM 34 with 2% of the feed-forwards skipped, 58 with 12%, 128 with 25%. SkipDecode 477 with 13% of
the layers skipped, 811 with 25%, 1634 with 38%. R2R 150 with 32% of the tokens from the first 27 layers, 1403 with 78%; with 24 layers the
small model is sure and wrong (80%, above 300,000).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import tokeff
from tokeff.data import tasks
from tokeff.data.haystack import encoder
from tokeff.decode.depth import FfnSkip, Shallow, SkipDecode, Some
from tokeff.decode.draft import Target
from tokeff.decode.loop import Decoding
from tokeff.decode.sample import GREEDY
from tokeff.evals.comparison import compile_cache
from tokeff.evals.fidelity import encode_example
from tokeff.generation import Setup, read, start
from tokeff.kv.policy import Full
from tokeff.models.load import Model
from tokeff.models.transformer import unembed
from tokeff.report.environment import describe

LENGTH, SEED, TEXTS = 256, 1000, 2
FFN = tuple(FfnSkip(tau) for tau in (0.99, 0.985, 0.98))
DECODE = tuple(SkipDecode(least=least, stairs=stairs) for least, stairs in ((25, 2), (20, 3), (15, 4)))  # of 30 layers; they share programs
ROUTED = ((27, 0.9), (27, 0.5), (24, 0.5))  # layers of the small model, and how sure it must be
FIGURES = ("skipped", "kl", "perplexity", "agree")
RESULTS = Path(__file__).parent / "results"


@partial(jax.jit, static_argnames=("cfg", "drafter"), donate_argnames=("s", "logits_TV"))
def forced(params, cfg, s: Decoding, logits_TV, first, last, *, drafter: Shallow):
    """The given tokens from number `first` up to `last`, and the logits behind each."""

    def one(t, carry):
        s, logits_TV = carry
        draft, s = drafter.draft(s, Target(params, cfg, Full(), GREEDY))
        assert draft.x_BWD is not None
        logits_TV = logits_TV.at[t].set(unembed(params, cfg, draft.x_BWD)[0, 0])
        return s.replace(count_B=s.count_B + 1, made_B=s.made_B + 1), logits_TV

    return jax.lax.fori_loop(first, last, one, (s, logits_TV))


def log_p(m: Model, context: tuple[int, ...], ids: tuple[int, ...], drafter: Shallow) -> tuple[np.ndarray, float]:
    """(log-probabilities (T, V) behind each given token but the last, share of the network that was skipped)."""
    setup, n = Setup(decode=drafter), len(context)
    s = start(m, read(m, [context], setup), setup, len(ids))
    s = s.replace(tokens_BS=s.tokens_BS.at[0, n : n + len(ids)].set(jnp.asarray(ids)))
    logits, t, T = jnp.zeros((len(ids) - 1, m.cfg.V)), 0, len(ids) - 1
    while t < T:
        some, upto = drafter.segment(t + 1, m.cfg.L) if isinstance(drafter, SkipDecode) else (drafter, None)
        last = T if upto is None else min(upto - 1, T)
        s, logits = forced(m.params, m.cfg, s, logits, t, last, drafter=some)
        t = last
    return np.asarray(jax.nn.log_softmax(logits)), s.drafter.skipped


def routed(small: np.ndarray, large: np.ndarray, sure: float) -> tuple[np.ndarray, float]:
    """(the law that the router leaves, share of tokens that are the small model's)."""
    own = np.exp(small.max(axis=-1)) >= sure
    return np.where(own[:, None], small, large), float(own.mean())


def figures(truth: list[np.ndarray], found: list[tuple[np.ndarray, float]], ids: list[tuple[int, ...]]) -> dict[str, float]:
    """Share skipped, mean KL to the model in nats a token, perplexity, and agreement of the arg-max."""
    pairs = [(p, q) for p, (q, _) in zip(truth, found, strict=True)]
    loss = np.mean([-q[np.arange(len(q)), list(text[1:])] for (_, q), text in zip(pairs, ids, strict=True)])
    return {
        "skipped": float(np.mean([share for _, share in found])),
        "kl": float(np.mean([(np.exp(p) * (p - q)).sum(-1) for p, q in pairs])),
        "perplexity": float(np.exp(loss)),
        "agree": float(np.mean([p.argmax(-1) == q.argmax(-1) for p, q in pairs])),
    }


def settings(drafter: Shallow) -> dict[str, Any]:
    return {"method": type(drafter).__name__} | {name: x for name, x in asdict(drafter).items() if name != "rule"}


def sweep(m: Model, rows: list[dict[str, Any]], save) -> None:
    """One row a setting, the model itself first; `rows` grows, and those it has are not run."""
    texts = [encode_example(m, tasks.perplexity(SEED + i, LENGTH, encoder(m.tok))) for i in range(TEXTS)]
    ids, done = [text.held_out for text in texts], [{k: row[k] for k in row if k not in FIGURES} for row in rows]

    def run(drafter: Shallow) -> list[tuple[np.ndarray, float]]:
        return [log_p(m, text.context, text.held_out, drafter) for text in texts]

    whole = run(Some(tuple(range(m.cfg.L))))
    truth, firsts = [p for p, _ in whole], {}

    def route(layers: int, sure: float) -> list[tuple[np.ndarray, float]]:
        firsts[layers] = firsts.get(layers) or run(Some(tuple(range(layers))))
        return [routed(p, large, sure) for (p, _), large in zip(firsts[layers], truth, strict=True)]

    todo = [({"method": "none"}, lambda: whole)]
    todo += [(settings(drafter), partial(run, drafter)) for drafter in FFN + DECODE]
    todo += [({"method": "Routed", "layers": layers, "sure": sure}, partial(route, layers, sure)) for layers, sure in ROUTED]
    for what, made in tqdm(todo, disable=None):
        if what not in done:
            rows.append(what | figures(truth, made(), ids))
            save()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--model", default="smollm2-135m")
    p.add_argument("--fresh", action="store_true", help="measure all rows anew")
    p.add_argument("--out", type=Path, default=RESULTS / "depth_loss.json")
    known = p.parse_args()
    compile_cache()
    m = tokeff.load(known.model)
    about = {"environment": describe([]) | {"command": "python experiments/depth_loss.py"}}
    about |= {"model": known.model, "length": LENGTH, "texts": TEXTS}
    rows: list[dict[str, Any]] = [] if known.fresh or not known.out.exists() else json.loads(known.out.read_text())["rows"]
    sweep(m, rows, lambda: known.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n"))
    for row in rows:
        what = ", ".join(f"{name} {x}" for name, x in row.items() if name not in FIGURES)
        print(f"{what:<70} skips {row['skipped']:.2f}, KL {row['kl']:.3f}, perplexity {row['perplexity']:.2f}, agrees {row['agree']:.2f}")


if __name__ == "__main__":
    main()
