"""Smaller files of a compressed context: to the bit, or with rows written in bins (CacheGen, Liu et al. 2024).

CacheGen's three insights (sec. 5.2): neighbouring tokens have similar rows, so a row is written as its difference from the first of its
group, the anchor; deeper layers bear coarser bins; and symbols are coded with statistics of each layer and channel. The stream comes in
pieces of rows that decode one by one. Only arrays of keys and values in full precision (`..CH`, `..SH`, `..RH`) are written in bins;
orders, codes, statistics and everything else are exact.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokeff.errors import UserError
from tokeff.kv import entropy
from tokeff.sharding import letters

LARGEST = 127  # symbols beyond are written out in full


@dataclass(frozen=True)
class Compact:
    """How coarsely rows are written.

    sizes: the bin of the first, the middle and the last third of the layers, in standard deviations of a channel over the context. A number
    comes back within half a bin, in a lossy way. group: rows that share an anchor, which is written in 8 bits a channel; 0 has none,
    and rows are differences from their channel's mean. piece: rows of a piece of the stream.
    """

    sizes: tuple[float, float, float] = (0.25, 0.5, 0.75)
    group: int = 10
    piece: int = 1000

    def check(self) -> None:
        if len(self.sizes) != 3 or not all(0.001 <= size < 100 for size in self.sizes):
            raise UserError(f"sizes {self.sizes} must be three bins in standard deviations, for example (0.25, 0.5, 0.75)")
        if self.group < 0 or self.group == 1 or self.piece < 1 or (self.group and self.piece % self.group):
            raise UserError(f"group={self.group} must be 0 or at least 2, and piece={self.piece} whole groups; try 10 and 1000")


EXACT = "exact"
Array = Any  # a numpy array, or the shape and dtype of one
Leaf = tuple[str, int, Array]  # name of its field, which third of the layers it lies in, array


def check(compact: Compact | str | None) -> None:
    if isinstance(compact, Compact):
        compact.check()
    elif compact not in (None, EXACT):
        raise UserError(f"compact={compact!r} is no way to write a context; give 'exact', Compact(), or None for plain arrays")


def binned(name: str, x: Array) -> bool:
    """Whether an array holds rows of keys or values in full precision."""
    dims = letters(name)
    return len(dims) == len(x.shape) >= 3 and dims[-1] == "H" and dims[-2] in "CSR" and x.dtype.kind not in "iub" and x.size > 0


# -- exactly: planes of bytes, deflated


def to_planes(x: np.ndarray) -> np.ndarray:
    """The bytes of an array, all first bytes of its numbers first, deflated."""
    raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(-1, x.dtype.itemsize)
    return np.frombuffer(zlib.compress(raw.T.tobytes(), 6), np.uint8)


def from_planes(data: np.ndarray, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """The inverse; ValueError unless exactly these bytes come out. Never makes more than they are."""
    dtype, n = np.dtype(dtype), int(np.prod(shape, dtype=np.int64))
    inflate, size = zlib.decompressobj(), n * dtype.itemsize
    try:
        raw = inflate.decompress(np.asarray(data, np.uint8).tobytes(), size) if size else b""
        more = inflate.decompress(inflate.unconsumed_tail, 1) if size else b""
    except zlib.error as e:
        raise ValueError(f"cannot inflate: {e}") from e
    if len(raw) != size or more or not (inflate.eof or not size):
        raise ValueError(f"other than {size} bytes come out")
    return np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, n).T.copy().view(dtype).reshape(shape)


# -- in bins


@dataclass
class Stream:
    """One array on its way: `heads` sequences of rows of H channels, those with a number other than 0 first."""

    y_hCH: np.ndarray
    count_h: np.ndarray
    live_hC: np.ndarray

    @staticmethod
    def of(x: np.ndarray) -> Stream:
        y = x.reshape(-1, *x.shape[-2:]).astype(np.float32)
        live = (y != 0).any(axis=-1)
        at = np.argsort(~live, axis=1, kind="stable")
        return Stream(np.take_along_axis(y, at[..., None], axis=1), live.sum(axis=1), live)


def mean_and_step(stream: Stream, size: float) -> tuple[np.ndarray, np.ndarray]:
    """(mean_hH, step_hH): of each channel over its rows the mean, and `size` standard deviations; 1 for a channel that never changes."""
    n = np.maximum(stream.count_h, 1)[:, None]
    held = (np.arange(stream.y_hCH.shape[1]) < stream.count_h[:, None])[..., None]
    mean = stream.y_hCH.sum(axis=1, dtype=np.float64) / n
    spread = np.sqrt((np.square(stream.y_hCH - mean[:, None]) * held).sum(axis=1) / n)
    return mean.astype(np.float32), np.where(spread > 0, size * spread, 1).astype(np.float32)


def anchors(stream: Stream, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(code_hGH uint8, low_hH, step_hH) of the first row of every group, 256 levels a channel from the smallest to the largest."""
    first = stream.y_hCH[:, ::group]
    held = (np.arange(first.shape[1]) * group < stream.count_h[:, None])[..., None]
    low = np.where(held, first, np.inf).min(axis=1, initial=np.inf)
    high = np.where(held, first, -np.inf).max(axis=1, initial=-np.inf)
    low = np.where(np.isfinite(low), low, 0).astype(np.float32)
    step = np.where(high > low, (high - low) / 255, 1).astype(np.float32)
    return np.clip(np.round((first - low[:, None]) / step[:, None]), 0, 255).astype(np.uint8) * held, low, step


def reference(code_hGH, low_hH, step_hH, group: int, C: int) -> np.ndarray:
    """reference_hCH: the decoded anchor of every row."""
    return (low_hH[:, None] + code_hGH * step_hH[:, None])[:, np.arange(C) // group]


def to_bins(stream: Stream, size: float, how: Compact) -> dict[str, np.ndarray]:
    """What describes the rows (mean or anchors, steps), and the integer symbols_hCH, 0 where there is no row and at anchors."""
    (_, C, _), (mean, step) = stream.y_hCH.shape, mean_and_step(stream, size)
    if how.group:
        code, low, unit = anchors(stream, how.group)
        base, about = reference(code, low, unit, how.group, C), {"code": code, "low": low, "unit": unit}
    else:
        base, about = mean[:, None], {"mean": mean}
    symbol = np.round((stream.y_hCH - base) / step[:, None])
    symbol[~in_bins(stream.count_h, C, how.group)] = 0
    return about | {"step": step, "symbol": symbol.astype(np.int64)}


def in_bins(count_h: np.ndarray, C: int, group: int) -> np.ndarray:
    """bool_hC: rows that are written as symbols: those that are there, without anchors."""
    row = np.arange(C)
    return (row < count_h[:, None]) & ((row % group != 0) if group else True)


# -- the file


def write(leaves: Sequence[Leaf], how: Compact | str) -> dict[str, np.ndarray]:
    """The arrays of a file. leaves: every array of a context."""
    out: dict[str, np.ndarray] = {}
    for i, (name, third, x) in enumerate(leaves):
        if isinstance(how, Compact) and binned(name, x) and np.isfinite(x.astype(np.float32)).all():
            out |= {f"{i}.{key}": value for key, value in write_bins(x, how.sizes[third], how).items()}
        else:
            out[f"{i}.planes"] = to_planes(x)
    return out


def write_bins(x: np.ndarray, size: float, how: Compact) -> dict[str, np.ndarray]:
    """One array of rows: what describes it, deflated, and the pieces of its stream."""
    stream = Stream.of(x)
    about = to_bins(stream, size, how)
    symbol = about.pop("symbol")
    far = np.abs(symbol) > LARGEST
    out = {"far_at": np.flatnonzero(far), "far": symbol[far]}
    symbol = np.where(far, 0, symbol)
    least = int(symbol.min(initial=0))
    (h, C, H), A = symbol.shape, int(symbol.max(initial=0)) - least + 1
    coded = in_bins(stream.count_h, C, how.group)
    lane = np.arange(h * H).reshape(h, 1, H)
    frequency = entropy.frequencies(np.bincount((lane * A + symbol - least)[coded].reshape(-1), minlength=h * H * A).reshape(-1, A))
    for key, value in (about | {"live": np.packbits(stream.live_hC), "frequency": frequency}).items():
        out[key] = to_planes(value)
    out["shape"] = np.asarray([least, A], np.int64)
    for p, a in enumerate(range(0, C, how.piece)):
        lanes, length = lanes_of(symbol[:, a : a + how.piece] - least, coded[:, a : a + how.piece])
        out[f"words{p}"], out[f"states{p}"] = entropy.encode(lanes, length, frequency)
    return out


def lanes_of(symbol_hCH: np.ndarray, coded_hC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(symbol_LT of the coded rows, length_L): one lane a head and channel."""
    h, C, H = symbol_hCH.shape
    at = np.argsort(~coded_hC, axis=1, kind="stable")
    rows = np.take_along_axis(symbol_hCH, at[..., None], axis=1)
    return rows.swapaxes(1, 2).reshape(h * H, C), np.repeat(coded_hC.sum(axis=1), H)


def read(leaves: Sequence[Leaf], how: Compact | str, get: Callable[[str], np.ndarray]) -> list[np.ndarray]:
    """The arrays again. leaves: names, thirds and shapes, from the policy and never from the file. get: an array of the file by name,
    KeyError where there is none. Raises ValueError for a file that `write` did not make; nothing is made larger than the leaves."""
    out = []
    for i, (name, _, like) in enumerate(leaves):
        try:
            out.append(from_planes(get(f"{i}.planes"), like.shape, like.dtype))
        except KeyError:
            if not (isinstance(how, Compact) and binned(name, like)):
                raise
            out.append(read_bins(like, how, lambda key, i=i: get(f"{i}.{key}")))
    return out


def read_bins(like: Array, how: Compact, get: Callable[[str], np.ndarray]) -> np.ndarray:
    """One array of rows."""
    C, H = like.shape[-2:]
    h = int(np.prod(like.shape[:-2]))

    def known(key: str, shape: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        return from_planes(get(key), shape, dtype)

    bits = known("live", (-(-h * C // 8),), np.uint8)
    live = np.unpackbits(bits, count=h * C).reshape(h, C).astype(bool)
    count = live.sum(axis=1)
    if how.group:
        groups = -(-C // how.group)
        base = reference(known("code", (h, groups, H), np.uint8), known("low", (h, H)), known("unit", (h, H)), how.group, C)
    else:
        base = known("mean", (h, H))[:, None]
    step, symbol = known("step", (h, H)), read_symbols(get, known, count, (h, C, H), how)
    y = np.where((np.arange(C) < count[:, None])[..., None], base + symbol * step[:, None], 0).astype(np.float32)
    at = np.argsort(np.argsort(~live, axis=1, kind="stable"), axis=1)
    return np.take_along_axis(y, at[..., None], axis=1).astype(like.dtype).reshape(like.shape)


def read_symbols(get, known, count_h: np.ndarray, shape: tuple[int, int, int], how: Compact) -> np.ndarray:
    """symbol_hCH, piece by piece."""
    h, C, H = shape
    least, A = (int(x) for x in np.asarray(get("shape"), np.int64).reshape(2))
    if not (-LARGEST <= least <= 0 and 0 < A <= 2 * LARGEST + 1):
        raise ValueError(f"an alphabet of {A} symbols from {least}")
    frequency, coded = known("frequency", (h * H, A), np.uint16), in_bins(count_h, C, how.group)
    symbol = np.zeros(shape, np.int64)
    for p, a in enumerate(range(0, C, how.piece)):
        part = coded[:, a : a + how.piece]
        length = np.repeat(part.sum(axis=1), H)
        words, states = get(f"words{p}"), get(f"states{p}")
        if words.dtype != np.uint16 or words.ndim != 1 or states.dtype != np.uint32 or states.shape != (h * H,):
            raise ValueError(f"piece {p} is no stream of {h * H} lanes")
        lanes = entropy.decode(words, states, length, frequency).astype(np.int64) + least
        rows = np.zeros((h, part.shape[1], H), np.int64)
        rows[:, : lanes.shape[1]] = lanes.reshape(h, H, -1).swapaxes(1, 2)
        back = np.argsort(np.argsort(~part, axis=1, kind="stable"), axis=1)
        symbol[:, a : a + how.piece] = np.where(part[..., None], np.take_along_axis(rows, back[..., None], axis=1), 0)
    at, far = (np.asarray(get(key)) for key in ("far_at", "far"))
    if at.ndim != 1 or at.shape != far.shape or at.dtype.kind != "i" or far.dtype.kind != "i" or len(at) > symbol.size:
        raise ValueError("symbols written in full do not fit")
    if len(at) and not (at.min() >= 0 and at.max() < symbol.size):
        raise ValueError("symbols written in full lie outside the array")
    symbol.reshape(-1)[at] = far
    return symbol
