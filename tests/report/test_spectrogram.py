"""The picture of merged rows: what it shows is computed rightly, and it is drawn."""

import numpy as np
import pytest

from tokeff.errors import UserError
from tokeff.models.flow import EMPTY
from tokeff.report.spectrogram import as_held, merged_rows, sizes

pytestmark = pytest.mark.core


def test_frames_are_means_over_their_row_and_those_that_are_gone_are_empty():
    mel, source = np.arange(12.0).reshape(6, 2), np.array([0, EMPTY, 0])
    held = as_held(mel, source)
    np.testing.assert_array_equal(held, [[4, 5], [6, 7], [np.nan] * 2, [np.nan] * 2, [4, 5], [6, 7]])
    assert sizes(source).tolist() == [2, 0, 2]


def test_a_picture_of_two_methods():
    mel, rng = np.random.default_rng(0).normal(size=(60, 8)), np.random.default_rng(1)
    picture = merged_rows(mel, {"half": rng.integers(0, 15, 30), "few": np.where(np.arange(30) < 3, EMPTY, 0)}, 0.3)
    assert picture.png.startswith(b"\x89PNG") and b"half of rows" in picture.svg
    with pytest.raises(UserError, match="7 rows do not divide 60 frames"):
        merged_rows(mel, {"half": np.zeros(7, int)}, 0.3)
