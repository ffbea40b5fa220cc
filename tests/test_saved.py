"""A saved context is the one that was saved: what its seal tells where shapes do not, and files of other formats."""

from pathlib import Path

import pytest
import test_api

from tokeff.context import FORMAT, Compressed
from tokeff.errors import UserError

pytestmark = pytest.mark.core


def one_bit(folder: Path):
    """Of the last number of the last array."""
    data = bytearray((folder / "cache.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "cache.safetensors").write_bytes(bytes(data))


CHANGED = {  # what a file could hold, and did not
    "a constant of the score": (
        test_api.in_policy(score={"type": "WindowMass", "window": 6, "kernel": 3, "pool": "avg"}), "context.json"
    ),
    "a constant of the policy": (test_api.in_policy(recent=5), "context.json"),
    "the tokens": (test_api.change(tokens=[1] * 64), "context.json"),
    "one bit of a number": (one_bit, "cache.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("compact", [None, "exact"])
@pytest.mark.parametrize("name", CHANGED)
def test_what_was_changed_is_refused(name, compact, tmp_path):
    edit, file = CHANGED[name]
    test_api.saved().save(tmp_path / "c", compact=compact)
    edit(tmp_path / "c")
    with pytest.raises(UserError, match="is not as it was saved; compress") as e:
        Compressed.load(test_api.model(), tmp_path / "c")
    assert "\n" not in str(e.value) and file in str(e.value)
    if compact is None:
        test_api.seal(tmp_path / "c")
        assert Compressed.load(test_api.model(), tmp_path / "c").rows == test_api.saved().rows, "only the seal tells"


@pytest.mark.parametrize("version", [None, FORMAT - 1, FORMAT + 1, str(FORMAT)])
def test_another_format_is_refused(version, tmp_path):
    test_api.saved().save(tmp_path / "c")
    (test_api.without("format") if version is None else test_api.change(format=version))(tmp_path / "c")
    test_api.seal(tmp_path / "c")
    with pytest.raises(UserError, match=f"format {FORMAT}") as e:
        Compressed.load(test_api.model(), tmp_path / "c")
    assert "\n" not in str(e.value)
