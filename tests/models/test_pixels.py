"""Pictures become the numbers a tower reads: modes, odd sizes, and what is refused in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from tokeff.models.anyres import best_size, crops, unpadded
from tokeff.models.pixels import Preprocessing, preprocessing, read_preprocessing

CLIP = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 30}, "crop_size": {"height": 24, "width": 24}}
pytestmark = pytest.mark.core


def test_clip_keeps_the_aspect_and_cuts_the_middle():
    """A 61 x 40 picture: the shorter side becomes 30, the other int(30 * 61 / 40) = 45; then rows 10 to 33 and columns 3 to 26."""
    pixels = np.random.default_rng(0).integers(0, 256, (61, 40, 3), np.uint8)
    p = preprocessing(CLIP, "here")
    assert p.shape(61, 40) == (45, 30) and p.shape(40, 61) == (30, 45)
    small = np.asarray(Image.fromarray(pixels).resize((30, 45), Image.Resampling.BICUBIC), np.float64)[10:34, 3:27]
    expected = (small / 255 - np.array([0.48145466, 0.4578275, 0.40821073])) / np.array([0.26862954, 0.26130258, 0.27577711])
    np.testing.assert_allclose(p(pixels)[0], expected, atol=1e-5)


def test_other_processors():
    """SigLIP and ViT squeeze into an exact size; LLaVA may pad to a square in the colour of the mean; nothing may be left out."""
    siglip = preprocessing({"image_processor_type": "SiglipImageProcessor", "size": {"height": 20, "width": 24}}, "here")
    assert siglip(np.full((7, 9, 3), 255, np.uint8)).shape == (1, 20, 24, 3) and siglip.resample == 3
    np.testing.assert_allclose(siglip(np.full((7, 9, 3), 255, np.uint8)), 1.0)
    vit = preprocessing({"feature_extractor_type": "ViTFeatureExtractor", "size": 16}, "here")
    assert vit.exact == (16, 16) and vit.crop is None and vit.resample == 2
    old = preprocessing({"feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16}, "here")
    assert old.short == 16 and old.crop == (16, 16)
    llava = preprocessing({**CLIP, "image_processor_type": "LlavaImageProcessor", "do_pad": True}, "here")
    wide = np.asarray(llava.resized(Image.new("RGB", (60, 20))))
    assert wide.shape == (24, 24, 3) and wide[0, 0].tolist() == [122, 116, 104] and wide[12, 12].tolist() == [0, 0, 0]
    bare = preprocessing({"do_resize": False, "do_rescale": False, "do_normalize": False}, "here")
    assert bare == Preprocessing(resample=2, scale=1.0)
    np.testing.assert_array_equal(bare(np.full((3, 5, 3), 7, np.uint8)), np.full((1, 3, 5, 3), 7.0))


def test_modes_and_files(tmp_path):
    """Every mode of 8 bits a channel, as an image and out of a file."""
    p = preprocessing(CLIP, "here")
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
        assert np.isfinite(p(Image.new(mode, (31, 33)))).all()
    Image.new("LA", (31, 33)).save(tmp_path / "grey.png")
    assert p([tmp_path / "grey.png", str(tmp_path / "grey.png")]).shape == (2, 24, 24, 3)


def test_pictures_that_cannot_be_read_are_refused(tmp_path, one_line):
    p = preprocessing(CLIP, "here")
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    for given, word in (
        (np.zeros((4, 4), np.uint8), "array"), (np.zeros((4, 4, 3)), "float64"), (np.zeros((0, 4, 3), np.uint8), "array"), (7, "int"),
        (Image.new("I;16", (8, 8)), "I;16"), (Image.new("F", (8, 8)), "8 bits"), (tmp_path / "text.png", "text.png"),
        (tmp_path / "cut.png", "cut.png"), (tmp_path / "none.png", "none.png"), ([], "no picture"), (Image.new("RGB", (1, 9000)), "narrow"),
    ):  # fmt: skip
        with one_line(word):
            p(given)
    with one_line("different sizes"):
        Preprocessing()([Image.new("RGB", (4, 5)), Image.new("RGB", (5, 4))])
    with one_line("smaller than the crop"):
        Preprocessing(crop=(9, 9))(Image.new("RGB", (4, 5)))


def test_configs_that_cannot_work_are_refused(tmp_path, one_line):
    for wrong, word in (
        ({"size": {"shortest_edge": 20}}, "crop"), ({"size": {"longest_edge": 20}}, "longest_edge"), ({"resample": 9}, "resample"),
        ({"image_mean": [1, 2]}, "image_mean"), ({"image_std": [0, 1, 1]}, "image_std"), ({"size": "big"}, "size"),
        ({"crop_size": {"shortest_edge": 8}}, "crop_size"), ({"do_resize": "no"}, "do_resize"),
    ):  # fmt: skip
        with one_line(word):
            preprocessing({**CLIP, **wrong}, "here")
    assert read_preprocessing(tmp_path) is None
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP))
    assert read_preprocessing(tmp_path) == preprocessing(CLIP, "here")


def test_a_canvas_of_crops():
    """The canvas that shows most, the picture in its middle, crops in reading order behind the whole picture; and the bars off again."""
    sizes = ((24, 48), (48, 24), (48, 48), (72, 24))
    assert best_size((20, 60), sizes) == (24, 48) and best_size((60, 20), sizes) == (72, 24) and best_size((90, 90), sizes) == (48, 48)
    picture = Image.fromarray(np.full((30, 48, 3), 200, np.uint8))
    whole, *parts = crops(picture, sizes, (24, 24), 2)
    assert [p.size for p in (whole, *parts)] == [(24, 24)] * 5
    canvas = np.block([[np.asarray(p)[:, :, 0] for p in parts[:2]], [np.asarray(p)[:, :, 0] for p in parts[2:]]])
    assert (canvas[9:39] == 200).all() and not canvas[:9].any() and not canvas[39:].any()
    assert unpadded((30, 48), (6, 6)) == (slice(1, 5), slice(0, 6)) and unpadded((48, 30), (6, 6)) == (slice(0, 6), slice(1, 5))
