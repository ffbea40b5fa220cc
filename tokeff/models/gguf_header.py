"""The header of a GGUF file (versions 2 and 3, little endian), every count and offset checked before it is used.

The file is memory mapped and read front to back with one cursor that cannot leave it, so nothing is allocated on the word
of a number in the file. Format: docs/gguf.md of ggml (MIT). The `gguf` package supplies the type tables and, in
`gguf_file`, the dequantising.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from tokeff.errors import UserError

SUPPORTED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K")
_TYPES = {t.value: t for t in GGMLQuantizationType}
MAX_KEY, MAX_DIMS, ALIGNMENT = 65_535, 4, 32
_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes lie. `shape` is row-major (GGUF stores dimensions the other way round)."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    bytes: int


@dataclass(frozen=True)
class Header:
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class Cursor:
    """Reads a buffer front to back. Every read first checks that the bytes are there."""

    def __init__(self, buffer: mmap.mmap, where: str):
        self.buffer, self.where, self.at = buffer, where, 0

    def bad(self, what: str) -> UserError:
        return UserError(f"{self.where} is truncated or damaged: {what}; download it again")

    def left(self) -> int:
        return len(self.buffer) - self.at

    def take(self, n: int, what: str) -> bytes:
        if n > self.left():
            raise self.bad(f"{what} needs {n} bytes at offset {self.at}, the file has {self.left()} more")
        self.at += n
        return self.buffer[self.at - n : self.at]

    def scalar(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str, limit: int | None = None) -> str:
        n = self.scalar("<Q", f"the length of {what}")
        if limit is not None and n > limit:
            raise self.bad(f"{what} is {n} bytes long")
        try:
            return self.take(n, what).decode()
        except UnicodeDecodeError:
            raise self.bad(f"{what} is not UTF-8") from None

    def count(self, what: str, smallest: int) -> int:
        """A number of things that take at least `smallest` bytes each and must fit into the rest of the file."""
        n = self.scalar("<Q", f"the number of {what}")
        if n * smallest > self.left():
            raise self.bad(f"it says {n} {what}, more than its {len(self.buffer)} bytes can hold")
        return n


def mapped(path: Path) -> mmap.mmap:
    """The file as bytes that are read when they are looked at. UserError where it cannot be read or is empty."""
    try:
        with path.open("rb") as f:
            return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path}: {e}") from None


def read_header(path: Path) -> tuple[Header, mmap.mmap]:
    """Header and the mapped file. Raises UserError, one line, for anything that is not a whole and consistent GGUF file."""
    buffer = mapped(path)
    c = Cursor(buffer, str(path))
    if c.take(4, "the magic number") != b"GGUF":
        raise UserError(f"{path} is not a GGUF file; give a Hugging Face folder, a .gguf file or a saved tokeff folder")
    version = c.scalar("<I", "the version")
    if version not in (2, 3):
        raise UserError(f"{path}: GGUF version {version} is not supported; supported: 2 and 3, little endian")
    n_tensors, n_values = c.count("tensors", 24), c.count("metadata values", 13)
    metadata = _metadata(c, n_values)
    return Header(metadata, _tensors(c, n_tensors, _alignment(c, metadata))), buffer


def _metadata(c: Cursor, n: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(n):
        key = c.text("a metadata key", MAX_KEY)
        if key in values:
            raise c.bad(f"metadata key {key[:80]} occurs twice")
        values[key] = _value(c, c.scalar("<I", f"the type of {key[:80]}"), key[:80])
    return values


def _value(c: Cursor, kind: int, key: str) -> Any:
    """A number, string, boolean, or a flat list of them."""
    if kind == GGUFValueType.STRING:
        return c.text(key)
    if kind in _SCALARS:
        return c.scalar(_SCALARS[GGUFValueType(kind)], key)
    if kind != GGUFValueType.ARRAY:
        raise c.bad(f"{key} has the unknown value type {kind}")
    item = c.scalar("<I", key)
    if item == GGUFValueType.STRING:
        return [c.text(key) for _ in range(c.count(f"strings in {key}", 8))]
    if item not in _SCALARS:
        raise c.bad(f"{key} is a list of value type {item}")
    form = _SCALARS[GGUFValueType(item)]
    n = c.count(f"numbers in {key}", struct.calcsize(form))
    return list(struct.unpack(f"<{n}{form[1]}", c.take(n * struct.calcsize(form), key)))


def _alignment(c: Cursor, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(value, int) or not 1 <= value <= 1 << 20 or value & (value - 1):
        raise c.bad(f"general.alignment is {str(value)[:40]}, expected a power of two")
    return value


def _tensors(c: Cursor, n: int, alignment: int) -> dict[str, TensorInfo]:
    infos = [_tensor(c, alignment) for _ in range(n)]
    begin = c.at + -c.at % alignment
    tensors: dict[str, TensorInfo] = {}
    end = begin
    for name, info in sorted(infos, key=lambda pair: pair[1].start):
        start = begin + info.start
        if name in tensors:
            raise c.bad(f"tensor {name[:80]} occurs twice")
        if start < end:
            raise c.bad(f"tensor {name[:80]} overlaps the one before it")
        end = start + info.bytes
        if end > len(c.buffer):
            raise c.bad(f"tensor {name[:80]} ends at byte {end}, the file has {len(c.buffer)}")
        tensors[name] = TensorInfo(info.shape, info.type, start, info.bytes)
    return tensors


def _tensor(c: Cursor, alignment: int) -> tuple[str, TensorInfo]:
    """One tensor's entry, its start still counted from the beginning of the data."""
    name = c.text("a tensor name", MAX_KEY)
    label = name[:80]
    n_dims = c.scalar("<I", label)
    if not 1 <= n_dims <= MAX_DIMS:
        raise c.bad(f"tensor {label} has {n_dims} dimensions")
    dims = struct.unpack(f"<{n_dims}Q", c.take(8 * n_dims, label))
    kind = c.scalar("<I", label)
    start = c.scalar("<Q", label)
    if kind not in _TYPES or _TYPES[kind].name not in SUPPORTED:
        known = _TYPES[kind].name if kind in _TYPES else f"number {kind}"
        raise UserError(f"{c.where}: tensor {label} has GGUF type {known}; supported: {', '.join(SUPPORTED)}")
    block, size = GGML_QUANT_SIZES[_TYPES[kind]]
    elements = 1
    for d in dims:
        elements *= d
    if not 1 <= elements < 2**48 or dims[0] % block or start % alignment:
        raise c.bad(f"tensor {label} has impossible sizes {dims} or offset {start}")
    return name, TensorInfo(tuple(reversed(dims)), _TYPES[kind], start, elements // block * size)
