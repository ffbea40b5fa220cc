"""The picture of kept and merged patches: what it shows is computed rightly, and it is drawn."""

import numpy as np
import pytest

from tokeff.errors import UserError
from tokeff.models.flow import EMPTY
from tokeff.report.patches import GONE, as_seen, borders, kept_patches, source_of

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
