"""Image towers and LLaVAs from folders: what is missing, damaged or unsupported is said in one line. Parity: test_vision_parity.py."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tokeff.models.config import Precision
from tokeff.models.llava_hf import describe_llava
from tokeff.models.load import load
from tokeff.models.vit_hf import describe_vit, load_vit

D, F, SIDE, PATCH = 8, 12, 8, 4
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": SIDE, "patch_size": PATCH,
}  # fmt: skip
TEXT = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": F, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40,
    "num_key_value_heads": 2,
}  # fmt: skip
LLAVA = {"model_type": "llava", "vision_config": {**CLIP, "num_hidden_layers": 3}, "text_config": TEXT, "image_token_index": 39}
pytestmark = pytest.mark.core


def tensors() -> dict[str, np.ndarray]:
    """A CLIP tower of one layer, as files have it."""
    shapes = {
        "embeddings.class_embedding": (D,), "embeddings.patch_embedding.weight": (D, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": (5, D),
    }  # fmt: skip
    layer = "encoder.layers.0."
    for name in ("pre_layrnorm", "post_layernorm", f"{layer}layer_norm1", f"{layer}layer_norm2"):
        shapes |= {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes |= {f"{layer}self_attn.{name}.weight": (D, D), f"{layer}self_attn.{name}.bias": (D,)}
    for name, shape in (("fc1", (F, D)), ("fc2", (D, F))):
        shapes |= {f"{layer}mlp.{name}.weight": shape, f"{layer}mlp.{name}.bias": shape[:1]}
    rng = np.random.default_rng(0)
    return {f"vision_model.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder, arrays, config=CLIP):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(arrays, folder / "model.safetensors")
    return folder


def test_a_tower_is_read_whatever_stands_beside_it(tmp_path):
    """A whole CLIP has a text tower too, which is left out; precision is that asked for, but for norms."""
    beside = {"text_model.x.weight": np.zeros(3, np.float32), "logit_scale": np.zeros((), np.float32)}
    both = {"model_type": "clip", "vision_config": {k: v for k, v in CLIP.items() if k != "model_type"}}
    alone = load_vit(write(tmp_path / "alone", tensors()), Precision("bfloat16", "bfloat16", "bfloat16"))
    whole = load_vit(write(tmp_path / "whole", tensors() | beside, both), Precision())
    assert alone.cfg.S == whole.cfg.S == 5 and alone.cfg.grid == (2, 2) and alone.preprocessing is None
    assert alone.params.patch_DI.dtype == "bfloat16" and alone.params.norm_D.dtype == whole.params.patch_DI.dtype == "float32"
    np.testing.assert_array_equal(whole.params.patch_DI, tensors()["vision_model.embeddings.patch_embedding.weight"].reshape(D, -1))


def test_files_that_do_not_fit_are_refused(tmp_path, one_line):
    known = tensors()
    gone = "vision_model.encoder.layers.0.mlp.fc1.weight"
    for i, (arrays, word) in enumerate((
        ({k: v for k, v in known.items() if k != gone}, "fc1.weight is missing"), (known | {gone: known[gone].T.copy()}, "shape"),
        (known | {"more.weight": known[gone]}, "no place"), ({"a": known[gone]}, "expected one"),
    )):  # fmt: skip
        with one_line(word):
            load_vit(write(tmp_path / str(i), arrays), Precision())
    with one_line("safetensors"):
        load_vit(tmp_path, Precision()) if (tmp_path / "config.json").write_text(json.dumps(CLIP)) else None


def test_configs_of_towers_that_are_not_supported(one_line):
    for wrong, word in (
        ({"model_type": "swin"}, "swin"), ({"hidden_act": "relu"}, "relu"), ({"patch_size": 3}, "divide"),
        ({"num_attention_heads": 3}, "heads"), ({"image_size": "large"}, "image_size"),
        ({"patch_size": [4, 2]}, "patches"), ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ):  # fmt: skip
        with one_line(word):
            describe_vit({**CLIP, **wrong}, "tower", "here")


def test_configs_of_llavas(one_line):
    cfg, text = describe_llava(LLAVA, "model", "here")
    assert cfg.layers == (1,) and not cfg.cls and cfg.canvases == () and text.cfg.V == 40
    assert describe_llava({**LLAVA, "vision_feature_layer": [1, -1]}, "model", "here")[0].layers == (0, 2)
    released = {"model_type": "llava", "vision_config": CLIP, "text_config": {"vocab_size": 32064}, "vision_feature_layer": -1}
    cfg, text = describe_llava(released, "model", "here")
    assert (text.cfg.D, text.cfg.L, text.cfg.F, cfg.image) == (4096, 32, 11008, 32000)
    siglip = {**CLIP, "model_type": "siglip_vision_model"}
    one = {"model_type": "llava_onevision", "video_token_index": 38, "image_grid_pinpoints": [[8, 8]]}
    for wrong, word in (
        ({"model_type": "idefics"}, "idefics"), ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"image_token_index": 40}, "vocabulary"), ({"vision_feature_layer": 0}, "vision_feature_layer"),
        ({"vision_feature_layer": -4}, "vision_feature_layer"),
        ({"vision_config": siglip}, "select_strategy"), ({"text_config": {**TEXT, "model_type": "gpt2"}}, "gpt2"),
        ({"model_type": "llava_next", "image_grid_pinpoints": [[9, 8]]}, "image_grid_pinpoints"),
        (one | {"vision_aspect_ratio": "pad"}, "aspect"), (one | {"video_token_index": 40}, "vocabulary"),
    ):  # fmt: skip
        with one_line(word):
            describe_llava({**LLAVA, **wrong}, "model", "here")


def test_text_models_are_not_looked_for_in_them(tmp_path, one_line):
    """`load` says which function reads them."""
    for config, word in ((CLIP, "load_vit"), (LLAVA, "load_llava")):
        with one_line(word):
            load(write(tmp_path / config["model_type"], tensors(), config))
