"""Writes a tiny random Whisper in both file formats, as other people's software does."""

import json
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tokeff.models.whisper_config import WhisperConfig
from tokeff.models.whisper_load import build

SIZES = {"V": 40, "D": 16, "F": 24, "L": 2, "layers": 3, "N": 2, "I": 4, "S": 20, "max_len": 16}
CFG = WhisperConfig("tiny", **SIZES, eos=0, start=(3,), never=(5, 17), never_first=(24,))
FUSED = {"self_attention/linear_0": "qkv", "attention/linear_0": "q", "attention/linear_1": "kv"}
OURS = {  # the CTranslate2 name of what stands in a layer under which Hugging Face name
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "attention/linear_2": "encoder_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}


def tensors(cfg: WhisperConfig = CFG) -> dict[str, np.ndarray]:
    """Random float16 weights by Hugging Face name, as float32: what both formats can hold exactly."""
    rng, made = np.random.default_rng(39), {}

    def leaf(name, stored, shape):
        scale = 1.0 if "positions" in name or "v_proj" in name else 0.3  # place and sound matter, or it would write one token over and over
        made[name] = (rng.normal(size=stored) * scale + name.endswith("norm.weight")).astype(np.float16).astype(np.float32)

    build(cfg, leaf)
    return made


def write_hf(folder: Path, weights: dict[str, np.ndarray], cfg: WhisperConfig = CFG) -> Path:
    folder.mkdir()
    table = {"model_type": "whisper", "vocab_size": cfg.V, "d_model": cfg.D, "num_mel_bins": cfg.I, "max_source_positions": cfg.S}
    table |= {"encoder_layers": cfg.L, "decoder_layers": cfg.layers, "max_target_positions": cfg.max_len, "eos_token_id": cfg.eos}
    table |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("attention_heads", cfg.N), ("ffn_dim", cfg.F))}
    table |= {"decoder_start_token_id": cfg.start[0], "suppress_tokens": list(cfg.never), "begin_suppress_tokens": list(cfg.never_first)}
    (folder / "config.json").write_text(json.dumps(table))
    save_file(weights, folder / "model.safetensors")
    return folder


def stored(weights: dict[str, np.ndarray], cfg: WhisperConfig = CFG) -> dict[str, np.ndarray]:
    """The same weights under CTranslate2's names, with q, k and v as one, a zero bias for k, and the settings."""
    made = {}
    for side, n in (("encoder", cfg.L), ("decoder", cfg.layers)):
        made |= {f"{side}/num_heads": np.int16(cfg.N), f"{side}/pre_norm": np.int8(1), f"{side}/activation": np.int8(3)}
        made[f"{side}/position_encodings/encodings"] = weights[f"model.{side}.embed_positions.weight"]
        made |= ends(f"{side}/layer_norm", weights, f"model.{side}.layer_norm")
        for i in range(n):
            at = f"model.{side}.layers.{i}"
            for theirs, name in OURS.items():
                if f"{at}.{name}.weight" in weights:
                    made |= ends(f"{side}/layer_{i}/{theirs}", weights, f"{at}.{name}")
            for theirs, letters in FUSED.items():
                kind = "self_attn" if theirs.startswith("self") else "encoder_attn"
                if f"{at}.{kind}.q_proj.weight" in weights:
                    both = [(weights[f"{at}.{kind}.{x}_proj.weight"], weights.get(f"{at}.{kind}.{x}_proj.bias")) for x in letters]
                    made[f"{side}/layer_{i}/{theirs}/weight"] = np.concatenate([w for w, _ in both])
                    made[f"{side}/layer_{i}/{theirs}/bias"] = np.concatenate([np.zeros(cfg.D) if b is None else b for _, b in both])
    for conv in ("conv1", "conv2"):
        made |= ends(f"encoder/{conv}", weights, f"model.encoder.{conv}")
    made["decoder/embeddings/weight"] = weights["model.decoder.embed_tokens.weight"]
    return made


def ends(theirs: str, weights: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    names = ("gamma", "beta") if "norm" in theirs else ("weight", "bias")
    return {f"{theirs}/{end}": weights[f"{name}.{ours}"] for end, ours in zip(names, ("weight", "bias"))}


def text(s: str) -> bytes:
    return struct.pack("<H", len(s) + 1) + s.encode() + b"\0"


def tensor(name: str, array: np.ndarray) -> bytes:
    kind = {1: 1, 2: 2}.get(array.itemsize) if array.ndim == 0 else 4
    raw = array.tobytes() if array.ndim == 0 else array.astype(np.float16).tobytes()
    return text(name) + struct.pack(f"<B{array.ndim}IBI", array.ndim, *array.shape, kind, len(raw)) + raw


def head(n: int, version: int = 6, spec: str = "WhisperSpec") -> bytes:
    return struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, n)


ALIASES = struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")


def ct2(arrays: dict[str, np.ndarray], aliases: bytes = ALIASES) -> bytes:
    """A model.bin of these tensors in float16."""
    return head(len(arrays)) + b"".join(tensor(name, np.asarray(x)) for name, x in arrays.items()) + aliases


def write_ct2(folder: Path, weights: dict[str, np.ndarray], cfg: WhisperConfig = CFG) -> Path:
    folder.mkdir()
    (folder / "model.bin").write_bytes(ct2(stored(weights, cfg)))
    (folder / "config.json").write_text(json.dumps({"suppress_ids": list(cfg.never), "suppress_ids_begin": list(cfg.never_first)}))
    return folder
