"""Hugging Face folders: what is read, and what a damaged or hostile one gives."""

import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from files import FAMILIES, FLOAT32, hf_tensors, random_params, write_hf
from safetensors.numpy import load_file, save_file

from tokeff.models.config import Precision
from tokeff.models.load import load

pytestmark = pytest.mark.core
CFG, _ = FAMILIES["llama"]
PARAMS = random_params(CFG, ())


@pytest.fixture
def folder(tmp_path):
    return write_hf(tmp_path / "tiny", CFG, PARAMS)


def edit(folder, change):
    """Rewrite the folder's tensors after `change(dict of tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(x, y)


def test_round_trip(folder):
    model = load(folder, FLOAT32)
    assert model.cfg == CFG
    assert model.tokenizer is None
    same(model.params, PARAMS)


def test_sharded_folder_reads_what_the_index_names(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")  # a second copy, not in the index
    index = {"weight_map": {n: file for file, part in parts.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    same(load(folder, FLOAT32).params, PARAMS)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files(folder, dtype):
    edit(folder, lambda t: t.update({n: x.astype(dtype) for n, x in t.items()}))
    same(load(folder, FLOAT32).params, jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), PARAMS))


def test_precision_casts_weights_and_keeps_norms(folder):
    params = load(folder, Precision("bfloat16", "bfloat16", "bfloat16")).params
    assert params.embed_VD.dtype == params.blocks[0].q_NHD.dtype == "bfloat16"
    assert params.norm_D.dtype == params.blocks[0].attn_norm_D.dtype == "float32"


def test_eos_of_generation_config_is_added(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert load(folder, FLOAT32).cfg.eos == (2, 5)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 2000, -1])
def test_truncated(folder, keep, one_line):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with one_line("model.safetensors", "truncated"):
        load(folder, FLOAT32)


def test_hostile_headers(folder, one_line):
    """Lengths and offsets that lie are refused by the header's reader, before anything is allocated."""
    file = folder / "model.safetensors"
    entry = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]}
    beyond = {"dtype": "F32", "shape": [4], "data_offsets": [2**60, 2**60 + 16]}
    for header in (entry, beyond):
        text = json.dumps({"model.embed_tokens.weight": header}).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
        with one_line("model.safetensors"):
            load(folder, FLOAT32)
    file.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with one_line("model.safetensors"):
        load(folder, FLOAT32)


def test_wrong_shape_names_tensor_and_both_shapes(folder, one_line):
    edit(folder, lambda t: t.update({"model.layers.1.mlp.up_proj.weight": np.zeros((64, 31), np.float32)}))
    with one_line("model.layers.1.mlp.up_proj.weight", "(64, 31)", "(64, 32)"):
        load(folder, FLOAT32)


def test_missing_extra_and_unsupported_tensors(folder, one_line):
    bias = "model.layers.0.self_attn.o_proj.bias"
    edit(folder, lambda t: t.update({bias: np.zeros(32, np.float32)}))
    with one_line(bias, "no place"):
        load(folder, FLOAT32)
    edit(folder, lambda t: (t.pop(bias), t.pop("model.norm.weight")))
    with one_line("model.norm.weight", "missing"):
        load(folder, FLOAT32)
    edit(folder, lambda t: t.update({"model.norm.weight": np.zeros(32, np.int32)}))
    with one_line("model.norm.weight", "I32", "F32, F16, BF16"):
        load(folder, FLOAT32)


def test_index_cannot_leave_the_folder(folder, one_line):
    for name in ("../model.safetensors", "/etc/passwd", "gone.safetensors", "model.bin"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        with one_line("index.json", name):
            load(folder, FLOAT32)


def test_pickles_are_never_opened(folder, one_line):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for source in (folder, folder / "pytorch_model.bin"):
        with one_line("pickle", "safetensors"):
            load(source, FLOAT32)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '{"model_type": "llama"}', "\x00"])
def test_damaged_config(folder, text, one_line):
    (folder / "config.json").write_text(text)
    with one_line("config.json"):
        load(folder, FLOAT32)


def test_gemma_norms_get_their_one(tmp_path):
    cfg, optional = FAMILIES["gemma2"]
    params = random_params(cfg, optional)
    folder = write_hf(tmp_path, cfg, params, model_type="gemma2", sliding_window=8, query_pre_attn_scalar=16)
    save_file(hf_tensors(cfg, params, gemma=True), folder / "model.safetensors")
    model = load(folder, FLOAT32)
    np.testing.assert_allclose(model.params.norm_D, params.norm_D, atol=1e-6)
    np.testing.assert_array_equal(model.params.blocks[1].q_NHD, params.blocks[1].q_NHD)
