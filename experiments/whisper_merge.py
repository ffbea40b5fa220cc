"""What Whisper's transcripts lose when its encoder merges rows, and what the encoder gains, on real speech.

    python experiments/whisper_merge.py               # 9 windows of 8 clips at 4 budgets; about 6 minutes on 2 cores

Claim: two thirds of 1500 rows hold what a window of 30 seconds says, nearly so a third, because neighbouring rows are alike. Layers
hold `share` of the rows in the mean, counted behind their merge. `at_once`: the first layer takes all; else each layer goes on with the
same share of what entered it. Compared are merging by likeness (ToMe), and two rules that do not look: means over neighbours, and rows
dropped at random. `kl` is the divergence of the decoder's next-token distributions from those over all rows, along the transcript that
all rows give (nats a token), `agree` how often the likeliest token is the same there; both with a t interval over windows. `wer` are
word errors of the clips that have a transcript (words inserted, deleted and replaced, over words), `changed` the same against the
transcript that all rows give, over all clips. Seconds are those of one window through the encoder; the rounds of all programs take
turns. `flops` is what its matrix products cost, as a share of those over all rows.
Writes experiments/results/whisper_merge.json, and docs/images/whisper_merged.png from the clip that `--picture` names.

Expected: with two thirds of the rows 2 of 100 words change at most, with a third 5, with a ninth nothing is left; the encoder takes .67,
.42 and .29 of the time. At once, means over neighbours do as well as ToMe: a round that halves the rows leaves it nobody to choose.
Layer by layer ToMe is the better one by far (KL .05 for .34).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.bench.common import interleave
from tokeff.data import speech
from tokeff.evals import stats
from tokeff.evals.hearing import MOST, apart, encoded, errors, log_probs, relative, texts
from tokeff.models.audio import RATE, read_wav
from tokeff.models.transcribe import pieces
from tokeff.models.whisper import encode, greedy, listen
from tokeff.models.whisper_load import Whisper, load_whisper
from tokeff.reduce.baselines import Pooled, RandomDrop
from tokeff.reduce.merge import Reducer, ToMe, to_share
from tokeff.report.environment import describe
from tokeff.report.spectrogram import merged_rows

SHARES = (0.66, 0.33, 0.22, 0.11)
HOW: dict[str, Reducer] = {"ToMe": ToMe(ordered=True), "neighbours": Pooled(), "random": RandomDrop()}
LAYERWISE = (("ToMe", 0.33), ("neighbours", 0.33))  # the rest at once
TIMED = ("ToMe", "neighbours")
ROOT = Path(__file__).parents[1]


def compare(ours: np.ndarray, full: np.ndarray, text_BT: np.ndarray) -> dict[str, Any]:
    """Divergence from all rows and agreement of the likeliest token: means over windows with their intervals."""
    kl, agree = apart(ours, full, text_BT)
    row = {}
    for name, values in (("kl", kl), ("agree", agree)):
        found = stats.mean(values)
        row |= {name: found.value, f"{name}_lo": found.low, f"{name}_hi": found.high}
    return row | {"windows": len(kl)}


def measure(m: Whisper, clips, mel_BTI: np.ndarray, owner: list[int], save: Callable[[list[dict[str, Any]]], None]) -> None:
    """A row for all rows, and one for each method, share and schedule. save: is given all rows so far whenever there is a new one."""
    heard = listen(m.params, encoded(m, mel_BTI, None, ()))
    text = np.asarray(greedy(m.params, m.cfg, heard, MOST))
    full, plain, wanted = log_probs(m, heard, text), texts(m, text, owner), [clip.said for clip in clips]
    wrong, words = (sum(x) for x in zip(*errors(plain, wanted)))

    def shown(said: list[str]) -> dict[str, str]:
        """The transcripts of clips whose text is in the public domain."""
        return {clip.name: line for clip, line in zip(clips, said) if clip.said is not None}

    rows: list[dict[str, Any]] = [{"method": "all rows", "share": 1.0, "rows": m.cfg.S, "texts": shown(plain)}]
    rows[0] |= {"wer": wrong / words, "errors": wrong, "words": words}
    for name, share, at_once in [*((n, s, True) for s in SHARES for n in HOW), *((n, s, False) for n, s in LAYERWISE)]:
        drop = to_share(m.cfg.S, m.cfg.L, share, at_once=at_once)
        heard = listen(m.params, encoded(m, mel_BTI, HOW[name], drop), proportional=True)
        said = texts(m, np.asarray(greedy(m.params, m.cfg, heard, MOST)), owner)
        (wrong, words), (changed, of) = ((sum(x) for x in zip(*errors(said, of))) for of in (wanted, list(plain)))
        row = {"method": name, "share": share, "at_once": at_once, "rows": m.cfg.S - sum(drop), "drop": drop}
        row |= {"flops": relative(m.cfg, drop)}
        row |= {"wer": wrong / words, "errors": wrong, "words": words, "changed": changed / of, "changed_words": changed, "of_words": of}
        row |= compare(log_probs(m, heard, text), full, text)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        rows.append(row | {"texts": shown(said)})
        save(rows)


def seconds(m: Whisper, mel_BTI: np.ndarray, rounds: int) -> list[dict[str, Any]]:
    """Encoder seconds of one window over all rows, and at each share."""
    programs: dict[str, tuple[str, float, tuple[int, ...]]] = {"all rows": ("all rows", 1.0, ())}
    for name in TIMED:
        programs |= {f"{name} {s}": (name, s, to_share(m.cfg.S, m.cfg.L, s, at_once=True)) for s in SHARES}
    one = jnp.asarray(mel_BTI[:1])

    def timer(name: str, drop: tuple[int, ...]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(encode(m.params, m.cfg, one, reduce=HOW[name] if drop else None, drop=drop))
        return time.perf_counter() - start

    took = interleave({key: partial(timer, name, drop) for key, (name, _, drop) in programs.items()}, rounds, "encoder")
    rows = []
    for key, (name, share, drop) in programs.items():
        own, full = np.array(took[key]), np.array(took["all rows"])
        row = {"method": name, "share": share, "seconds": median(own), "fastest": min(own), "of_full": median(own / full)}
        rows.append(row | {"fastest_of_full": min(own) / min(full), "flops": relative(m.cfg, drop or (0,) * m.cfg.L)})
    return rows


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--picture", default="sense_and_sensibility_01_austen_64kb-0870")
    p.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "whisper_merge.json")
    known = p.parse_args()
    m, clips = load_whisper("whisper-tiny.en"), (*speech.read(), *speech.librivox())
    mel, owner = pieces(m, [read_wav(clip.path) for clip in clips])
    about = describe([]) | {"command": "python experiments/whisper_merge.py"}
    settings = {"model": m.name, "clips": [clip.name for clip in clips], "windows": len(mel), "rounds": known.rounds}
    result: dict[str, Any] = {"environment": about, **settings}

    def save(**new: Any) -> None:
        result.update(new)
        known.out.write_text(json.dumps(result, indent=1) + "\n")

    measure(m, clips, mel, owner, lambda rows: save(rows=rows))
    timed = seconds(m, mel, known.rounds)
    save(load=os.getloadavg()[0], encoder=timed)
    print(*timed, sep="\n", flush=True)
    at = next(i for i, o in enumerate(owner) if clips[o].name == known.picture)
    shown = {share: encoded(m, mel[at : at + 1], HOW["ToMe"], to_share(m.cfg.S, m.cfg.L, share, at_once=True)) for share in SHARES[1:3]}
    end = len(read_wav(clips[owner[at]].path)) / RATE
    picture = merged_rows(mel[at], {f"{share:.0%}": np.asarray(x.source_BS[0]) for share, x in shown.items()}, end + 2)
    (ROOT / "docs" / "images" / "whisper_merged.png").write_bytes(picture.png)


if __name__ == "__main__":
    main()
