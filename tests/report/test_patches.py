"""The picture of kept and merged patches: what it shows is computed rightly, and it is drawn."""

import numpy as np
import pytest

from tokeff.errors import UserError
from tokeff.models.flow import EMPTY
from tokeff.report.patches import (
    ELSEWHERE,
    GONE,
    TINT,
    as_seen,
    borders,
    frames_as_seen,
    kept_frames,
    kept_patches,
    source_of,
)

pytestmark = pytest.mark.core
GRID = (2, 3)
SOURCE = np.array([0, EMPTY, 1, 0, 2, 1])


def pixels():
    return np.random.default_rng(0).integers(0, 256, (8, 12, 3)).astype(np.uint8)


def test_places_become_sources():
    assert source_of(np.array([EMPTY, 4, 1]), 6).tolist() == [EMPTY, 2, EMPTY, EMPTY, 1, EMPTY]


def test_merged_patches_are_means_and_dropped_ones_fade():
    given = pixels()
    shown = as_seen(given, SOURCE, GRID)

    def patch(picture, i):
        y, x = divmod(i, 3)
        return picture[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]

    for i, of in enumerate(SOURCE):
        same = [patch(given, j) / 255 for j in range(6) if SOURCE[j] == of]
        wanted = 1 - GONE * (1 - patch(given, i) / 255) if of == EMPTY else np.mean(same, axis=0)
        np.testing.assert_allclose(patch(shown, i), wanted, atol=1e-12)


def test_borders_part_unlike_rows():
    """By hand: of the 7 edges inside, those between the two patches of rows 0 and 1 have none; the dropped patch has none outside."""
    found = {tuple(map(tuple, ends)) for ends in borders(SOURCE, GRID).tolist()}
    assert ((0, 1), (1, 1)) not in found and ((2, 1), (3, 1)) not in found  # below the first and the third patch
    assert ((1, 0), (2, 0)) not in found and ((1, 1), (2, 1)) in found  # above and below the dropped one
    assert len(found) == 5 + 9


def test_a_picture_of_two_methods():
    picture = kept_patches(pixels(), {"merged": SOURCE, "kept": np.array([0, EMPTY, 1, 2, EMPTY, EMPTY])}, GRID)
    assert picture.png.startswith(b"\x89PNG") and b"4 patches merged" in picture.svg and b"all 6 patches" in picture.svg
    with pytest.raises(UserError, match="2 x 3 patches"):
        kept_patches(pixels(), {"short": SOURCE[:5]}, GRID)
    with pytest.raises(UserError, match="2 x 5 patches"):
        kept_patches(pixels(), {"merged": SOURCE}, (2, 5))


def test_frames_show_what_stands_for_them():
    """By hand, 2 frames of 2 x 3 patches, of which the first stands for both and another for its neighbour."""
    frames = np.stack([pixels(), pixels()[::-1]])
    source = np.array([[0, 1, EMPTY, 3, 4, 5], [0, 7, 7, EMPTY, 10, 11]])
    shown = frames_as_seen(frames, source, GRID)

    def patch(x, t, i):
        y, x0 = divmod(i, 3)
        return x[t, 4 * y : 4 * y + 4, 4 * x0 : 4 * x0 + 4]

    given = frames / 255
    np.testing.assert_allclose(patch(shown, 0, 0), (patch(given, 0, 0) + patch(given, 1, 0)) / 2, atol=1e-12)
    np.testing.assert_allclose(patch(shown, 1, 1), (patch(given, 1, 1) + patch(given, 1, 2)) / 2, atol=1e-12)
    for t, i in ((1, 0), (1, 2)):  # stand elsewhere
        np.testing.assert_allclose(patch(shown, t, i), (1 - TINT) * patch(given, t, i) + TINT * ELSEWHERE, atol=1e-12)
    np.testing.assert_allclose(patch(shown, 0, 2), 1 - GONE * (1 - patch(given, 0, 2)), atol=1e-12)
    np.testing.assert_allclose(patch(shown, 0, 4), patch(given, 0, 4), atol=1e-12)


def test_a_clip_of_two_methods():
    frames = np.stack([pixels(), pixels(), pixels()])
    every = np.arange(18).reshape(3, 6)
    picture = kept_frames(frames, {"kept": np.where(every % 2, every, EMPTY), "first frame": np.stack([every[0]] * 3)}, GRID)
    assert picture.png.startswith(b"\x89PNG") and b"9 rows" in picture.svg and b"18 rows" in picture.svg and b"frame 3" in picture.svg
    with pytest.raises(UserError, match="2 x 3 patches"):
        kept_frames(frames, {"short": every[:2]}, GRID)
    with pytest.raises(UserError, match="frames of shape"):
        kept_frames(frames[0], {}, GRID)
