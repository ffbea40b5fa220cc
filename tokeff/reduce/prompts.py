"""What is taken out of a prompt before the model reads it, and subtokens of a word that enter as one row: functions of token ids.

They work on the host and on lists, one prompt at a time, and leave fewer ids or fewer rows; everything behind them (passes, policies,
drafters) sees an ordinary prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.errors import UserError
from tokeff.generation import bucket, pad
from tokeff.kv.prefill import Embeds, Gather, blank, run_layers
from tokeff.models.config import Config, Params
from tokeff.models.flow import EMPTY
from tokeff.models.load import Model
from tokeff.models.tokenizer import Tokenizer
from tokeff.models.transformer import embed, orders, unembed

STOP_WORDS = frozenset((
    "a", "about", "above", "after", "again", "all", "also", "am", "an", "and", "any", "are", "as", "at", "be", "been", "before",
    "being", "below", "between", "both", "but", "by", "can", "could", "did", "do", "does", "doing", "down", "during", "each", "few",
    "for", "from", "further", "had", "has", "have", "having", "he", "her", "here", "hers", "him", "his", "how", "i", "if", "in", "into",
    "is", "it", "its", "itself", "just", "me", "more", "most", "my", "myself", "no", "nor", "not", "of", "off", "on", "once", "only",
    "or", "other", "our", "ours", "out", "over", "own", "same", "she", "should", "so", "some", "such", "than", "that", "the", "their",
    "theirs", "them", "then", "there", "these", "they", "this", "those", "through", "to", "too", "under", "until", "up", "us", "very",
    "was", "we", "were", "what", "when", "where", "which", "while", "who", "whom", "why", "will", "with", "would", "you", "your",
    "yours",
))  # fmt: skip
"""English function words."""

PIECE = 64  # rows whose logits are held at once


def information(m: Model, ids: Sequence[int]) -> np.ndarray:
    """nats_T: self-information of each token, -log p(token | tokens before), by one dense pass; infinity for the first.

    Raises UserError for a prompt without tokens or longer than the model reads.
    """
    if not 0 < len(ids) <= m.cfg.max_len:
        raise UserError(f"a prompt of {len(ids)} tokens cannot be read; give 1 to {m.cfg.max_len}")
    tokens, length = pad([ids])
    flow = embed(m.params, m.cfg, tokens, orders(length, tokens.shape[1]))
    flow, _ = run_layers(m.params, m.cfg, flow, blank(m.cfg, 1, length, m.precision.cache), policy=Gather())
    follows = jnp.pad(tokens, ((0, 0), (0, 1)))[:, 1:]
    parts = [slice(a, a + PIECE) for a in range(0, tokens.shape[1], PIECE)]
    nats = np.concatenate([np.asarray(_nats(m.params, flow.x_BTD[:, p], follows[:, p], cfg=m.cfg))[0] for p in parts])
    return np.concatenate([[np.inf], nats[: len(ids) - 1]])


@partial(jax.jit, static_argnames="cfg")
def _nats(params: Params, x_BTD: jax.Array, id_BT: jax.Array, *, cfg: Config) -> jax.Array:
    """-log p of the token that follows each row."""
    logits = unembed(params, cfg, x_BTD)
    return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, id_BT[..., None], axis=-1)[..., 0]


def selective_context(
    m: Model, ids: Sequence[int], share: float = 0.5, *, units: Sequence[int] | None = None, last: int = 0, nats: np.ndarray | None = None
) -> list[int]:
    """The ids that say most: those at or above the (1 - share) quantile of self-information (Selective Context, Li et al. 2023).

    units: the unit (word, phrase, sentence) of each token, such as `words` gives; a unit stays or goes as a whole, by the mean over its
    tokens, as in the released code (the paper adds up). Tokens count for the quantile one by one. last: so many last tokens (a question)
    stay whatever they say. nats: self-information from another, smaller model with the same tokens. UserError for shares outside (0, 1].
    """
    if not 0 < share <= 1:
        raise UserError(f"share {share} of a prompt cannot be kept; give a fraction in (0, 1]")
    said = information(m, ids) if nats is None else np.asarray(nats, np.float64)
    if said.shape != (len(ids),) or np.isnan(said).any():
        raise UserError(f"nats must be a number for each of {len(ids)} tokens; give what information(m, ids) returns")
    if units is not None and len(units) != len(ids):
        raise UserError(f"there are {len(units)} units for {len(ids)} tokens; give one for each")
    said = np.where(np.isinf(said), np.max(said, initial=0.0, where=np.isfinite(said)), said)
    said = said if units is None else mean_of(said, units)
    keep = said >= np.quantile(said, 1 - share)
    keep[max(len(ids) - last, 0) :] = True
    return [t for t, stays in zip(ids, keep, strict=True) if stays]


def mean_of(x_T: np.ndarray, units: Sequence[int]) -> np.ndarray:
    """Of each token the mean over its unit."""
    _, at = np.unique(units, return_inverse=True)
    return (np.bincount(at, x_T) / np.bincount(at))[at]


def without_stop_words(tok: Tokenizer, ids: Sequence[int], words_out: frozenset[str] = STOP_WORDS, *, last: int = 0) -> list[int]:
    """The ids without those of words in `words_out` (lower case), which must be whole words. last: so many last tokens stay."""
    unit, text = np.asarray(words(tok, ids)), {}
    for piece, u in zip(pieces(tok, ids), unit, strict=True):
        text[u] = text.get(u, "") + piece
    stays = [text[u].strip().lower() not in words_out or t >= len(ids) - last for t, u in enumerate(unit)]
    return [i for i, keep in zip(ids, stays, strict=True) if keep]


def pieces(tok: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text, a space in front of it included. Tokens that are part of a character give what they decode to."""
    alone, found = [tok.decode([i], special=True) for i in ids], []
    for t, (i, own) in enumerate(zip(ids, alone, strict=True)):
        both = tok.decode([ids[t - 1], i], special=True) if t else own
        found.append(both[len(alone[t - 1]) :] if t and both.startswith(alone[t - 1]) else own)
    return found


def words(tok: Tokenizer, ids: Sequence[int]) -> list[int]:
    """The number of each token's word or identifier: subtokens belong together where letters, digits or underscores meet."""
    unit, before = [], ""
    for piece in pieces(tok, ids):
        joins = bool(before) and bool(piece) and letter(before[-1]) and letter(piece[0])
        unit.append((unit[-1] + (not joins)) if unit else 0)
        before = piece
    return unit


def letter(c: str) -> bool:
    """Whether a character can stand in an identifier."""
    return c.isalnum() or c == "_"


def merged_words(m: Model, ids: Sequence[Sequence[int]], units: Sequence[Sequence[int]] | None = None):
    """(tokens_BT, length_B, Embeds) for `prefill`: the mean of the embeddings of a word's subtokens enters as one row.

    The mean rule of Saad et al. (2025) for identifiers of code. There encoders read rows without gaps; here a row stands at the place of
    its word's last subtoken, so tokens, lengths and drafters stay those of the text. units: numbers that do not fall, equal for tokens that
    become one row; words by default.
    """
    units = [words(m.tok, row) for row in ids] if units is None else units
    for row, unit in zip(ids, units, strict=True):
        if not row or len(unit) != len(row) or any(b < a for a, b in zip(unit, unit[1:])):
            raise UserError("units must be one number for each token, and none smaller than the one before")
    tokens, length = pad(ids)
    ends = [[t for t in range(len(u)) if t + 1 == len(u) or u[t + 1] != u[t]] for u in units]
    M = bucket(max(map(len, ends)))
    place, row = np.full((len(ends), M), EMPTY, np.int32), np.full(tokens.shape, EMPTY, np.int32)
    for b, end in enumerate(ends):
        place[b, : len(end)] = end
        row[b, : end[-1] + 1] = np.searchsorted(end, np.arange(end[-1] + 1))
    x = embed(m.params, m.cfg, tokens, orders(length, tokens.shape[1])).x_BTD
    return tokens, length, Embeds(mean_rows(x, jnp.asarray(row), M), jnp.asarray(place))


def mean_rows(x_BTD: jax.Array, row_BT: jax.Array, M: int) -> jax.Array:
    """x_BMD: the mean of the rows that go to each of M rows; row EMPTY goes nowhere, and a row that gets nothing is 0."""

    def mean(x_TD, row_T):
        at = jnp.where(row_T == EMPTY, M, row_T)  # out of range is dropped
        total, count = (jax.ops.segment_sum(a, at, M) for a in (x_TD.astype(jnp.float32), jnp.ones(at.shape, jnp.float32)))
        return total / jnp.maximum(count, 1)[:, None]

    return jax.vmap(mean)(x_BTD, row_BT).astype(x_BTD.dtype)
