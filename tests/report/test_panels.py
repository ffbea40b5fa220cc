"""Pictures of what drafting gains."""

import io

import matplotlib
import pytest
from matplotlib import image

from tokeff.report import plots
from tokeff.report.figures import Lines, Panels, Payoff
from tokeff.report.payoff import curve_of, guides_of

pytestmark = pytest.mark.core


def rows_of():
    """Two drafters on two classes, one of them in batches, and a curve that ends before the larger one's width."""
    found = [{"method": f"T({n})", "batch": 1, "nodes": n, "tn": tn} for n, tn in ((1, 1.0), (8, 1.6), (32, 3.2))]
    for name, nodes, tn, batches in (("Lookup", 8, 1.7, (1, 4)), ("Tree 80", 81, 7.0, (1,))):
        for where, mat in (("chat", 1.2), ("copy-heavy", 2.4)):
            found += [
                {"method": name, "class": where, "batch": b, "nodes": nodes, "tn": tn * b**0.5, "mat": mat, "of_dense": mat / tn / b**0.5,
                 "break_even": mat - 0.1, "mat_lo": mat - 0.2, "mat_hi": mat + 0.2, "on": {"H200": 1.0}}
                for b in batches
            ]  # fmt: skip
    return found


ALONE = (("batch", 1),)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "figure",
    [
        Payoff("When drafting pays", at=ALONE), Panels("mat", "class", level=1.0, at=ALONE),
        Panels("of_dense", "class", x="batch", level=1.0),
    ],
)  # fmt: skip
def test_figures_have_something_on_them(figure):
    with matplotlib.rc_context(plots.STYLE):
        drawn = plots.draw(rows_of(), figure)
    assert drawn is not None and image.imread(io.BytesIO(drawn.png), format="png")[..., :3].std() > 0.02
    assert b"<svg" in drawn.svg


def test_figures_without_data_are_left_out():
    """Nothing measured, no second batch size, no such class."""
    alone = [row for row in rows_of() if row["batch"] == 1]
    assert plots.draw([], Payoff()) is None and plots.draw(alone[:3], Payoff()) is None
    assert plots.draw(alone, Panels("of_dense", "class", x="batch")) is None
    assert plots.draw(alone, Panels("mat", "class", at=(("batch", 2),))) is None


def test_the_curve_is_what_was_measured_for_it_and_goes_on_beside_the_drafters():
    alone = [row for row in rows_of() if row["batch"] == 1]
    assert curve_of(alone) == [(1, 1.0), (8, 1.6), (32, 3.2), (81, 7.0)]
    assert curve_of(alone[3:]) == [(1, 1.0), (8, 1.7), (81, 7.0)]
    assert guides_of(alone) == {"H200": [(1, 1.0), (8, 1.0), (81, 1.0)]}


def test_lines_are_of_what_was_measured_at_several_places():
    rows = [{"method": m, "family": "kv", "context": c, "speed": 1.0} for m, c in (("Full", 64), ("Full", 128), ("H2O", 64))]
    assert plots.draw(rows[::2], Lines("context", "speed")) is None
    whole, named = (plots.draw(some, Lines("context", "speed")) for some in (rows, rows[:2]))
    assert whole is not None and named is not None and whole.png == named.png
