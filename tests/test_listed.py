"""What is told of every listed method, of text or of pictures, videos and sound: names, papers, settings, and the file that runs it."""

import inspect
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tokeff import cli, listing
from tokeff.errors import UserError
from tokeff.kv.prefill import prefill
from tokeff.models.vit_config import ViTConfig
from tokeff.reduce.listing import inside_methods, picture_methods
from tokeff.reduce.merge import whole

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[1]
ROWS = (*picture_methods(), *inside_methods())
PASSES = [m for m in inside_methods() if m.acts == "decoder"]
IMAGE = 3


def test_names_and_papers():
    """A name is one method's; what has a paper can be cited; a file that runs it is there."""
    names = [m.name for m in listing.every()]
    assert len(names) == len(set(names)) and set(names) > {m.name for m in listing.methods()}
    for m in listing.every():
        assert m.config is None or (ROOT / m.config).is_file()
        assert m.paper is None or m.paper.bibtex().startswith(f"@misc{{{m.paper.key},")
        assert (m.published is None) == (m.paper is None) and not m.trained
        if m.published is not None:
            assert set(m.published) <= set(inspect.signature(m.make).parameters)


@pytest.mark.parametrize("m", [pytest.param(m, id=m.name) for m in ROWS])
def test_settings_by_name(m):
    """The scaled ones are the defaults; the paper's make the object too, unless nothing was published."""
    assert m.make(**m.settings()) == m.make()
    if m.paper is None:
        with pytest.raises(UserError, match="no published method"):
            m.settings("paper")
    else:
        assert hash(m.make(**m.settings("paper")))
    with pytest.raises(UserError, match="did you mean 'paper'"):
        m.settings("papr")
    assert m.family in ("pictures", "video", "encoders", "baseline") and m.part in ("reduce", "cut")


# Of the 576 patches of CLIP-L at 336 pixels. PruMerge: at most, since outliers are as many as a picture has. Where no number was found in a
# paper (`silent` below): of the defaults.
PATCHES = {
    "FasterVLM": 64, "HiPrune": 64, "FlowCut": 128, "TokenCorrCompress": 576, "HiRED": 116, "GlobalCom2": 144, "DivPrune": 56, "ToDRE": 58,
    "VisPruner": 128, "CDPruner": 64, "CATP": 288, "VisionZip": 64, "PruMerge": 577, "AIM": 144, "VFlowOpt": 71, "MustDrop": 576,
}  # fmt: skip


def test_published_numbers_in_the_papers_tower():
    """How many rows each method leaves of a picture as it was published, which are those of the defaults too; and what the papers name."""
    clip = ViTConfig("clip", D=1024, F=4096, L=24, N=16, image=(336, 336), patch=14)
    found = {m.name: m for m in picture_methods() if m.paper is not None and m.acts != "frames"}
    assert {name: m.make(**m.settings("paper")).rows(clip) for name, m in found.items()} == PATCHES
    assert {name for name, m in found.items() if m.make().rows(clip) != PATCHES[name]} == {"PruMerge"}  # whose default shares one number
    silent = {m.name for m in picture_methods() if m.paper is not None and not m.published}
    assert silent == {"FasterVLM", "TokenCorrCompress", "CDPruner", "CATP", "OnDeviceSora"}
    for m in picture_methods():
        for name, value in (m.published or {}).items():
            same = m.name in ("PruMerge", "VisionZip") or (isinstance(value, int) and isinstance(m.settings()[name], float))
            assert same or m.settings()[name] == value, (m.name, name)


@pytest.mark.parametrize("m", [pytest.param(m, id=m.name) for m in PASSES if m.identity is not None])
def test_a_pass_at_its_identity_leaves_all_rows(m):
    ids = [[1, *[IMAGE] * 24, *range(5, 15)], [2, 4, *[IMAGE] * 24, *range(6, 16)]]
    tokens, length = tiny.padded(ids)
    given = {k: v[:2] if k == "keep" else v for k, v in m.identity.items()} | ({"at": (1, 2)} if "at" in m.settings() else {})
    cut = m.make(**given).seeing((IMAGE,), ids)
    cut.check(tiny.CFG, int(length.max()))
    found, wanted = (prefill(tiny.params(), tiny.CFG, tokens, length, cut=c) for c in (cut, None))
    np.testing.assert_allclose(found.logits_BV, wanted.logits_BV, atol=1e-5)


def test_what_merges_in_an_encoder_leaves_all_rows_at_zero():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 4)), jnp.float32)
    for m in inside_methods():
        if m.acts == "encoder":
            left, size, source = m.make().reduce(x, x, jnp.ones((2, 7)), 0, 1, 0)
            np.testing.assert_array_equal(left, x)
            np.testing.assert_array_equal(source, whole(7, 2)[1])
            assert (size == 1).all()


def test_the_command_shows_all(capsys):
    assert cli.main(["methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [m.name for m in listing.every()]
    told = rows["FastV"]
    assert told["paper_settings"] == {"budget": 0.5, "layer": 2} and told["family"] == "pictures" and told["lossless"] is False
    assert rows["IMA-skip"]["config"] is None and rows["HoliTom"]["config"] == "configs/leaderboard/reduce.py"
    assert cli.main(["methods"]) == 0
    said = capsys.readouterr().out
    assert "VisionZip" in said and "IMA-skip" in said
    assert cli.main(["methods", "--bibtex", "ToMe"]) == 0
    assert "2210.09461" in capsys.readouterr().out
