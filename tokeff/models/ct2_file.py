"""A Whisper model as CTranslate2 stores it (model.bin, format version 6), its tensors under the names that Hugging Face gives them.

The file is memory mapped and read front to back with one cursor that cannot leave it, so nothing is allocated on the word of a number in
it. Format: CTranslate2's python/ctranslate2/specs/model_spec.py (MIT): version, name of the spec, its revision, tensors (name, sizes,
type, bytes), then aliases. CTranslate2 writes queries, keys and values as one matrix; keys have no bias in Whisper, so the middle third
of the bias being zero also shows that the order is q, k, v.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from tokeff.errors import UserError
from tokeff.models.gguf_header import Cursor, mapped

TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16, 5: ml_dtypes.bfloat16}  # 1 to 3 for single numbers alone
VERSION, MAX_DIMS, GELU = 6, 4, 3
_SETTINGS = {"pre_norm": 1, "activation": GELU, "alibi": 0, "scale_embeddings": 0, "start_from_zero_embedding": 0}
_PARTS = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
}
_TOP = {
    "conv1": "conv1",
    "conv2": "conv2",
    "layer_norm": "layer_norm",
    "position_encodings/encodings": "embed_positions.weight",
    "embeddings/weight": "embed_tokens.weight",
}
_ENDS = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


@dataclass(frozen=True)
class Stored:
    """Where a tensor's numbers lie, and of what type they are."""

    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True)
class Slice:
    """Part `part` of `parts` equal ones of a stored tensor, along its first axis."""

    name: str
    part: int = 0
    parts: int = 1


class Ct2Tensors:
    """Tensors of a model.bin by Hugging Face name. `numbers` are its settings: {"encoder/num_heads": 6, ...}."""

    def __init__(self, path: Path):
        self.where = str(path)
        self._stored, self._buffer = read_tensors(path)
        self.numbers = {name: int(self._array(name)) for name, t in self._stored.items() if t.shape == ()}
        self._check_settings()
        self._slices: dict[str, Slice] = {}
        for name in self._stored:
            self._slices |= _slices(name)
        self.shapes = {name: self._shape(s) for name, s in self._slices.items()}
        self._drop_key_biases()

    def _shape(self, s: Slice) -> tuple[int, ...]:
        first, *others = self._stored[s.name].shape or (1,)
        if first % s.parts:
            raise UserError(f"{self.where}: tensor {s.name[:80]} of {first} rows is not {s.parts} matrices in one; not a Whisper model")
        return first // s.parts, *others

    def _check_settings(self) -> None:
        for name, value in self.numbers.items():
            wanted = _SETTINGS.get(name.rpartition("/")[2], value)
            if value != wanted:
                raise UserError(f"{self.where}: {name[:80]} is {value}, Whisper has {wanted}; it is not a Whisper model")

    def _drop_key_biases(self) -> None:
        for name in [n for n in self.shapes if n.endswith("k_proj.bias")]:
            if np.any(self.read(name)):
                raise UserError(f"{self.where}: {name[:80]} is not zero, so q, k and v stand in another order; convert it again")
            del self.shapes[name]

    def _array(self, name: str) -> np.ndarray:
        t = self._stored[name]
        return np.frombuffer(self._buffer, np.dtype(TYPES[t.type]), math.prod(t.shape), t.start).reshape(t.shape)

    def read(self, name: str) -> np.ndarray:
        s = self._slices[name]
        return np.split(self._array(s.name), s.parts)[s.part]


def read_tensors(path: Path) -> tuple[dict[str, Stored], mmap.mmap]:
    """Where every tensor of a model.bin lies, and the mapped file. Raises UserError, one line, for anything else."""
    buffer = mapped(path)
    c = Cursor(buffer, str(path))
    if c.scalar("<I", "the version") != VERSION or _name(c, "the name of the spec") != "WhisperSpec":
        raise UserError(f"{path} is not a Whisper model in CTranslate2's format, version {VERSION}; convert it again or give safetensors")
    c.scalar("<I", "the revision")
    stored: dict[str, Stored] = {}
    for _ in range(_count(c, "tensors", 8)):
        name = _name(c, "a tensor name")
        if name in stored:
            raise c.bad(f"tensor {name[:80]} occurs twice")
        stored[name] = _tensor(c, name[:80])
    for _ in range(_count(c, "aliases", 4)):
        alias, name = _name(c, "an alias"), _name(c, "what an alias stands for")
        if (alias, name) != ("decoder/projection/weight", "decoder/embeddings/weight"):
            raise UserError(f"{path}: {alias[:80]} stands for {name[:80]}, which Whisper does not have; convert it again")
    return stored, buffer


def _name(c: Cursor, what: str) -> str:
    raw = c.take(c.scalar("<H", f"the length of {what}"), what)
    try:
        return raw.removesuffix(b"\0").decode("ascii")
    except UnicodeDecodeError:
        raise c.bad(f"{what} is not plain text") from None


def _count(c: Cursor, what: str, smallest: int) -> int:
    n = c.scalar("<I", f"the number of {what}")
    if n * smallest > c.left():
        raise c.bad(f"it says {n} {what}, more than its {len(c.buffer)} bytes can hold")
    return n


def _tensor(c: Cursor, label: str) -> Stored:
    dims = c.scalar("<B", label)
    if dims > MAX_DIMS:
        raise c.bad(f"tensor {label} has {dims} dimensions")
    shape = tuple(c.scalar("<I", label) for _ in range(dims))
    kind, size = c.scalar("<B", label), c.scalar("<I", label)
    whole = kind in (1, 2, 3)
    if kind not in TYPES or (whole and dims and not label.endswith("alignment_heads")) or not (whole or dims):
        raise UserError(f"{c.where}: tensor {label} has CTranslate2 type {kind}; convert the model to float32, float16 or bfloat16")
    if 0 in shape or size != math.prod(shape) * np.dtype(TYPES[kind]).itemsize:
        raise c.bad(f"tensor {label} of sizes {shape} has {size} bytes")
    if size > c.left():
        raise c.bad(f"tensor {label} needs {size} bytes at offset {c.at}, the file has {c.left()} more")
    c.at += size
    return Stored(shape, kind, c.at - size)


def _slices(name: str) -> dict[str, Slice]:
    """{Hugging Face name: where it is in the stored tensor `name`}; nothing for settings and for what Whisper does not have."""
    side, _, rest = name.partition("/")
    if rest in _TOP:
        return {f"model.{side}.{_TOP[rest]}": Slice(name)}
    head, _, end = rest.rpartition("/")
    end = _ENDS.get(end, "")
    if head in _TOP and end:
        return {f"model.{side}.{_TOP[head]}.{end}": Slice(name)}
    layer, _, part = head.partition("/")
    parts = _PARTS.get(part, ())
    number = layer.removeprefix("layer_")
    if not (end and layer.startswith("layer_") and number.isdecimal()):
        return {}
    return {f"model.{side}.layers.{int(number)}.{p}.{end}": Slice(name, i, len(parts)) for i, p in enumerate(parts)}
