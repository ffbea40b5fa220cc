"""Fixtures of the report tests."""

import os
import pathlib

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
from fakes import Plain, fake

from tokeff.experiment import Config
from tokeff.report.run import run


@pytest.fixture
def config():
    """Return a small experiment with its file."""
    return Config(
        fake("small", Plain, contexts=(64, 128)), pathlib.Path("configs/small.py"), "Small.\n\n    tokeff run small"
    )


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return the folder of a finished run; tests only read it."""
    out = tmp_path_factory.mktemp("finished")
    return run(
        Config(fake("done", contexts=(64, 128)), pathlib.Path("configs/done.py"), "Done."), out, args=["run", "x"]
    )
