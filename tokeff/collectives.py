"""What a compiled program sends between devices, read from its HLO text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_KINDS = "all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|ragged-all-to-all|reduce-scatter"
_CALL = re.compile(rf"= (\(.*?\)|\S+) ({_KINDS})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_PIECE = re.compile(r'channel_id=(\d+).*chain_id="(\d+)"')  # XLA:TPU cuts one collective into pieces fused with other work
_NO_DATA = ("u32[]",)  # semaphores beside an asynchronous result


@dataclass(frozen=True)
class Collective:
    """One collective: its result as HLO prints it, such as 'bf16[4,4096]' ('2*' before it where two are combined), and the result's
    bytes on one device."""

    kind: str
    shape: str
    bytes: int


def collectives(hlo: str) -> list[Collective]:
    """Every collective of a program, one entry a call site (a call inside a loop counts once)."""
    found, pieces = [], set()
    for line in hlo.splitlines():
        call = _CALL.search(line)
        if call is None:
            continue
        if piece := _PIECE.search(line):
            if piece.groups() in pieces:
                continue
            pieces.add(piece.groups())
        shapes = [f"{kind}[{dims}]" for kind, dims in _SHAPE.findall(call[1])]
        shapes = [shape for shape in shapes if shape not in _NO_DATA] or shapes[:1]
        if call[3]:  # the start of an asynchronous one returns (operand, result)
            shapes = shapes[-1:]
        found.append(Collective(call[2], _joined(shapes), sum(map(_bytes, shapes))))
    return found


def counts(found: Iterable[Collective]) -> dict[str, int]:
    """How often each occurs: {'all-reduce bf16[4,4096]': 64}, the largest first."""
    ordered = sorted(found, key=lambda c: (-c.bytes, c.kind, c.shape))
    keys = [f"{c.kind} {c.shape}" for c in ordered]
    return {key: keys.count(key) for key in dict.fromkeys(keys)}


def _joined(shapes: list[str]) -> str:
    times = {shape: shapes.count(shape) for shape in shapes}
    return " ".join(f"{n}*{shape}" if n > 1 else shape for shape, n in times.items())


def _bytes(shape: str) -> int:
    kind, dims = _SHAPE.findall(shape)[0]
    n = 1
    for d in filter(None, dims.split(",")):
        n *= int(d)
    bits = int(re.sub(r"\D", "", kind) or 8)  # pred has no number and takes a byte
    return n * max(bits, 8) // 8
