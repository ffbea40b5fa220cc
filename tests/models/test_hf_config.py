"""config.json of every family, in the old and the new layout, and what is refused."""

import pytest
from files import SIZES, hf_config

from tokeff.models.config import Config, Rope
from tokeff.models.hf_config import describe
from tokeff.models.layout import BIASES

pytestmark = pytest.mark.core
BASE = Config("tiny", **SIZES)


def parse(model_type="llama", **more):
    return describe(hf_config(BASE, model_type, **more), "tiny", "config.json").cfg


@pytest.mark.parametrize(
    ("table", "rope"),
    [
        ({"type": "linear", "factor": 4}, Rope(1e4, "linear", 4.0)),
        ({"rope_type": "default"}, Rope(1e4)),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            Rope(1e4, "yarn", 4.0, 16, attention_factor=1.1386294361119891),
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            Rope(1e4, "llama3", 8.0, 32, 1.0, 4.0),
        ),
    ],
)
def test_old_and_new_rope_layouts_agree(table, rope):
    old = parse(rope_theta=1e4, rope_scaling=table)
    new = parse(rope_theta=None, rope_parameters={**table, "rope_theta": 1e4})
    assert old.rope == new.rope == rope


def test_gemma3_old_and_new_layouts_agree():
    gemma = {"num_hidden_layers": 6, "sliding_window": 8}
    old = parse("gemma3_text", **gemma, rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling={"rope_type": "linear", "factor": 8.0})
    tables = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    types = ["sliding_attention"] * 5 + ["full_attention"]
    new = parse("gemma3_text", **gemma, rope_theta=None, rope_parameters=tables, layer_types=types)
    assert old == new
    assert new.windows == (8, 8, 8, 8, 8, None)
    assert (new.rope_of(0), new.rope_of(5)) == (Rope(1e4), Rope(1e6, "linear", 8.0))
    assert (new.scale, new.embed_scale, new.act) == (256**-0.5, 32**0.5, "gelu_tanh")


def test_gemma3_wrapper_gives_its_text_half():
    text = hf_config(BASE, "gemma3_text", sliding_window=8)
    wrapped = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [1, 106]}
    del text["eos_token_id"], text["head_dim"], text["num_attention_heads"], text["num_key_value_heads"]
    cfg = describe(wrapped, "tiny", "config.json", eos=(106, 7)).cfg
    assert (cfg.N, cfg.K, cfg.H) == (8, 4, 256)
    assert cfg.eos == (1, 106, 7)


def test_windows_of_each_family():
    assert parse("mistral", sliding_window=8).windows == (8, 8)
    assert parse("mistral", sliding_window=None).windows == (None, None)
    assert parse("gemma2", sliding_window=8).windows == (8, None)
    assert parse("qwen2", sliding_window=8).windows == (None, None)
    assert parse("qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=1).windows == (None, 8)


def test_gemma2_null_softcap_is_none_and_absent_is_the_default():
    assert parse("gemma2").softcap == 50.0
    assert parse("gemma2", attn_logit_softcapping=None).softcap == 0.0


def test_attention_bias_expects_biases():
    assert describe(hf_config(BASE, attention_bias=True), "tiny", "config.json").optional == BIASES


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model_type": "mamba"}, ["'mamba'", "supported: llama, mistral, qwen2, qwen3, gemma2, gemma3_text"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'", "supported: default, linear, llama3, yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["factor"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, ["truncate"]),
        ({"hidden_act": "relu"}, ["'relu'", "silu"]),
        ({"num_key_value_heads": 3}, ["4 query heads", "3 key/value heads"]),
        ({"hidden_size": -5}, ["hidden_size", "'-5'"]),
        ({"hidden_size": True}, ["hidden_size"]),
        ({"hidden_size": 10**30}, ["hidden_size"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "4096"]),
        ({"vocab_size": None}, ["has no vocab_size"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps"]),
        ({"rope_theta": "1e4"}, ["rope_theta"]),
        ({"eos_token_id": ["x"]}, ["eos_token_id"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantised", "GGUF"]),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 2}, ["layer_types"]),
    ],
)
def test_refused_in_one_line(more, words, one_line):
    with one_line("config.json", *words):
        describe({**hf_config(BASE), **more}, "tiny", "config.json")
