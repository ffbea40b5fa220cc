"""SmolLM2's greedy text equals transformers', drafted or not, up to ties."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny

from tokeff.bench.peer import export, peers_python
from tokeff.data.sources import prompts
from tokeff.decode import draft_model, prompt_lookup
from tokeff.decode.sample import GREEDY
from tokeff.errors import UserError
from tokeff.generation import generate
from tokeff.models.config import Precision
from tokeff.models.load import Model, load

SCRIPT = Path(__file__).with_name("generate.py")
NEW, MARGIN = 16, 1e-3


def transformers(folder, ids, *more):
    """What transformers makes of these prompts with the model in this folder."""
    if (python := peers_python()) is None:
        pytest.skip("no peers environment: make peers, or set TOKEFF_PEERS_PYTHON")
    (folder / "prompts.json").write_text(json.dumps(ids))
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(python), str(SCRIPT), str(folder), str(NEW), *more], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "generated.json").read_text())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(model, prompts as ids, what transformers generates)."""
    if peers_python() is None:
        pytest.skip("no peers environment: make peers, or set TOKEFF_PEERS_PYTHON")
    try:
        m = load("smollm2-135m", Precision())
    except UserError as e:
        pytest.skip(f"no model: {e}")
    folder = export(m, tmp_path_factory.mktemp("smollm2"))
    ids = [m.tok.encode(prompts(kind)[0].text) for kind in ("prose", "code", "copy")]
    return m, ids, transformers(folder, ids)


def tied(ours, theirs, margins):
    """Equal up to the first place where transformers' two best logits all but tie."""
    for at, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            return margins[at] < MARGIN
    return len(ours) == len(theirs)


@pytest.mark.peers
@pytest.mark.xdist_group("smollm2 of transformers")
@pytest.mark.parametrize("decoder", [None, prompt_lookup()], ids=["plain", "lookup"])
def test_greedy_text_equals_transformers(theirs, decoder):
    m, ids, found = theirs
    ours = generate(m, ids, decode=decoder, max_new=NEW).tokens
    for mine, plain in zip(ours, found["plain"], strict=True):
        assert tied(mine, plain["tokens"], plain["margins"])


@pytest.mark.peers
@pytest.mark.xdist_group("smollm2 of transformers")
def test_their_prompt_lookup_gives_the_same_text(theirs):
    _, _, found = theirs
    for drafted, plain in zip(found["lookup"], found["plain"], strict=True):
        assert tied(drafted["tokens"], plain["tokens"], plain["margins"])


@pytest.fixture(scope="module")
def tinies(tmp_path_factory):
    """(what a tiny model generates by our drafters, what transformers generates behind each prompt and its first token): both sides then
    begin to draft at the same place. The draft model is the tiny model's own first layers."""
    small = dataclasses.replace(tiny.CFG, name="small", L=2, windows=())
    m = Model(tiny.CFG, tiny.params(), None, Precision(), "tiny")
    d = dataclasses.replace(m, cfg=small, params=m.params.replace(blocks=m.params.blocks[: small.L]))
    target, assistant = (export(x, tmp_path_factory.mktemp(x.cfg.name)) for x in (m, d))
    m, prompt, ours, first = m.attach(draft=d.params), tiny.read(tiny.FULL), {}, []
    for name, drafter in {"assisted": draft_model(small, length=4), "lookup": prompt_lookup(length=10, ngram=2)}.items():
        s = tiny.start(prompt, tiny.FULL, drafter, new=NEW + 1, m=m)
        first = tiny.text(s)
        ours[name] = drafter.drive(m.params, m.cfg, s, NEW, policy=tiny.FULL, how=GREEDY, eos=())
    return ours, transformers(target, [[*row, *new] for row, new in zip(tiny.prompts(), first, strict=True)], str(assistant))


@pytest.mark.peers
@pytest.mark.xdist_group("tinies of transformers")
@pytest.mark.parametrize("kind", ["assisted", "lookup"])
def test_drafts_are_accepted_as_theirs_are(tinies, kind):
    """An assistant model, and prompt lookup: the same text, plain decoding's, in as many passes of the model."""
    s, found = tinies[0][kind], tinies[1]
    for b, (plain, drafted) in enumerate(zip(found["plain"], found[kind], strict=True)):
        assert tied(tiny.text(s)[b][1:], plain["tokens"], plain["margins"]) and tied(drafted["tokens"], plain["tokens"], plain["margins"])
        assert int(s.passes_B[b]) == drafted["passes"] <= NEW
    assert int(s.passes_B.min()) < NEW, "no draft was accepted, so nothing was compared"


@pytest.mark.core
def test_the_tie_rule():
    assert tied([1, 2], [1, 2], [1.0, 1.0])
    assert tied([1, 3], [1, 2], [1.0, 1e-4]) and not tied([1, 3], [1, 2], [1e-4, 1.0])
    assert not tied([1], [1, 2], [1.0, 1.0])
