"""Logits equal transformers': a random tiny model of every family, and SmolLM2 itself."""

import argparse
import inspect
import json

import jax
import numpy as np
import pytest
from dense import forward
from files import hf_config, hf_tensors
from safetensors.numpy import save_file

from tokeff.models.config import Precision
from tokeff.models.load import load

T = 96
PARADISE = """Of Man's first disobedience, and the fruit
Of that forbidden tree, whose mortal taste
Brought death into the World, and all our woe,
With loss of Eden, till one greater Man
Restore us, and regain the blissful seat,
Sing, Heavenly Muse, that, on the secret top
Of Oreb, or of Sinai, didst inspire
That shepherd, who first taught the chosen seed
In the beginning how the Heavens and Earth
Rose out of Chaos."""


@pytest.mark.peers
def test_every_family_equals_transformers(peers, tmp_path, subtests):
    peers("make_tiny.py", tmp_path)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) >= 13
    for folder in folders:
        with subtests.test(folder.name):
            model = load(folder, Precision())
            got = np.asarray(forward(model.params, model.cfg, np.load(folder / "tokens.npy")))
            worst = np.abs(got - np.load(folder / "logits.npy")).max()
            print(f"{folder.name}: max abs difference {worst:.1e}")
            assert worst < 1e-4


@pytest.mark.peers
def test_smollm2_equals_transformers(peers, tmp_path, smollm2):
    """The same dequantised weights through transformers' LlamaForCausalLM: max abs difference of logits below 2e-3."""
    cfg = smollm2.cfg
    tokens = np.array([smollm2.tokenizer.encode(PARADISE)])[:, :T]
    assert tokens.shape == (1, T)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(cfg, architectures=["LlamaForCausalLM"])))
    save_file(hf_tensors(cfg, smollm2.params), tmp_path / "model.safetensors", {"format": "pt"})
    np.save(tmp_path / "tokens.npy", tokens)
    peers("make_tiny.py", "--score", tmp_path)
    worst = np.abs(np.asarray(forward(smollm2.params, cfg, tokens)) - np.load(tmp_path / "logits.npy")).max()
    print(f"smollm2-135m over {tokens.shape[1]} tokens: max abs difference {worst:.1e}")
    assert worst < 2e-3


@pytest.mark.core
def test_smollm2_predicts_source_code(smollm2):
    """Perplexity over 96 tokens of argparse.py. With q and k left permuted it is 92."""
    tokens = np.array([smollm2.tokenizer.encode(inspect.getsource(argparse))[4096:][:T]])
    logp = np.asarray(jax.nn.log_softmax(forward(smollm2.params, smollm2.cfg, tokens)[0, :-1]))
    perplexity = np.exp(-logp[np.arange(T - 1), tokens[0, 1:]].mean())
    print(f"perplexity {perplexity:.2f}")
    assert perplexity < 20
