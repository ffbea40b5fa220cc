"""Random tiny models of every family, written by transformers, with the logits transformers gives. Run with the peers' python.

    python make_tiny.py OUT          one folder a case: config.json, model.safetensors, tokens.npy, logits.npy
    python make_tiny.py --score DIR  DIR holds config.json, model.safetensors, tokens.npy; writes logits.npy

Everything in float32 with eager attention. Token ids are random over the vocabulary, two rows of 48.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers as tf

V, D, L, T = 256, 64, 3, 48
SIZES = {"vocab_size": V, "hidden_size": D, "intermediate_size": 96, "num_hidden_layers": L, "max_position_embeddings": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
LINEAR = {"rope_type": "linear", "factor": 8.0}
GLOBAL = {"full_attention": {**LINEAR, "rope_theta": 1e4}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}

CASES = {
    "llama": (tf.LlamaConfig, {"tie_word_embeddings": True}),
    "llama_untied_head_dim": (tf.LlamaConfig, {"head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "llama_llama3_rope": (tf.LlamaConfig, {"rope_parameters": LLAMA3}),
    "llama_linear_rope": (tf.LlamaConfig, {"rope_parameters": {**LINEAR, "rope_theta": 1e4}}),
    "llama_yarn_rope": (tf.LlamaConfig, {"rope_parameters": YARN}),
    "qwen2_bias": (tf.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2_window_layers": (tf.Qwen2Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen2_yarn_mscale": (tf.Qwen2Config, {"rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0}}),
    "qwen3": (tf.Qwen3Config, {"head_dim": 32}),
    "mistral_window": (tf.MistralConfig, {"sliding_window": 8}),
    "mistral_full": (tf.MistralConfig, {"sliding_window": None}),
    "gemma2": (tf.Gemma2Config, {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": (tf.Gemma3TextConfig, {**GEMMA, "sliding_window_pattern": 3, "rope_parameters": GLOBAL}),
}


def randomise(model: torch.nn.Module) -> None:
    """Weights large enough for every part to matter: norms and biases away from their initial 0 and 1."""
    for name, p in model.named_parameters():
        scale = 0.3 if p.ndim == 1 else 0.12
        p.data = torch.randn_like(p) * scale + (1.0 if "norm" in name and "gemma" not in model.config.model_type else 0.0)


def score(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.float().numpy()


def make(out: Path) -> None:
    torch.manual_seed(0)
    for name, (kind, more) in CASES.items():
        model = tf.AutoModelForCausalLM.from_config(kind(**{**SIZES, **more}), attn_implementation="eager").float()
        randomise(model)
        tokens = np.random.default_rng(1).integers(0, V, (2, T))
        model.save_pretrained(out / name)
        np.save(out / name / "tokens.npy", tokens)
        np.save(out / name / "logits.npy", score(model, tokens))


def rescore(folder: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    np.save(folder / "logits.npy", score(model, np.load(folder / "tokens.npy")))


if __name__ == "__main__":
    torch.set_num_threads(2)
    if sys.argv[1] == "--score":
        rescore(Path(sys.argv[2]))
    else:
        make(Path(sys.argv[1]))
