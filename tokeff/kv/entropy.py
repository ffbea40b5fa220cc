"""An entropy coder in numpy: range asymmetric numeral systems (Duda 2013), many lanes at once.

A lane is a sequence of symbols with statistics of its own. All lanes advance together, one symbol a step, and share one stream of 16-bit
words: at each step the lanes that run low read one each, in ascending order. A state lies in [2**16, 2**32), so a step moves one word
at most. Decoding ends with every state at 2**16 and every word read; anything else is a damaged stream.
"""

from __future__ import annotations

import numpy as np

BITS = 11  # probabilities are multiples of 2**-11
TOTAL, LOW = 1 << BITS, 1 << 16


def frequencies(count_LA: np.ndarray) -> np.ndarray:
    """uint16 frequencies (lanes, alphabet) that add up to TOTAL in each lane, at least 1 for a symbol that occurs. A < TOTAL."""
    occurs = count_LA > 0
    room = TOTAL - occurs.sum(axis=1, keepdims=True)
    made = occurs + count_LA * room // np.maximum(count_LA.sum(axis=1, keepdims=True), 1)
    made[np.arange(len(made)), made.argmax(axis=1)] += TOTAL - made.sum(axis=1)
    return made.astype(np.uint16)


def encode(symbol_LT: np.ndarray, length_L: np.ndarray, frequency_LA: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint16 words, uint32 states of the lanes) of the first `length` symbols of each lane."""
    frequency = frequency_LA.astype(np.uint64)
    start = np.cumsum(frequency, axis=1) - frequency
    state, words = np.full(len(symbol_LT), LOW, np.uint64), []
    for t in reversed(range(int(length_L.max(initial=0)))):
        lane = np.flatnonzero(length_L > t)
        symbol, x = symbol_LT[lane, t], state[lane]
        f = frequency[lane, symbol]
        full = x >= f << np.uint64(32 - BITS)
        words.append(x[full].astype(np.uint16))
        x[full] >>= np.uint64(16)
        state[lane] = ((x // f) << np.uint64(BITS)) + x % f + start[lane, symbol]
    return np.concatenate([np.zeros(0, np.uint16), *reversed(words)]), state.astype(np.uint32)


def decode(words: np.ndarray, state_L: np.ndarray, length_L: np.ndarray, frequency_LA: np.ndarray) -> np.ndarray:
    """symbol_LT, T the longest length; zeros past a lane's length. Raises ValueError for a stream that no `encode` wrote."""
    L, A = frequency_LA.shape
    if (frequency_LA.astype(np.int64).sum(axis=1) != TOTAL).any() or (state_L < LOW).any():
        raise ValueError("statistics or states that no encoder writes")
    frequency = frequency_LA.astype(np.uint64)
    start = np.cumsum(frequency, axis=1) - frequency
    slots = np.repeat(np.tile(np.arange(A, dtype=np.uint8), L), frequency_LA.reshape(-1)).reshape(L, TOTAL)
    state, at, T = state_L.astype(np.uint64), 0, int(length_L.max(initial=0))
    out = np.zeros((L, T), np.uint8)
    for t in range(T):
        lane = np.flatnonzero(length_L > t)
        x = state[lane]
        slot = x & np.uint64(TOTAL - 1)
        out[lane, t] = symbol = slots[lane, slot]
        x = frequency[lane, symbol] * (x >> np.uint64(BITS)) + slot - start[lane, symbol]
        low = x < LOW
        more = words[at : at + int(low.sum())]
        if len(more) < low.sum():
            raise ValueError("the stream ends early")
        x[low] = (x[low] << np.uint64(16)) | more
        state[lane], at = x, at + len(more)
    if at != len(words) or (state != LOW).any():
        raise ValueError("the stream does not end where it should")
    return out
