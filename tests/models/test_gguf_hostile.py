"""Damaged and hostile GGUF files: one line, and nothing allocated on the word of the file."""

import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from files import FAMILIES, FLOAT32, random_params, write_gguf

from tokeff.errors import UserError
from tokeff.models.gguf_header import read_header
from tokeff.models.load import load

pytestmark = pytest.mark.core
CFG, OPTIONAL = FAMILIES["llama"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    return write_gguf(path, "llama", CFG, random_params(CFG, OPTIONAL)).read_bytes()


@pytest.fixture
def refused(tmp_path, one_line):
    """Load bytes as a GGUF file; they must be refused in one line with the given words, without large allocations."""

    def check(data: bytes, *words: str) -> None:
        (tmp_path / "bad.gguf").write_bytes(data)
        tracemalloc.start()
        try:
            with one_line("bad.gguf", *words):
                load(tmp_path / "bad.gguf", FLOAT32)
            assert tracemalloc.get_traced_memory()[1] < 50e6
        finally:
            tracemalloc.stop()

    return check


def text(s: str) -> bytes:
    return struct.pack("<Q", len(s)) + s.encode()


def head(tensors: int, values: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values)


def tensor(name: str = "t", dims=(32,), kind: int = 0, start: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, start)


def file_of(*tensors: bytes, data: int = 128) -> bytes:
    body = head(len(tensors), 0) + b"".join(tensors)
    return body + bytes(-len(body) % 32 + data)


def test_truncated_anywhere(good, tmp_path):
    for cut in np.linspace(0, len(good) - 1, 60, dtype=int):
        (tmp_path / "cut.gguf").write_bytes(good[:cut])
        with pytest.raises(UserError, match="truncated|cannot read") as e:
            read_header(tmp_path / "cut.gguf")
        assert "\n" not in str(e.value)


def test_flipped_bytes_load_or_are_refused(good, tmp_path):
    """Random damage in the header never gives anything but UserError."""
    rng, said = np.random.default_rng(0), []
    for _ in range(150):
        data = bytearray(good)
        for at in rng.integers(0, 2500, 3):
            data[at] = rng.integers(0, 256)
        (tmp_path / "flip.gguf").write_bytes(data)
        try:
            load(tmp_path / "flip.gguf", FLOAT32)
        except UserError as e:
            said.append(str(e))
    assert len(said) > 50
    assert not any("\n" in line for line in said)


def test_counts_are_checked_before_use(refused):
    refused(head(2**60, 0) + bytes(64), "tensors")
    refused(head(0, 2**63) + bytes(64), "metadata values")
    refused(head(0, 1) + struct.pack("<Q", 2**62) + bytes(64), "metadata key")
    refused(head(0, 1) + text("k") + struct.pack("<I", 8) + struct.pack("<Q", 2**40), "k needs")
    refused(head(0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2**61), "strings in k")
    refused(head(0, 1) + text("k") + struct.pack("<IIQ", 9, 10, 2**61), "numbers in k")
    refused(head(0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "list of value type 9")
    refused(head(0, 1) + text("k") + struct.pack("<I", 77), "unknown value type 77")
    refused(head(0, 2) + (text("k") + struct.pack("<II", 4, 1)) * 2, "occurs twice")
    refused(head(0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(16), "UTF-8")


def test_sizes_and_offsets_are_checked(refused):
    refused(file_of(tensor(dims=(2**33, 2**33))), "impossible sizes")
    refused(file_of(tensor(dims=(2**63, 2**63, 2, 2))), "impossible sizes")
    refused(file_of(tensor(dims=(0, 4))), "impossible sizes")
    refused(file_of(tensor(dims=(31,), kind=2)), "impossible sizes")
    refused(file_of(tensor(start=7)), "offset 7")
    refused(file_of(tensor(start=2**62)), "ends at byte")
    refused(file_of(tensor(dims=(64,))), "ends at byte")
    refused(file_of(tensor("a"), tensor("b")), "overlaps")
    refused(file_of(tensor("a"), tensor("a", start=128), data=256), "twice")
    refused(file_of(text("t") + struct.pack("<I", 10**6)), "dimensions")


def test_alignment_must_be_a_power_of_two(refused):
    for value in (0, 3, 2**31):
        refused(head(0, 1) + text("general.alignment") + struct.pack("<II", 4, value), "alignment", "power of two")


def test_unsupported_is_named(refused, good):
    refused(file_of(tensor(kind=7)), "Q5_1", "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q4_K, Q6_K")
    refused(file_of(tensor(kind=4242)), "number 4242")
    refused(head(0, 0, version=1), "version 1")
    refused(b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little endian")
    refused(b"PK\x03\x04" + bytes(64), "not a GGUF file")
    refused(good.replace(b"llama", b"mamba"), "'mamba'", "supported: llama, qwen2")
    refused(good.replace(b"gpt2", b"bert"), "tokenizer 'bert'", "tokenizer.json")


def test_wrong_shape_and_missing_tensor(tmp_path, one_line):
    wide = write_gguf(tmp_path / "a.gguf", "llama", CFG, random_params(CFG, OPTIONAL))
    data = wide.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
    wide.write_bytes(data)
    with one_line("blk.1.ffn_up.weight", "missing"):
        load(wide, FLOAT32)
    key = text("llama.feed_forward_length") + struct.pack("<I", 4)
    wide.write_bytes(data.replace(key + struct.pack("<I", 64), key + struct.pack("<I", 65)))
    with one_line("ffn_gate.weight", "(64, 32)", "(65, 32)"):
        load(wide, FLOAT32)


def test_partial_rotary_is_refused(tmp_path, one_line):
    path = write_gguf(tmp_path / "p.gguf", "llama", CFG, random_params(CFG, ()), extra=lambda w: w.add_rope_dimension_count(8))
    with one_line("partial rotary"):
        load(path, FLOAT32)


def test_unknown_rope_scaling_is_refused(tmp_path, one_line):
    def extra(w):
        w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    with one_line("'longrope'", "yarn"):
        load(write_gguf(tmp_path / "r.gguf", "llama", CFG, random_params(CFG, ()), extra=extra), FLOAT32)
