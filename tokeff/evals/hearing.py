"""What Whisper loses and gains when its encoder reduces rows: word errors, divergence of the transcripts, and the encoder's seconds. The
sound part of `tokeff.evals.reduction`, and what `experiments/whisper_merge.py` measures with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.bench import common
from tokeff.data import speech
from tokeff.evals.stats import mean
from tokeff.models.audio import read_wav
from tokeff.models.fetch import cache_dir
from tokeff.models.flow import EMPTY
from tokeff.models.presets import SOUNDS, SPEECH
from tokeff.models.transcribe import pieces
from tokeff.models.whisper import Encoded, Heard, decode, encode, greedy, listen, silence
from tokeff.models.whisper_config import WhisperConfig
from tokeff.models.whisper_load import Whisper, load_whisper
from tokeff.reduce.baselines import Pooled, RandomDrop
from tokeff.reduce.merge import Reducer, ToMe, to_share

MOST = 128  # tokens of a window's transcript
AT_ONCE = ", at once"
RULES: dict[str, Reducer] = {"ToMe": ToMe(ordered=True), "Pooled": Pooled(), "Random": RandomDrop()}
BASELINES = tuple(f"{name}{end}" for name in ("Pooled", "Random") for end in ("", AT_ONCE))
METHODS = tuple(f"{name}{end}" for end in ("", AT_ONCE) for name in RULES)
"""Every layer goes on with the same share of what entered it, or the first layer takes all."""
written = jax.jit(decode, static_argnums=1)


# -- figures


def flops(cfg: WhisperConfig, drop: tuple[int, ...]) -> float:
    """Multiplications of an encoder pass: convolutions, and of each layer attention over the rows that enter and the feed-forward of those
    that leave."""
    left, total = cfg.S, 3 * cfg.D * (2 * cfg.S * cfg.I + cfg.S * cfg.D)
    for r in drop:
        total += 4 * left * cfg.D**2 + 2 * left**2 * cfg.D
        left -= r
        total += 2 * left * cfg.D * cfg.F
    return total


def relative(cfg: WhisperConfig, drop: tuple[int, ...]) -> float:
    """`flops` as a share of those over all rows."""
    return flops(cfg, drop) / flops(cfg, (0,) * cfg.L)


def encoded(m: Whisper, mel_BTI: np.ndarray, how: Reducer | None, drop: tuple[int, ...]) -> Encoded:
    """The windows through the encoder, one by one."""
    rows = [encode(m.params, m.cfg, jnp.asarray(mel_BTI[i : i + 1]), reduce=how, drop=drop) for i in range(len(mel_BTI))]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)


def log_probs(m: Whisper, heard: tuple[Heard, ...], text_BT: np.ndarray) -> np.ndarray:
    """log-probabilities_BTV of the tokens of each transcript and of the end after it."""
    start = np.tile(m.cfg.start, (len(text_BT), 1))
    given = np.concatenate([start, np.where(text_BT == EMPTY, m.cfg.eos, text_BT)], axis=1)
    logits, _ = written(m.params, m.cfg, given, 0, heard, silence(m.cfg, *given.shape))
    return np.asarray(jax.nn.log_softmax(logits[:, len(m.cfg.start) - 1 :], axis=-1))


def texts(m: Whisper, text_BT: np.ndarray, owner: Sequence[int]) -> list[str]:
    """The transcript of each clip, its windows joined."""
    joined = [""] * (max(owner) + 1)
    for i, ids in zip(owner, text_BT):
        joined[i] += m.tok.decode(ids[ids != EMPTY])
    return joined


def errors(said: Sequence[str], wanted: Sequence[str | None]) -> list[tuple[int, int]]:
    """(word errors, words) of each clip that has a transcript."""
    return [speech.word_errors(a, b) for a, b in zip(said, wanted) if b is not None]


def rate(clips: Sequence[Sequence[int]], name: str) -> dict[str, float]:
    """Word errors over words, with the 95% interval over clips (drawn again, errors and words together) where there are several."""
    wrong, words = np.asarray(clips, np.float64).reshape(-1, 2).T
    if not words.sum():
        return {}
    found = {name: float(wrong.sum() / words.sum()), f"{name}_n": float(words.sum())}
    if len(words) > 1:
        drawn = np.random.default_rng(0).integers(0, len(words), (9999, len(words)))
        low, high = np.quantile(wrong[drawn].sum(axis=1) / np.maximum(words[drawn].sum(axis=1), 1), (0.025, 0.975))
        found |= {f"{name}_lo": float(low), f"{name}_hi": float(high)}
    return found


def apart(ours: np.ndarray, full: np.ndarray, text_BT: np.ndarray) -> tuple[list[float], list[float]]:
    """Of each window the divergence from all rows (nats a token) and the agreement of the likeliest token, along its transcript."""
    kl, agree = [], []
    for p, q, n in zip(full, ours, (text_BT != EMPTY).sum(axis=1) + 1):
        kl.append(float((np.exp(p[:n]) * (p[:n] - q[:n])).sum(axis=-1).mean()))
        agree.append(float((p[:n].argmax(-1) == q[:n].argmax(-1)).mean()))
    return kl, agree


# -- a row of the report


def missing() -> str | None:
    """None, or what has to be fetched before anything can be heard."""
    for name, preset in {**SPEECH, **SOUNDS}.items():
        if not all((cache_dir() / preset.folder / member.name).exists() for member in preset.members):
            return f"{name} is not in the cache; run `tokeff fetch {name}`"
    return None


def clips_there() -> tuple[speech.Clip, ...]:
    """The clips that are in the cache: those with a package of their own may be missing."""
    more = all((cache_dir() / "librivox" / member.name).exists() for member in speech.LIBRIVOX)
    return (*speech.read(), *(speech.librivox() if more else ()))


@dataclass(eq=False)
class Hearing:
    """The model, its windows, and what it makes of all their rows. windows: the first so many; rounds: how often the encoder is timed."""

    m: Whisper
    clips: tuple[speech.Clip, ...]
    windows: int | None
    rounds: int

    @staticmethod
    def load(windows: int | None, rounds: int) -> Hearing:
        return Hearing(load_whisper("whisper-tiny.en"), clips_there(), windows, rounds)

    def __post_init__(self):
        mel, owner = pieces(self.m, [read_wav(clip.path) for clip in self.clips])
        self.mel_BTI, self.owner = mel[: self.windows], owner[: self.windows]
        last = self.owner[-1]
        cut = self.windows is not None and self.windows < len(owner) and owner[self.windows] == last  # a clip that is not heard to its end
        self.wanted = [None if cut and i == last else clip.said for i, clip in enumerate(self.clips[: last + 1])]
        heard = listen(self.m.params, encoded(self.m, self.mel_BTI, None, ()))
        self.text_BT = np.asarray(greedy(self.m.params, self.m.cfg, heard, MOST))
        self.full, self.plain = log_probs(self.m, heard, self.text_BT), texts(self.m, self.text_BT, self.owner)

    def drop(self, method: str, share: float) -> tuple[int, ...]:
        cfg = self.m.cfg
        return (0,) * cfg.L if share == 1 else to_share(cfg.S, cfg.L, share, at_once=method.endswith(AT_ONCE))

    def figures(self, method: str, share: float) -> dict[str, Any]:
        """Quality, seconds and what is counted. `paired`: what windows are compared by, higher is better."""
        cfg, drop = self.m.cfg, self.drop(method, share)
        how = RULES.get(method.removesuffix(AT_ONCE))
        said, kl, agree = self.plain, [0.0] * len(self.owner), [1.0] * len(self.owner)
        if how is not None:
            heard = listen(self.m.params, encoded(self.m, self.mel_BTI, how, drop), proportional=True)
            said = texts(self.m, np.asarray(greedy(self.m.params, cfg, heard, MOST)), self.owner)
            kl, agree = apart(log_probs(self.m, heard, self.text_BT), self.full, self.text_BT)
        wrong, changed = errors(said, self.wanted), errors(said, list(self.plain))
        left = np.cumsum([cfg.S - drop[0], *(-r for r in drop[1:])])
        return {
            "share": float(left.mean()) / cfg.S, "rows_left": int(left[-1]), "wrong": wrong, "changed": changed,
            "heard_kl": kl, "agree": agree, "paired": [-x for x in kl],
            **self.speed(how, drop), "flops": relative(cfg, drop), "tflops": 2 * flops(cfg, drop) / 1e12,
            "held": int(left[-1]) / cfg.S, "kv_mib": int(left[-1]) * 2 * cfg.D * cfg.layers * 4 / 2**20,
        }  # fmt: skip

    def speed(self, how: Reducer | None, drop: tuple[int, ...]) -> dict[str, Any]:
        """Encoder seconds of one window, in turns with all rows; and until the first token of its transcript can be drawn."""
        one = jnp.asarray(self.mel_BTI[:1])

        def rows(reduce: Reducer | None, drop: tuple[int, ...]) -> Encoded:
            return encode(self.m.params, self.m.cfg, one, reduce=reduce, drop=drop)

        def first(reduce: Reducer | None, drop: tuple[int, ...]) -> jax.Array:
            heard = listen(self.m.params, rows(reduce, drop), proportional=reduce is not None)
            return greedy(self.m.params, self.m.cfg, heard, 1)

        ways = {"mine": (None, ())} if how is None else {"dense": (None, ()), "mine": (how, drop)}
        timers = {name: common.timed(rows, *way) for name, way in ways.items()}
        timers |= {f"first {name}": common.timed(first, *way) for name, way in ways.items()}
        seconds = common.interleave(timers, self.rounds, "encoder")
        mine, mine_first = seconds["mine"], seconds["first mine"]
        dense, dense_first = seconds.get("dense", mine), seconds.get("first dense", mine_first)
        return {
            "prefill_s": median(mine), "dense_prefill_s": median(dense), "encoder_speedup": common.ratio(dense, mine),
            "first_token_s": median(mine_first), "first_token_speedup": common.ratio(dense_first, mine_first),
        }  # fmt: skip


def averaged(part: dict[str, Any]) -> dict[str, Any]:
    """One row as a line of the report: means over windows with their intervals."""
    found = {"n": len(part["heard_kl"]), "agree": mean(part["agree"]).value, "heard_kl": mean(part["heard_kl"]).value}
    found |= rate(part["wrong"], "wer") | rate(part["changed"], "changed")
    if len(part["heard_kl"]) > 1:
        found |= {"heard_kl_lo": mean(part["heard_kl"]).low, "heard_kl_hi": mean(part["heard_kl"]).high}
    return found
