"""How far up tokens go: counted layer by layer as the pass lets them go, and drawn on the text."""

import numpy as np
import pytest
import tiny

from tokeff import reduce
from tokeff.errors import UserError
from tokeff.kv.prefill import prefill
from tokeff.report.words import LINE, kept_words, lines_of, reach_of

pytestmark = pytest.mark.core


def test_lines_hold_whole_tokens():
    tokens = [" word"] * 50 + ["x" * (LINE + 9)] + ["\n"]
    lines = lines_of(tokens)
    assert [i for line in lines for i, _ in line] == list(range(52))
    assert all(sum(len(text) for _, text in line) <= LINE for line in lines)
    assert lines[0][0][1] == " word" and len(lines[0]) == LINE // 5 and lines[-1][-1][1] == "\u21b5"


def test_layers_are_counted_as_the_pass_lets_tokens_go():
    """Every token of three layers; a stage at layer 1 leaves half for layer 2; a pass that starts again has used its first layers."""
    ids = tiny.prompts()
    tokens, length = tiny.padded(ids)
    for cut, below in ((reduce.promptdistill(0.5, layer=1), 2), (reduce.gemfilter(0.5, layer=0), 1)):
        prompt = prefill(tiny.params(), tiny.CFG, tokens, length, cut=cut)
        for row, text in enumerate(ids):
            count = reach_of(prompt, cut, tiny.CFG, row)
            assert len(count) == len(text) and set(count.tolist()) == {below, 3}
            assert (count == 3).sum() == -(-len(text) // 2) and count[-1] == 3


def test_a_text_of_two_methods():
    tokens = ["It", " was", " $x$", "\n"]
    picture = kept_words(tokens, {"all": np.full(4, 3), "some": np.array([1, 3, 3, 2])}, 3, ((1, 3),))
    assert picture.png.startswith(b"\x89PNG") and b"some: 2 of 4 tokens go through all 3 layers" in picture.svg and b"$x$" in picture.svg
    for wrong in (np.full(3, 3), np.full(4, 9)):
        with pytest.raises(UserError, match="give one a token"):
            kept_words(tokens, {"wrong": wrong}, 3)
