"""Every search that a method needs on a model, run on a text that no evaluation reads; then what it is worth on texts that one reads.

    python experiments/calibrate.py smollm2-135m                        # every method; about 8 minutes on 2 cores
    python experiments/calibrate.py smollm2-135m --method TidalDecode   # one of them; the others stay in the file
    python experiments/calibrate.py smollm2-135m --measure              # KL with and without, 4 evaluation texts; about 10 minutes

Writes tokeff/calibrated/MODEL.json: for each method the settings that `tokeff.calibration.settings` gives, and how they were found. All of
it reads chapters 1 to 8 of Persuasion (tokeff/data/text/SOURCES.md), cut into passages one after another; needles are those of the tasks,
with numbers of their own. Budgets of searches are an eighth of the rows, whatever is evaluated later.

- CompressKV: the 4 query heads a layer that look most at a needle while it is answered, over the needles the model answers rightly;
  budgets by the error that 32 rows a layer make in it.
- Double Sparsity: a quarter of the channels by mean |q k|.
- Kascade: four anchor layers by dynamic programming, heads by how alike they choose (tokeff/sparse/anchors.py).
- TidalDecode: the second selecting layer with the smallest KL to the full cache; every other layer, then the neighbours of the best.
- MInference: for each head the pattern with the smallest error, where all read at most 480 rows a block of queries.
- RazorAttention: heads that look at earlier copies of random tokens and behind them; no text at all.
- DuoAttention: the half of the heads whose mean query looks furthest back.
- SWIFT: the halves of layers that drafts do without: the largest share of them at which some choice names 93% of what the model wrote
  behind a passage, as the paper's search wants. Of 13 billion parameters that is 45%, of fewer it is less.

`--measure` leaves drafters out: they change no text, and configs/leaderboard/decoding.py says what they are worth. It reads 4 contexts of
1024 tokens of the evaluation text with 3 needles each, at a budget of a quarter where a method has one. KL
is that of the next token, KL(full || method) in nats over the 128 tokens behind the context, and of the right answers the log-probability.
RazorAttention and DuoAttention keep whole heads, and calibration changes how many: `lot` is as many heads as calibrated, drawn by lot.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import tokeff
from tokeff import calibration
from tokeff.compat import forget_programs
from tokeff.data import sources, tasks
from tokeff.data.haystack import encoder
from tokeff.decode.swift import GOOD, Agreement, find_skips
from tokeff.errors import UserError, nearest, one_line
from tokeff.evals.comparison import compile_cache
from tokeff.evals.cost import dense_bytes, read_bytes
from tokeff.evals.fidelity import Encoded, Quality, Reader, encode_example
from tokeff.generation import Setup, go, new_tokens, read, start
from tokeff.kv import methods as kv
from tokeff.kv.compress import layer_importance, semantic_heads
from tokeff.kv.extend import pack
from tokeff.kv.heads import duo_heads, razor_heads
from tokeff.kv.policy import tree_bytes
from tokeff.listing import METHODS, Method, find
from tokeff.models.load import Model, fingerprint
from tokeff.report.environment import describe
from tokeff.sparse import methods as sparse
from tokeff.sparse.anchors import anchors
from tokeff.sparse.calibrate import calibrate
from tokeff.sparse.patterns import AShape, TopBlocks, VerticalSlash
from tokeff.sparse.search import search

Settings = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is read, in tokens and passages; `seed` is the first of the needles' and of the random tokens'."""

    length: int = 1024  # of a passage
    ahead: int = 128  # tokens that follow it, for KL
    passages: int = 8
    tuned: int = 2  # passages on which KL is measured, setting after setting
    long: int = 2048  # of the one text for patterns of prefill and mean queries
    needles: int = 8  # contexts with three needles each
    errors: int = 4  # of these, on which the error of each layer is measured
    random: int = 512  # random tokens, four times
    budget: float = 0.125
    last: int = 64  # queries of a passage at which choices are compared
    rows: int = 480  # read by a block of queries under a pattern of prefill
    shares: tuple[float, ...] = (0.45, 0.35, 0.25, 0.2, 0.15, 0.1)  # of the halves of layers, left out; tries at each
    tries: int = 100
    seed: int = 1000


@dataclass(frozen=True)
class Text:
    """What the searches read, as token ids."""

    ids: tuple[int, ...]
    needles: tuple[Encoded, ...]

    def passages(self, sizes: Sizes) -> list[Encoded]:
        """Passages one after another, each with the tokens that follow it."""
        step = sizes.length + sizes.ahead
        if len(self.ids) < sizes.passages * step:
            raise UserError(f"{sizes.passages} passages of {step} tokens do not fit a text of {len(self.ids)}; take fewer or shorter ones")
        cuts = [self.ids[a : a + step] for a in range(0, sizes.passages * step, step)]
        return [Encoded(cut[: sizes.length], (), (), cut[sizes.length :], ()) for cut in cuts]


def text_of(m: Model, sizes: Sizes) -> Text:
    """The calibration text, and contexts of it with needles."""
    encode, source = encoder(m.tok), sources.CALIBRATION
    made = (tasks.multi_question(sizes.seed + i, sizes.length, encode, source=source) for i in range(sizes.needles))
    return Text(tuple(m.tok.encode(sources.text(source))), tuple(encode_example(m, example) for example in made))


# -- the searches: each returns (settings, what else is to be known of how they were found)


def compress(m: Model, text: Text, sizes: Sizes) -> tuple[Settings, Settings]:
    asked = [
        (list(x.context + x.questions[i]), x.needles[i], list(x.answers[i]))
        for x in text.needles
        for i in np.flatnonzero(Reader(m, x).quality(Setup()).exact)
    ]
    if not asked:
        raise UserError(f"{m.name} answers no needle of {sizes.length} tokens rightly; its heads cannot be told by them")
    judges = semantic_heads(m, asked, min(4, m.cfg.N))
    read = [(list(x.context), list(x.questions[0] + x.answers[0])) for x in text.needles[: sizes.errors]]
    importance = layer_importance(m, read, kv.compresskv(32, judges=judges))
    found = {"judges": judges, "importance": tuple(round(x, 5) for x in importance)}
    return found, {"needles": len(asked), "of": sum(len(x.questions) for x in text.needles), "contexts": len(read)}


def double(m: Model, text: Text, sizes: Sizes) -> tuple[Settings, Settings]:
    return {"channels": calibrate(m, [x.context for x in text.passages(sizes)])}, {"passages": sizes.passages}


def cascade(m: Model, text: Text, sizes: Sizes) -> tuple[Settings, Settings]:
    default = find("Kascade").settings()
    count = min(len(default["select"]), m.cfg.L - len(default["dense"]))
    select, heads = anchors(m, [x.context for x in text.passages(sizes)], count, sizes.budget, last=sizes.last)
    return {"select": select, "head_map": heads}, {"passages": sizes.passages, "budget": sizes.budget}


def tidal(m: Model, text: Text, sizes: Sizes) -> tuple[Settings, Settings]:
    first, last = max(find("TidalDecode").settings()["dense"]) + 1, m.cfg.L - 1
    readers, kl = [Reader(m, x) for x in text.passages(sizes)[: sizes.tuned]], {}

    def measured(second: int | None) -> float:
        select = (first,) if second is None else (first, second)
        setup = Setup(sparse.tidaldecode(sizes.budget, select=select))
        return float(np.mean([divergence(reader, setup) for reader in readers]))

    for second in tqdm([None, *range(first + 1, last, 2)], desc="second selecting layer", disable=None):
        kl[second] = measured(second)
    best = min(kl, key=kl.get)
    if best is not None:
        kl |= {near: measured(near) for near in (best - 1, best + 1) if first < near < last and near not in kl}
        best = min(kl, key=kl.get)
    said = {"none" if layer is None else str(layer): round(x, 4) for layer, x in sorted(kl.items(), key=lambda x: x[0] or 0)}
    select = (first,) if best is None else (first, best)
    return {"select": select}, {"passages": sizes.tuned, "budget": sizes.budget, "kl": said}


def patterns(m: Model, text: Text, sizes: Sizes) -> tuple[Settings, Settings]:
    """Blocks that each pattern reads: 2 a slash and rows beside them; the window's, one more for where it begins, and the sinks'; top."""
    default = find("MInference").settings()
    R = default["block"]
    if 2 * default["slash"] * R + default["vertical"] > sizes.rows:
        raise UserError(f"vertical-slash reads more than {sizes.rows} rows; raise rows")
    first = -(-default["sinks"] // R)
    window, top = (sizes.rows // R - first - 1) * R + 1, sizes.rows // R
    given = (
        VerticalSlash(R, 0, default["vertical"], default["slash"], first=default["sinks"]),
        AShape(R, 0, default["sinks"], window),
        TopBlocks(R, 0, top),
    )
    heads = search(m, text.ids[: sizes.long], given)
    flat = [i for layer in heads for i in layer]
    counts = {name: flat.count(i) for i, name in enumerate(("vertical_slash", "a_shape", "block_top_k"))}
    return {"top": top, "window": window, "heads": heads}, {"tokens": sizes.long, "rows": sizes.rows, "heads": counts}


def razor(m: Model, text: Text, sizes: Sizes) -> tuple[Settings, Settings]:
    heads = razor_heads(m, tokens=sizes.random, seed=sizes.seed)
    return {"heads": heads}, {"text": None, "random_tokens": sizes.random, "copies": 4, "heads": sum(map(len, heads))}


def duo(m: Model, text: Text, sizes: Sizes) -> tuple[Settings, Settings]:
    heads = duo_heads(m, text.ids[: sizes.long])
    return {"heads": heads}, {"tokens": sizes.long, "heads": sum(map(len, heads))}


def halves(m: Model, text: Text, sizes: Sizes) -> tuple[Settings, Settings]:
    asked, setup = list(text.ids[: sizes.ahead]), Setup()
    ids = [*asked, *new_tokens(go(m, start(m, read(m, [asked], setup), setup, sizes.last), setup, sizes.last, ()))[0]]
    agree, tail, found = [], min(50, sizes.last - 1), ((), ())
    for share in sizes.shares:
        found = find_skips(m, ids, share, tail, tries=sizes.tries, seed=sizes.seed)
        agree.append(round(Agreement.of(m, ids, tail)(found), 3))
        if agree[-1] >= GOOD:
            break
    return {"attention": found[0], "ffn": found[1]}, {"tokens": len(ids), "shares": sizes.shares[: len(agree)], "agree": agree}


SEARCHES: dict[str, Callable[[Model, Text, Sizes], tuple[Settings, Settings]]] = {
    "CompressKV": compress, "DoubleSparsity": double, "Kascade": cascade, "TidalDecode": tidal,
    "MInference": patterns, "RazorAttention": razor, "DuoAttention": duo, "SWIFT": halves,
}  # fmt: skip


def divergence(reader: Reader, setup: Setup) -> float:
    """Mean KL(full || setup) over the tokens behind the context, nats a token."""
    return float(reader.quality(setup).kl(full(reader)).mean())


@cache
def full(reader: Reader) -> Quality:
    """The full cache's figures, measured once a text."""
    return reader.quality(Setup())


def recipe(m: Model, names: list[str], text: Text, sizes: Sizes) -> dict[str, Any]:
    """The file's entry of each method: settings that fit the model, and how they were found."""
    entries = {}
    for name in names:
        start = time.perf_counter()
        forget_programs()
        settings, facts = SEARCHES[name](m, text, sizes)
        seconds = round(time.perf_counter() - start, 1)
        Setup(**{find(name).part: find(name).build(**settings)}).check(m, [m.cfg.max_len - 1], 1)
        entries[name] = {"settings": settings, "recipe": {**facts, "sizes": asdict(sizes), "seconds": seconds}}
        print(f"{name}: {seconds:.0f} s", file=sys.stderr)
    return entries


# -- what it is worth


def measure(m: Model, texts: list[Encoded], found: dict[str, Settings], budget: float = 0.25) -> dict[str, dict[str, Any]]:
    """Of each method: what is held and read, KL and the answers' log-probability of each text, as it is and as it was calibrated."""
    reader, rows = Reader(m, *texts), {}
    base = reader.qualities(Setup())
    for name, settings in found.items():
        method = find(name)
        given = {"budget": budget} if "budget" in method.settings() else {}
        kinds = {"default": given, "calibrated": given | settings}
        if method.calibrates == ("heads",) and method.part == "kv":
            kinds["lot"] = given | {"heads": by_lot(m, sum(map(len, settings["heads"])))}
        rows[name] = {kind: figures(m, reader, base, method, how) for kind, how in kinds.items()}
        print(name, {kind: (row["kl"], row["held"], row["read"]) for kind, row in rows[name].items()}, file=sys.stderr)
    return rows


def by_lot(m: Model, count: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """So many kv heads of the model at random."""
    chosen = np.zeros(m.cfg.L * m.cfg.K, bool)
    chosen[np.random.default_rng(seed).permutation(chosen.size)[:count]] = True
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in chosen.reshape(m.cfg.L, m.cfg.K))


def figures(m: Model, reader: Reader, base: list[Quality], method: Method, settings: Settings) -> dict[str, Any]:
    forget_programs()
    setup = replace(Setup(), **{method.part: method.build(**settings)})
    mine, prompt = reader.qualities(setup), reader.context(setup)
    layers = pack(setup.kv, prompt.layers, setup.room(1), m.cfg)
    whole = dense_bytes(m.cfg, int(prompt.length_B.sum()), m.precision.cache)
    return {
        "held": round(tree_bytes(layers) / whole, 3), "read": round(read_bytes(setup, layers, m.cfg) / whole, 3),
        "kl": [round(float(q.kl(b).mean()), 4) for q, b in zip(mine, base, strict=True)],
        "answer_logprob": [round(float(q.logprob.mean()), 2) for q in mine],
        "exact": sum(int(q.exact.sum()) for q in mine), "full_exact": sum(int(q.exact.sum()) for q in base),
        "asked": sum(len(q.exact) for q in mine),
    }  # fmt: skip


def evaluation(m: Model, n: int = 4, length: int = 1024) -> list[Encoded]:
    """Contexts of the evaluation text with needles, as leaderboards read them."""
    return [encode_example(m, tasks.multi_question(i, length, encoder(m.tok))) for i in range(n)]


# -- the file


def about(m: Model) -> dict[str, Any]:
    source, where = sources.CALIBRATION, describe([])
    return {
        "model": m.name, "fingerprint": fingerprint(m), "precision": repr(m.precision), "tokeff": tokeff.__version__,
        "commit": where["commit"], "dirty": where["dirty"], "cpu": where["cpu"], "jax": where["jax"],
        "command": f"python experiments/calibrate.py {m.name}",
        "text": {"source": source, "digest": sources.digest(source)},
    }  # fmt: skip


def write(file: Path, found: dict[str, Any]) -> None:
    """Whole or not at all; a line for each method, since lists of channels are long."""
    parts = []
    for key, value in found.items():
        if key in ("methods", "measured"):
            inside = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            parts.append(f' {json.dumps(key)}: {{\n{inside}\n }}')
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    part = file.with_suffix(".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    part.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    os.replace(part, file)


def run(model: str, names: list[str], only_measure: bool) -> None:
    compile_cache()
    m, sizes = tokeff.load(model), Sizes()
    file, old = calibration.file_of(m.name), calibration.read(m.name) if only_measure or len(names) < len(SEARCHES) else None
    kept = json.loads(file.read_text()) if old is not None else {"methods": {}}
    if old is not None:
        old.check(m)
    found = about(m) | {"methods": kept["methods"]} | {key: kept[key] for key in ("measured",) if key in kept}
    if only_measure:
        settings = {name: calibration.settings(m, name) for name in names if find(name).part != "decode"}
        found["measured"] = found.get("measured", {}) | measure(m, evaluation(m), settings)
    else:
        found["methods"] = found["methods"] | recipe(m, names, text_of(m, sizes), sizes)
        found["measured"] = {name: row for name, row in found.get("measured", {}).items() if name not in names}
    write(file, found)
    print(file)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("model", nargs="?", default="smollm2-135m", help="what tokeff.load takes (default: %(default)s)")
    p.add_argument("--method", help="only this one")
    p.add_argument("--measure", action="store_true", help="measure what is in the file instead of searching")
    known = p.parse_args()
    names = [m.name for m in METHODS if m.calibrates]
    try:
        if known.method is not None and known.method not in names:
            raise UserError(f"no method {known.method!r} is calibrated; {nearest(known.method, names)}")
        run(known.model, names if known.method is None else [known.method], known.measure)
    except (UserError, KeyboardInterrupt) as error:
        said, code = one_line(error) or (str(error), 1)
        sys.exit(print(f"error: {said}", file=sys.stderr) or code)


if __name__ == "__main__":
    main()
