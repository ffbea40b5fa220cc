"""Writes tiny random models to disk in each file format, as other people's software does, for the loaders to read back."""

import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from tokeff.models.config import Config, Params, Precision, Rope
from tokeff.models.layout import BIASES, POST_NORMS, QK_NORMS, abstract, is_norm, stored_shape

SIZES = {"V": 64, "D": 32, "F": 64, "L": 2, "N": 4, "K": 2, "H": 16, "max_len": 64, "eos": (2,), "bos": 1}
FLOAT32 = Precision()
FAMILIES = {  # GGUF architecture -> (Config, optional fields)
    "llama": (Config("tiny", **SIZES, rope=Rope(5e5)), ()),
    "qwen2": (Config("tiny", **SIZES, rope=Rope(1e6), tied=False), BIASES),
    "qwen3": (Config("tiny", **SIZES, rope=Rope(1e6)), QK_NORMS),
    "gemma2": (
        Config("tiny", **SIZES, windows=(8, None), act="gelu_tanh", softcap=50.0, final_softcap=30.0, embed_scale=32**0.5),
        POST_NORMS,
    ),
    "gemma3": (
        Config(
            "tiny",
            **SIZES,
            rope=Rope(1e6, "linear", 8.0),
            local_rope=Rope(1e4),
            windows=(8, 8),
            act="gelu_tanh",
            embed_scale=32**0.5,
        ),
        QK_NORMS + POST_NORMS,
    ),
}
HF_BLOCK = {
    "attn_norm_D": "input_layernorm.weight",
    "q_NHD": "self_attn.q_proj.weight",
    "k_KHD": "self_attn.k_proj.weight",
    "v_KHD": "self_attn.v_proj.weight",
    "o_DNH": "self_attn.o_proj.weight",
    "q_bias_NH": "self_attn.q_proj.bias",
    "k_bias_KH": "self_attn.k_proj.bias",
    "v_bias_KH": "self_attn.v_proj.bias",
    "q_norm_H": "self_attn.q_norm.weight",
    "k_norm_H": "self_attn.k_norm.weight",
    "ffn_norm_D": "post_attention_layernorm.weight",
    "gate_FD": "mlp.gate_proj.weight",
    "up_FD": "mlp.up_proj.weight",
    "down_DF": "mlp.down_proj.weight",
}
HF_GEMMA = {
    **HF_BLOCK,
    "ffn_norm_D": "pre_feedforward_layernorm.weight",
    "post_attn_norm_D": "post_attention_layernorm.weight",
    "post_ffn_norm_D": "post_feedforward_layernorm.weight",
}


def random_params(cfg: Config, optional: tuple[str, ...], seed: int = 0) -> Params:
    """Random float32 Params with every part away from its neutral value."""
    leaves, tree = jax.tree.flatten(abstract(cfg, FLOAT32, optional))
    rng = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves])


def hf_tensors(cfg: Config, params: Params, gemma: bool = False) -> dict[str, np.ndarray]:
    """Tensors under their Hugging Face names and shapes; Gemma's norms without the 1."""

    def stored(field: str, value: jax.Array) -> np.ndarray:
        return np.asarray(value).reshape(stored_shape(field, cfg)) - (1 if gemma and is_norm(field) else 0)

    out = {"model.embed_tokens.weight": stored("embed_VD", params.embed_VD), "model.norm.weight": stored("norm_D", params.norm_D)}
    if params.head_VD is not None:
        out["lm_head.weight"] = stored("head_VD", params.head_VD)
    for i, block in enumerate(params.blocks):
        for field, name in (HF_GEMMA if gemma else HF_BLOCK).items():
            value = getattr(block, field)
            if value is not None:
                out[f"model.layers.{i}.{name}"] = stored(field, value)
    return out


def hf_config(cfg: Config, model_type: str = "llama", **more) -> dict:
    """The fields every config.json has."""
    return {
        "model_type": model_type,
        "vocab_size": cfg.V,
        "hidden_size": cfg.D,
        "intermediate_size": cfg.F,
        "num_hidden_layers": cfg.L,
        "num_attention_heads": cfg.N,
        "num_key_value_heads": cfg.K,
        "head_dim": cfg.H,
        "max_position_embeddings": cfg.max_len,
        "rms_norm_eps": cfg.eps,
        "rope_theta": cfg.rope.base,
        "tie_word_embeddings": cfg.tied,
        "eos_token_id": list(cfg.eos),
        "bos_token_id": cfg.bos,
        **more,
    }


def write_hf(folder: Path, cfg: Config, params: Params, **more) -> Path:
    """A Hugging Face folder of one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(cfg, **more)))
    save_file(hf_tensors(cfg, params), folder / "model.safetensors")
    return folder


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `LlamaModel.permute`: rows of each head from halves to interleaved pairs."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path: Path, arch: str, cfg: Config, params: Params, *, kind=None, tokenizer: bool = True, extra=None) -> Path:
    """A GGUF file as llama.cpp's converter lays it out: its tensor names, its keys, q and k permuted for llama.

    kind: quantisation of the matrices, float32 without it. extra: called with the writer before it writes.
    """
    gemma = arch.startswith("gemma")
    w = gguf.GGUFWriter(path, arch)
    _metadata(w, cfg, gemma)
    if tokenizer:
        _tokenizer(w, cfg)
    if extra:
        extra(w)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], cfg.L)
    for name, array in hf_tensors(cfg, params, gemma).items():
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            array = permute(array, cfg.N if "q_proj" in name else cfg.K)
        if gemma and "norm" in name:
            array = array + 1
        array = np.ascontiguousarray(array, np.float32)
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if kind is not None and array.ndim == 2:
            w.add_tensor(new, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            w.add_tensor(new, array)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _metadata(w: gguf.GGUFWriter, cfg: Config, gemma: bool) -> None:
    w.add_block_count(cfg.L)
    w.add_context_length(cfg.max_len)
    w.add_embedding_length(cfg.D)
    w.add_feed_forward_length(cfg.F)
    w.add_head_count(cfg.N)
    w.add_head_count_kv(cfg.K)
    w.add_key_length(cfg.H)
    w.add_value_length(cfg.H)
    w.add_layer_norm_rms_eps(cfg.eps)
    w.add_rope_freq_base(cfg.rope.base)
    if cfg.rope.kind == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(cfg.rope.factor)
    if gemma:
        w.add_sliding_window(cfg.windows[0])
    if cfg.softcap:
        w.add_attn_logit_softcapping(cfg.softcap)
        w.add_final_logit_softcapping(cfg.final_softcap)


def _tokenizer(w: gguf.GGUFWriter, cfg: Config) -> None:
    """A byte-level vocabulary of ASCII letters with two merges."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["Ġ", "t h", "th e"]
    tokens = ["<unk>", "<s>", "</s>", *(t.replace(" ", "") for t in letters)]
    tokens += [f"<pad{i}>" for i in range(cfg.V - len(tokens))]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens)
    w.add_token_types([3 if t.startswith("<") else 1 for t in tokens])
    w.add_token_merges(["t h", "th e"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_chat_template("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
