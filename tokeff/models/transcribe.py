"""Sound to text in one call: windows of 30 seconds in batches through the encoder, then greedy transcripts, joined by clip."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.models.audio import HOP, RATE, log_mel, windows
from tokeff.models.flow import EMPTY
from tokeff.models.whisper import encode, greedy, listen
from tokeff.models.whisper_load import Whisper
from tokeff.reduce.merge import Reducer


def pieces(m: Whisper, sounds: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """(mel_BTI of all windows of all sounds, which sound each window is of). UserError where there are none."""
    if not sounds:
        raise UserError("there is no sound to transcribe; give at least one")
    frames = 2 * m.cfg.S
    cut = [(i, piece) for i, x in enumerate(sounds) for piece in windows(x, frames * HOP / RATE)]
    return np.stack([log_mel(piece, m.cfg.I, frames) for _, piece in cut]), [i for i, _ in cut]


def transcribe(
    m: Whisper,
    sounds: Sequence[np.ndarray],
    *,
    reduce: Reducer | None = None,
    drop: tuple[int, ...] = (),
    most: int = 200,
    batch: int = 4,
) -> list[str]:
    """The greedy transcript of each sound (float samples at `audio.RATE`; see `audio.read_wav`), one string a sound.

    reduce, drop: rows taken away in the encoder, as in `whisper.encode`. most: tokens of a window's transcript. batch: windows at a time;
    the last batch is filled up, so that one program serves all.
    """
    mel_BTI, owner = pieces(m, sounds)
    texts, tok = [""] * len(sounds), m.tok
    size = min(batch, len(mel_BTI))
    for start in range(0, len(mel_BTI), size):
        some = mel_BTI[start : start + size]
        some = np.concatenate([some, np.repeat(some[:1], size - len(some), axis=0)])
        rows = encode(m.params, m.cfg, jnp.asarray(some), reduce=reduce, drop=drop)
        ids_BT = np.asarray(greedy(m.params, m.cfg, listen(m.params, rows, proportional=reduce is not None), most))
        for i, ids in zip(owner[start:], ids_BT):
            texts[i] += tok.decode(ids[ids != EMPTY])
    return [text.strip() for text in texts]
