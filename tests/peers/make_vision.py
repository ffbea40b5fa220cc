"""Random tiny models that read images, written by transformers, with what transformers computes. Run with the peers' python.

    python make_vision.py OUT    one folder a case: config.json, model.safetensors, inputs and outputs as .npy

Everything in float32, eager attention. Towers: pixels (B, Y, X, C), hidden (L + 1, B, S, D), attention (L, B, N, S, S), rows, pooled and
logits where there are some. Models of images and text: tokens, pixels, sizes where there are crops, and logits.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from make_tiny import randomise

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 24, "patch_size": 8}
TEXT = {"hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT |= {"vocab_size": 61, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
IMAGE, VIDEO = 59, 60
CLIP = tf.CLIPVisionConfig(**TOWER, projection_dim=20)
SIGLIP = tf.SiglipVisionConfig(**TOWER, vision_use_head=False)

TOWERS = {
    "vit": (tf.ViTForImageClassification, tf.ViTConfig(**TOWER, num_labels=5)),
    "vit_no_bias": (tf.ViTForImageClassification, tf.ViTConfig(**{**TOWER, "image_size": [16, 24]}, num_labels=5, qkv_bias=False)),
    "clip": (tf.CLIPVisionModelWithProjection, CLIP),
    "siglip": (tf.SiglipVisionModel, tf.SiglipVisionConfig(**TOWER)),
    "siglip_no_head": (tf.SiglipVisionModel, SIGLIP),
}
LLAVA = {"image_token_index": IMAGE}
NEXT = {**LLAVA, "image_grid_pinpoints": [[24, 48], [48, 24], [48, 48], [72, 24]]}
VLMS = {
    "llava": tf.LlavaConfig(vision_config=CLIP, text_config=tf.LlamaConfig(**TEXT), **LLAVA),
    "llava_layers": tf.LlavaConfig(vision_config=CLIP, text_config=tf.MistralConfig(**TEXT), vision_feature_layer=[-2, 1], **LLAVA),
    "llava_siglip": tf.LlavaConfig(
        vision_config=SIGLIP, text_config=tf.Qwen2Config(**TEXT), vision_feature_layer=-1, vision_feature_select_strategy="full", **LLAVA
    ),
    "llava_next": tf.LlavaNextConfig(vision_config=CLIP, text_config=tf.LlamaConfig(**TEXT), **NEXT),
    "llava_onevision": tf.LlavaOnevisionConfig(
        vision_config=SIGLIP, text_config=tf.Qwen2Config(**TEXT), video_token_index=VIDEO, vision_aspect_ratio="anyres_max_2", **NEXT
    ),
}
SIZES = {"llava_next": [(40, 31), (17, 60)], "llava_onevision": [(40, 31), (50, 60)]}


def save(folder: Path, **arrays) -> None:
    for name, x in arrays.items():
        if x is not None:
            np.save(folder / f"{name}.npy", x.detach().numpy() if isinstance(x, torch.Tensor) else x)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(-3, -1)


def tower(folder: Path, kind, config) -> None:
    """One tower with two random images."""
    config._attn_implementation = "eager"
    model = kind(config).float().eval()
    randomise(model)
    model.save_pretrained(folder)
    sides = config.image_size if isinstance(config.image_size, list) else [config.image_size] * 2
    pixels = torch.randn(2, 3, *sides)
    with torch.no_grad():
        out = model(pixels, output_hidden_states=True, output_attentions=True)
        inner = model.vit if hasattr(model, "vit") else model.vision_model
        rows = inner(pixels)
    pooled = rows.last_hidden_state[:, 0] if hasattr(model, "vit") else rows.pooler_output
    logits = getattr(out, "logits", getattr(out, "image_embeds", None))
    hidden, attention = torch.stack(out.hidden_states), torch.stack(out.attentions)
    save(
        folder, pixels=channels_last(pixels), hidden=hidden, attention=attention, rows=rows.last_hidden_state, pooled=pooled, logits=logits
    )


def vlm(folder: Path, name: str, config) -> None:
    """One model of images and text: one image for each of two texts (of equal length where there are no crops)."""
    config._attn_implementation = "eager"
    model = tf.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").float().eval()
    randomise(model)
    model.save_pretrained(folder)
    for i, size in enumerate(SIZES.get(name, [(24, 24), (24, 24)])):
        crops = {}
        if name in SIZES:
            from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

            many = image_size_to_num_patches(size, config.image_grid_pinpoints, 24)
            pixels, crops = torch.randn(1, many, 3, 24, 24), {"image_sizes": torch.tensor([size])}
        else:
            pixels = torch.randn(1, 3, 24, 24)
        with torch.no_grad():
            features = model.get_image_features(pixels, **crops, return_dict=True).pooler_output[0]
            text = torch.randint(3, 50, (9,))
            tokens = torch.cat([text[:4], torch.full((len(features),), IMAGE), text[4:]])[None]
            logits = model(input_ids=tokens, pixel_values=pixels, **crops).logits
        flat = pixels.reshape(-1, 3, 24, 24)
        save(folder, **{f"pixels{i}": channels_last(flat), f"features{i}": features, f"tokens{i}": tokens.numpy(), f"logits{i}": logits})


def video(folder: Path) -> None:
    """Frames of a video for the OneVision model in this folder."""
    model = tf.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    frames = torch.randn(1, 4, 3, 24, 24)
    with torch.no_grad():
        features = model.model.get_video_features(frames, return_dict=True).pooler_output
        rows = features.reshape(-1, features.shape[-1]).shape[0] + 1
        tokens = torch.cat([torch.randint(3, 50, (4,)), torch.full((rows,), VIDEO), torch.randint(3, 50, (5,))])[None]
        logits = model(input_ids=tokens, pixel_values_videos=frames).logits
    save(folder, frames=channels_last(frames[0]), video_tokens=tokens.numpy(), video_logits=logits)


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.manual_seed(0)
    out = Path(sys.argv[1])
    for name, (kind, config) in TOWERS.items():
        tower(out / name, kind, config)
    for name, config in VLMS.items():
        vlm(out / name, name, config)
    video(out / "llava_onevision")
