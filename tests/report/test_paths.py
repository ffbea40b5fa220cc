"""Pictures of drafted texts: where nodes stand, how the text is broken, and that figures come out."""

import pytest

from tokeff.report.paths import LINE, Pass, answer, draw_text, draw_trees, places, wrapped

pytestmark = pytest.mark.core
WIDE = Pass((" a", " b", " c", "d", "\n", " e"), (0, 0, 0, 1, 2, 2), (0, 2, 5), (" c", " e", " f"))
REFUSED = Pass((" f", " g"), (0, 0), (0,), (" h",))
ALONE = Pass((" h",), (0,), (0,), (" i",))


def test_the_accepted_path_stands_in_one_row_and_no_two_nodes_in_one_place():
    spots = places(WIDE)
    assert [x for x, _ in spots] == [0, 1, 1, 2, 2, 2] and len(set(spots)) == len(spots)
    assert {spots[node][1] for node in WIDE.path} == {0}
    assert answer(WIDE, spots) == (3, 0) and answer(REFUSED, places(REFUSED)) == (1, -1)


def test_lines_hold_whole_tokens_and_all_of_them():
    passes = [WIDE, REFUSED, ALONE] * 20
    lines = wrapped(passes)
    assert all(sum(len(said) for said, *_ in row) <= LINE for row in lines) and len(lines) > 1
    assert "".join(said for row in lines for said, *_ in row) == "".join(token for one in passes for token in one.gained)
    assert [drafted for _, number, drafted in lines[0] if number < 2] == [True, True, False, False]


def test_figures_are_drawn():
    for picture in (draw_trees([WIDE, REFUSED, ALONE], (0, 2)), draw_text([WIDE, REFUSED, ALONE])):
        assert picture.startswith(b"\x89PNG") and len(picture) > 2000
