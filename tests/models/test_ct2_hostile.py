"""Damaged and hostile CTranslate2 files: one line, and nothing allocated on the word of the file."""

import struct
import tracemalloc

import numpy as np
import pytest
from speech_files import ALIASES, CFG, ct2, head, stored, tensor, tensors, text

from tokeff.errors import UserError
from tokeff.models.config import Precision
from tokeff.models.whisper_load import load_whisper

pytestmark = pytest.mark.core
WEIGHTS = stored(tensors())
GOOD = ct2(WEIGHTS)


@pytest.fixture
def refused(tmp_path, one_line):
    """Load bytes as a model.bin; they must be refused in one line with the given words, without large allocations."""

    def check(data: bytes, *words: str) -> None:
        (tmp_path / "model.bin").write_bytes(data)
        tracemalloc.start()
        try:
            with one_line("model.bin", *words):
                load_whisper(tmp_path, Precision())
            assert tracemalloc.get_traced_memory()[1] < 50e6
        finally:
            tracemalloc.stop()

    return check


def raw(name: str = "t", dims=(4,), kind: int = 4, size: int = 8, body: bytes = bytes(8)) -> bytes:
    return text(name) + struct.pack(f"<B{len(dims)}IBI", len(dims), *dims, kind, size) + body


def changed(**arrays):
    return ct2(WEIGHTS | {name.replace("__", "/"): np.asarray(x) for name, x in arrays.items()})


def test_truncated_anywhere(tmp_path):
    for cut in np.linspace(0, len(GOOD) - 1, 60, dtype=int):
        (tmp_path / "model.bin").write_bytes(GOOD[:cut])
        with pytest.raises(UserError, match="truncated|cannot read") as e:
            load_whisper(tmp_path, Precision())
        assert "\n" not in str(e.value)


def test_flipped_bytes_load_or_are_refused(tmp_path):
    """Random damage in names, sizes and types never gives anything but UserError."""
    rng, said = np.random.default_rng(0), []
    for _ in range(100):
        data = bytearray(GOOD)
        for at in rng.integers(0, 900, 3):
            data[at] = rng.integers(0, 256)
        (tmp_path / "model.bin").write_bytes(data)
        try:
            load_whisper(tmp_path, Precision())
        except UserError as e:
            said.append(str(e))
    assert len(said) > 20
    assert not any("\n" in line for line in said)


def test_counts_and_sizes_are_checked_before_use(refused):
    refused(head(2**32 - 1), "4294967295 tensors")
    refused(head(1) + struct.pack("<H", 65535) + bytes(8), "a tensor name needs")
    refused(head(1) + raw(dims=(2**32 - 1,) * 4), "has 8 bytes")
    refused(head(1) + raw(dims=(0,), size=0, body=b""), "has 0 bytes")
    refused(head(1) + raw(dims=(2**30,), size=2**31), "needs 2147483648 bytes")
    refused(head(1) + raw(dims=(1,) * 5), "5 dimensions")
    refused(head(1) + raw(kind=9), "type 9")
    refused(head(1) + raw(kind=1, size=4), "type 1", "float16")
    refused(head(1) + raw(dims=(), size=2), "type 4")
    refused(head(2) + raw() * 2, "occurs twice")
    refused(head(1) + struct.pack("<H", 2) + b"\xff\0" + bytes(40), "not plain text")
    refused(head(0) + struct.pack("<I", 2**31), "2147483648 aliases")


def test_other_files_are_named(refused):
    refused(head(0, version=5), "version 6")
    refused(head(0, spec="TransformerSpec"), "not a Whisper model")
    refused(b"PK\x03\x04" + bytes(64), "not a Whisper model")
    refused(b"\x80\x04" + bytes(64), "not a Whisper model")
    refused(GOOD.removesuffix(ALIASES) + struct.pack("<I", 1) + text("a") + text("b"), "a stands for b")


def test_contents_are_checked(refused):
    refused(ct2({k: v for k, v in WEIGHTS.items() if k != "encoder/layer_1/ffn/linear_1/bias"}), "encoder.layers.1.fc2.bias is missing")
    refused(changed(encoder__pre_norm=np.int8(0)), "encoder/pre_norm is 0")
    refused(changed(encoder__activation=np.int8(0)), "activation is 0")
    refused(changed(encoder__num_heads=np.int16(3)), "heads")
    refused(changed(decoder__num_heads=np.int16(-2), encoder__num_heads=np.int16(-2)), "heads")
    refused(changed(encoder__layer_0__self_attention__linear_0__bias=np.ones(3 * CFG.D)), "another order")
    refused(changed(encoder__layer_0__self_attention__linear_0__bias=np.ones(3 * CFG.D + 1)), "3 matrices in one")
    refused(changed(encoder__layer_7__ffn__linear_0__weight=np.ones((CFG.F, CFG.D))), "encoder.layers.2")
    refused(ct2({"encoder/num_heads": np.int16(2)}), "is missing")


def test_a_tensor_of_the_right_name_alone_is_not_enough(refused):
    refused(head(1) + tensor("decoder/embeddings/weight", np.ones(4)) + ALIASES, "has 1 axes")
