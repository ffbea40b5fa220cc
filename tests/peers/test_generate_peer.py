"""SmolLM2's greedy text equals transformers', drafted or not, up to ties."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tokeff.bench.peer import export, peers_python
from tokeff.data.sources import prompts
from tokeff.decode import prompt_lookup
from tokeff.errors import UserError
from tokeff.generation import generate
from tokeff.models.config import Precision
from tokeff.models.load import load

SCRIPT = Path(__file__).with_name("generate.py")
NEW, MARGIN = 16, 1e-3


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(model, prompts as ids, what transformers generates)."""
    if (python := peers_python()) is None:
        pytest.skip("no peers environment: make peers, or set TOKEFF_PEERS_PYTHON")
    try:
        m = load("smollm2-135m", Precision())
    except UserError as e:
        pytest.skip(f"no model: {e}")
    folder = export(m, tmp_path_factory.mktemp("smollm2"))
    ids = [m.tokenizer.encode(prompts(kind)[0].text) for kind in ("prose", "code", "copy")]
    (folder / "prompts.json").write_text(json.dumps(ids))
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(python), str(SCRIPT), str(folder), str(NEW)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return m, ids, json.loads((folder / "generated.json").read_text())


def tied(ours, theirs, margins):
    """Equal up to the first place where transformers' two best logits all but tie."""
    for at, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            return margins[at] < MARGIN
    return len(ours) == len(theirs)


@pytest.mark.peers
@pytest.mark.parametrize("decoder", [None, prompt_lookup()], ids=["plain", "lookup"])
def test_greedy_text_equals_transformers(theirs, decoder):
    m, ids, found = theirs
    ours = generate(m, ids, decode=decoder, max_new=NEW).tokens
    for mine, plain in zip(ours, found["plain"], strict=True):
        assert tied(mine, plain["tokens"], plain["margins"])


@pytest.mark.peers
def test_their_prompt_lookup_gives_the_same_text(theirs):
    _, _, found = theirs
    for drafted, plain in zip(found["lookup"], found["plain"], strict=True):
        assert tied(drafted["tokens"], plain["tokens"], plain["margins"])


@pytest.mark.core
def test_the_tie_rule():
    assert tied([1, 2], [1, 2], [1.0, 1.0])
    assert tied([1, 3], [1, 2], [1.0, 1e-4]) and not tied([1, 3], [1, 2], [1e-4, 1.0])
    assert not tied([1], [1, 2], [1.0, 1.0])
