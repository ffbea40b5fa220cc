"""Saved models: everything comes back; nothing half-written; damaged folders are refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from files import FAMILIES, FLOAT32, random_params, write_gguf

from tokeff.errors import UserError
from tokeff.models import checkpoint
from tokeff.models.config import Precision
from tokeff.models.load import load

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved Gemma 3 (the family with every optional part but biases), and what went in."""
    cfg, optional = FAMILIES["gemma3"]
    root = tmp_path_factory.mktemp("saved")
    model = load(write_gguf(root / "m.gguf", "gemma3", cfg, random_params(cfg, optional)), FLOAT32)
    return checkpoint.save(root / "model", model.cfg, model.params, model.tokenizer), model


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def test_round_trip(saved):
    path, model = saved
    back = load(path, FLOAT32)
    assert back.cfg == model.cfg
    assert jax.tree.structure(back.params) == jax.tree.structure(model.params)
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)
    assert back.tokenizer.encode("the") == model.tokenizer.encode("the")
    assert back.tokenizer.template == model.tokenizer.template
    assert sorted(p.name for p in path.iterdir()) == ["arrays", "config.json", "tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_biases_and_untied_heads(arch, tmp_path):
    cfg, optional = FAMILIES[arch]
    params = random_params(cfg, optional)
    back = load(checkpoint.save(tmp_path / arch, cfg, params), FLOAT32)
    assert (back.cfg, back.tokenizer) == (cfg, None)
    assert jax.tree.structure(back.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)


def test_cast_on_the_way_in(saved):
    params = load(saved[0], Precision("bfloat16", "bfloat16", "bfloat16")).params
    assert (params.embed_VD.dtype, params.norm_D.dtype) == ("bfloat16", "float32")


def test_restored_onto_given_shardings(saved):
    mesh = jax.make_mesh((1,), ("model",), devices=jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    _, params, _ = checkpoint.load_saved(saved[0], FLOAT32, lambda shapes: jax.tree.map(lambda _: sharding, shapes))
    assert all(x.sharding == sharding for x in jax.tree.leaves(params))


def test_existing_folder_is_kept(saved, one_line):
    path, model = saved
    with one_line("exists"):
        checkpoint.save(path, model.cfg, model.params)


def test_nothing_half_written(saved, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_tree", broken)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(tmp_path / "m", saved[1].cfg, saved[1].params)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": "other"}, "format"),
        ({"optional": ["q_bias"]}, "optional"),
        ({"D": 48}, "array blocks/0/attn_norm_D has shape (32,), config.json says (48,)"),
        ({"L": 3, "windows": [8, 8, 8]}, "array blocks/2/attn_norm_D has shape none"),
        ({"L": 10**7}, "L is"),
        ({"windows": [8]}, "windows"),
        ({"K": 3}, "key/value"),
        ({"eps": "x"}, "eps"),
        ({"surprise": 1}, "surprise"),
        ({"rope": {"base": -1.0}}, "rope"),
    ],
)
def test_config_that_does_not_fit(copy, change, word, one_line):
    head = json.loads((copy / "config.json").read_text())
    for key, value in change.items():
        (head if key in head else head["config"])[key] = value
    (copy / "config.json").write_text(json.dumps(head))
    with one_line(word):
        load(copy, FLOAT32)


def test_damaged_arrays(copy, one_line):
    for file in (copy / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with one_line("arrays"):
        load(copy, FLOAT32)
