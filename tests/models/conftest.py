"""Fixtures of the model tests."""

import os
import subprocess
from pathlib import Path

import pytest

from tokeff.errors import UserError
from tokeff.models.config import Precision
from tokeff.models.load import load

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct, dequantised to float32."""
    try:
        return load("smollm2-135m", Precision())
    except UserError as e:
        pytest.skip(f"no model: {e}")


@pytest.fixture(scope="session")
def peers():
    """Run a script of tests/peers with the python that has torch and transformers."""
    python = Path(os.environ.get("TOKEFF_PEERS_PYTHON") or ROOT / ".venv-peers" / "bin" / "python")
    if not python.exists():
        pytest.skip("no peers environment: make peers, or set TOKEFF_PEERS_PYTHON")

    def run(script: str, *args: object) -> None:
        command = [str(python), str(ROOT / "tests" / "peers" / script), *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr[-2000:]

    return run


@pytest.fixture
def one_line():
    """Context manager: the block raises UserError, and its message is one line that holds the given words."""

    def check(*words: str):
        return _OneLine(words)

    return check


class _OneLine:
    def __init__(self, words: tuple[str, ...]):
        self.words = words

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        assert kind is UserError, f"expected UserError, got {error!r}"
        message = str(error)
        assert message and "\n" not in message and len(message) < 600, message
        for word in self.words:
            assert word in message, f"{word!r} is not in {message!r}"
        return True
