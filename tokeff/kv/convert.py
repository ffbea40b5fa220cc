"""TransMLA's calibration (Meng et al. 2025): the bases of a model's layers, found once on a text and put beside the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tokeff.errors import UserError
from tokeff.generation import Setup, encode, read
from tokeff.kv.latent_bases import bases, directions, raw_rows, side_names
from tokeff.models.flow import Here
from tokeff.models.load import Model


def convert(m: Model, text: str | Sequence[int], rope: float | int = 0.125) -> Model:
    """The model with bases of its layers beside the weights, from one calibration text: for `transmla(rank, rope, converted=True)`.

    All directions are kept; the policy's `rank` takes the first ones. The paper calibrates on 256 texts of 2048 tokens of WikiText.
    Raises UserError for a text too short to determine them.
    """
    ids = encode(m, [text] if isinstance(text, str) else [list(text)])
    cfg, wanted = m.cfg, directions(rope, m.cfg.K, m.cfg.H)
    if len(ids[0]) < wanted:
        raise UserError(f"{len(ids[0])} tokens do not determine {wanted} directions of {cfg.name}; calibrate on a longer text")
    prompt, blocks = read(m, ids, Setup()), []
    for i, (w, rows) in enumerate(zip(m.params.blocks, prompt.layers, strict=True)):
        k, v, _ = raw_rows(rows, Here(i, cfg))
        found = bases(k, v, rope, wanted)
        down, gain = side_names(rope, cfg.K, cfg.H)
        blocks.append(w.replace(side=(w.side or {}) | {down: found.down_BKHY[0], gain: found.gain_B[0]}))
    return dataclasses.replace(m, params=m.params.replace(blocks=tuple(blocks)))
