"""Which prompt tokens a method kept: the data, how it is stored, and what a picture needs of it."""

import dataclasses
import io
import json
import pathlib
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Kept:
    """The rows each layer and kv head held (or read) for one prompt.

    `orders` has one (K, C) integer array a layer, with -1 for an empty slot; layers and heads may hold different
    numbers of rows, and one (L, K, C) array will do where they do not. `tokens` is the text of each prompt token,
    `needles` the (start, end) token spans to point out.
    """

    orders: Sequence[np.ndarray]
    tokens: tuple[str, ...]
    needles: tuple[tuple[int, int], ...] = ()

    def share_LS(self) -> np.ndarray:
        """Return, for each layer and prompt position, the share of heads that kept the position."""
        length = len(self.tokens)
        share_LS = np.zeros((len(self.orders), length), np.float32)
        for layer, order_KC in enumerate(self.orders):
            order_KC = np.asarray(order_KC)
            kept_KS = np.zeros((len(order_KC), length), bool)
            head, slot = np.nonzero((order_KC >= 0) & (order_KC < length))
            kept_KS[head, order_KC[head, slot]] = True
            share_LS[layer] = kept_KS.mean(axis=0)
        return share_LS


def to_bytes(kept: Kept) -> bytes:
    """Return the contents of the npz file that holds `kept`."""
    words = json.dumps({"tokens": list(kept.tokens), "needles": [[int(a), int(b)] for a, b in kept.needles]})
    arrays = {"text": np.frombuffer(words.encode(), np.uint8)}
    arrays |= {f"layer_{i:03d}": np.asarray(order_KC, np.int32) for i, order_KC in enumerate(kept.orders)}
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)  # pyright: ignore[reportArgumentType]
    return out.getvalue()


def read(path: pathlib.Path) -> Kept:
    """Read a file written from `to_bytes`. Holds plain arrays only: nothing in it is run."""
    with np.load(path, allow_pickle=False) as file:
        words = json.loads(file["text"].tobytes())
        orders = [file[name] for name in sorted(file.files) if name.startswith("layer_")]
    return Kept(orders, tuple(map(str, words["tokens"])), tuple((int(a), int(b)) for a, b in words["needles"]))


def windows(length: int, needles: Sequence[tuple[int, int]], edge: int = 96, around: int = 48) -> list[tuple[int, int]]:
    """Return the (start, end) spans of a long text worth showing: its start, its end, and around every needle."""
    wanted = [(0, edge), (length - edge, length), *((a - around, b + around) for a, b in needles)]
    spans: list[tuple[int, int]] = []
    for a, b in sorted((max(a, 0), min(b, length)) for a, b in wanted):
        if spans and a <= spans[-1][1] + around // 2:  # a gap too small to be worth cutting out
            spans[-1] = (spans[-1][0], max(b, spans[-1][1]))
        elif a < b:
            spans.append((a, b))
    return spans


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of text shown in one shade; a gap has no text and stands for `skipped` tokens."""

    text: str
    level: int = 0
    needle: bool = False
    skipped: int = 0


def pieces(kept: Kept, levels: int = 10) -> list[Piece]:
    """Return the text as pieces shaded by the share of (layer, head) pairs that kept each token, in `levels` steps."""
    share_S = kept.share_LS().mean(axis=0)
    level_S = np.ceil(share_S * levels - 1e-6).astype(int)  # 0 only where no head of any layer kept the token
    needle_S = np.zeros(len(kept.tokens), bool)
    for a, b in kept.needles:
        needle_S[a:b] = True
    shown: list[Piece] = []
    previous = 0
    for a, b in windows(len(kept.tokens), kept.needles):
        if a > previous:
            shown.append(Piece("", skipped=a - previous))
        shown.extend(_merge(kept.tokens, level_S, needle_S, a, b))
        previous = b
    return shown


def _merge(tokens: Sequence[str], level_S: np.ndarray, needle_S: np.ndarray, a: int, b: int) -> list[Piece]:
    """Return the tokens of one window, neighbours of one shade joined into one piece."""
    joined: list[Piece] = []
    for i in range(a, b):
        level, needle = int(level_S[i]), bool(needle_S[i])
        if joined and (joined[-1].level, joined[-1].needle) == (level, needle):
            joined[-1] = Piece(joined[-1].text + tokens[i], level, needle)
        else:
            joined.append(Piece(tokens[i], level, needle))
    return joined
