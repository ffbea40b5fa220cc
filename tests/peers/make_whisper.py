"""A random tiny Whisper with what transformers makes of it, and transformers' log-mel of a sound. Run with the peers' python.

    python make_whisper.py OUT    OUT/model: config.json, model.safetensors; beside it mel.npy (B, bands, frames), tokens.npy,
                                  rows.npy (encoder), logits.npy (decoder), sound.npy, log_mel.npy (bands, frames)

Everything in float32 with eager attention. Encoder and decoder differ in depth.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers as tf

SIZES = {"vocab_size": 96, "num_mel_bins": 8, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4}
SIZES |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 140}
SIZES |= {"max_target_positions": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}


def randomise(model: torch.nn.Module) -> None:
    """Weights large enough for every part to matter: norms and biases away from their initial 0 and 1."""
    for name, p in model.named_parameters():
        scale = 0.3 if p.ndim == 1 else 0.12
        p.data = torch.randn_like(p) * scale + (1.0 if name.endswith("norm.weight") else 0.0)


def main(out: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    model = tf.WhisperForConditionalGeneration._from_config(tf.WhisperConfig(**SIZES), attn_implementation="eager").float().eval()
    randomise(model)
    model.save_pretrained(out / "model")
    mel = rng.normal(size=(2, SIZES["num_mel_bins"], 2 * SIZES["max_source_positions"])).astype(np.float32)
    tokens = rng.integers(0, SIZES["vocab_size"], (2, 12))
    with torch.no_grad():
        done = model(input_features=torch.from_numpy(mel), decoder_input_ids=torch.from_numpy(tokens))
    t = np.arange(5 * 16_000) / 16_000
    sound = (0.3 * np.sin(2 * np.pi * (200 + 300 * t) * t) + 0.01 * rng.normal(size=len(t))).astype(np.float32)
    heard = tf.WhisperFeatureExtractor(feature_size=80)(sound, sampling_rate=16_000, return_tensors="np").input_features[0]
    made = {"mel": mel, "tokens": tokens, "rows": done.encoder_last_hidden_state.numpy(), "logits": done.logits.numpy()}
    for name, array in (made | {"sound": sound, "log_mel": heard}).items():
        np.save(out / f"{name}.npy", array)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(Path(sys.argv[1]))
