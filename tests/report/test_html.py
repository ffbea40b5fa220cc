"""Pictures and the report page."""

import io
import re

import matplotlib
import numpy as np
import pytest
from fakes import fake, figures, kept
from matplotlib import image

from tokeff.report import html, labels, plots, table
from tokeff.report.curves import draw_curves
from tokeff.report.figures import Bars, Curves, Lines, Scatter
from tokeff.report.folder import RunFolder
from tokeff.report.kept import Kept

pytestmark = pytest.mark.core

HOSTILE = "<script>alert(1)</script>\"'>$\\frac{"


def rows_of(contexts=(64, 128)):
    """Return made-up rows with their keys."""
    experiment = fake(contexts=contexts)
    keys = [key.split("/") for key in experiment.keys()]
    rows = [figures(m, int(k), 0.125, np.random.default_rng(0)) for m, k in keys]
    return [{**row, "decode_tok_s": float(row["decode_tok_s"]), "kept": None} for row in rows]


@pytest.mark.parametrize("figure", [Scatter("held", "kl"), Scatter("read", "loss", log_y=True), Bars("decode_tok_s"),
                                    Lines("context", "decode_tok_s")])  # fmt: skip
def test_figures_have_something_on_them(figure):
    """Every kind of figure draws more than an empty page."""
    drawn = plots.draw(rows_of(), figure)
    pixels = image.imread(io.BytesIO(drawn.png), format="png")
    assert pixels.shape[0] > 300 and pixels[..., :3].std() > 0.02
    assert b"<svg" in drawn.svg


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [(-0.4, -3.0), (2.0, -3.0), (0.0, 0.0)], ids=str)
def test_bars_below_zero_stay_on_the_page(values):
    """What matplotlib cannot lay out it warns of, and draws on top of each other."""
    rows = [{"method": f"method {i}", "context": 64, "overhead_ms": value} for i, value in enumerate(values)]
    with matplotlib.rc_context(plots.STYLE):
        drawn = plots.draw(rows, Bars("overhead_ms"))
    assert image.imread(io.BytesIO(drawn.png), format="png")[..., :3].std() > 0.02


def test_figures_without_data_are_left_out():
    """A missing column, a value that is not finite, and a single context leave nothing to draw."""
    assert plots.draw(rows_of(), Scatter("held", "nothing")) is None
    assert plots.draw([{"method": "a", "kl": "nan", "held": 1.0}], Scatter("held", "kl")) is None
    assert plots.draw(rows_of((64,)), Lines("context", "decode_tok_s")) is None
    assert plots.draw_all([], [Bars("kl")], []) == []


def test_curves_go_through_budgets_from_the_best_method_on():
    """Seven methods make two panels; a method at one budget has no line, but the full cache's is a level; the best stands first."""
    rows = [
        {"method": f"m{i}", "family": "kv", "context": 64, "budget": b, "held": b, "kl": (i + 1) * (1 - b)}
        for i in range(7) for b in (0.25, 0.5)
    ]  # fmt: skip
    figure = Curves("held", "kl", "Curves", log_y=True)
    with_one = [*rows, {"method": "single", "family": "kv", "context": 64, "budget": 0.5, "held": 0.5, "kl": 0.1}]
    drawing = draw_curves(with_one, figure, {}, ())
    assert drawing is not None
    named = [[text.get_text() for text in panel.get_legend().get_texts()] for panel in drawing.axes if panel.get_legend()]
    assert named == [[f"m{i}" for i in range(6)], ["m6"], ["single"]]
    whole = draw_curves([*rows, {**with_one[-1], "method": "Full", "held": 1.0}], figure, {}, ())
    assert whole is not None and [t.get_text() for t in whole.axes[1].get_legend().get_texts()] == ["m6", "Full"]
    image = plots.draw(rows, figure)
    assert image is not None and image.png.startswith(b"\x89PNG") and image.wide
    assert plots.draw(with_one[-1:], figure) is None


def test_spread_keeps_a_gap():
    """Labels stay in order, apart and below the top."""
    placed = labels.spread([0.5, 0.5, 0.51, 0.99, 1.0], 0.1)
    assert all(b - a >= 0.1 - 1e-9 for a, b in zip(placed, placed[1:])) and max(placed) <= 1.0
    assert labels.spread([0.1, 0.9], 0.1) == [0.1, 0.9]


def test_labels_do_not_overlap():
    """Names of a crowded scatter stay apart, and off the points."""
    figure = Scatter("held", "kl")
    with plots.matplotlib.rc_context(plots.STYLE):
        drawing = plots.Drawing(figsize=(7.6, 4.9), dpi=144)
        panel = drawing.subplots()
        plots._points(panel, rows_of((64,)), figure)
        drawing.canvas.draw()
        plots._names(panel, rows_of((64,)), figure)
        boxes = [text.get_window_extent() for text in panel.texts]
    assert len(boxes) >= 10
    for i, a in enumerate(boxes):
        assert all(labels._overlap(a, b) < 1 for b in boxes[:i]), panel.texts[i]


def render(tmp_path, rows, what=(), config="Config(x='</pre><script>')\n", about="About\n<script>"):
    """Return the page of some rows."""
    folder = RunFolder(tmp_path)
    environment = {"command": "tokeff run <script>", "commit": "<script>", "jax": HOSTILE}
    folder.start(config, {"about": about, "experiment": {"name": HOSTILE}}, environment)
    images = plots.draw_all(rows, [Bars("decode_tok_s", HOSTILE)], what)
    return html.render(folder, rows, table.build(rows), images, what)


def test_hostile_text_is_escaped_everywhere(tmp_path):
    """Method, family, note, tokens, config, environment and docstring are text, whatever they hold."""
    row = dict.fromkeys(("method", "family", "note", "budgeted_by", "commit"), HOSTILE)
    row |= {"budget": 1, "decode_tok_s": 3, "kl": 1.0, "lossless": False, "beats_random": False}
    what = Kept(kept(32, 0.5, np.random.default_rng(0)).orders, (HOSTILE,) * 32, ((1, 2),))
    page = render(tmp_path, [row, {**row, "method": "full"}], [(HOSTILE, what)])
    assert "<script" not in page.lower() and "alert(1)" in page
    assert page.count("</pre>") == page.count("<pre>")
    svg = plots.draw([row], Bars("decode_tok_s")).svg
    assert b"<script" not in svg


def test_the_page_is_self_contained(finished):
    """Nothing is loaded from elsewhere and nothing runs; all sections are there."""
    page = (finished.path / "report.html").read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:image/png;base64,|#)", page)
    assert "url(" not in page and "@import" not in page and not re.search(r"\son\w+=", page)
    assert "default-src 'none'" in page
    for section in ("table", "plots", "kept", "config", "environment", "again"):
        assert f'id="{section}"' in page and f'href="#{section}"' in page
    assert "tokeff run x" in page and "Fake(name=" in page and "tokens not shown" not in page


def test_a_page_without_pictures(tmp_path):
    """A run with one bare row still has a report."""
    page = render(tmp_path, [{"method": "a"}])
    assert "<td>a<small>" in page and 'id="plots"' not in page and 'id="kept"' not in page


def test_facts_say_only_what_rows_can_say():
    """No baseline, no comparison; the longest context counts."""
    assert html.facts([{"method": "a", "family": "kv"}]) == []
    said = {fact.what: fact for fact in html.facts(rows_of())}
    assert any("128 tokens" in what for what in said)
    assert said["closest to the full cache of the lossy methods within budget"].figure == "adakv"
    assert said["fewest bytes held with every needle answered"].figure == "snapkv"
    assert said["decoding speed of prompt_lookup, the fastest lossless method"].figure == "1.44x"
    assert said["methods marked ≈ random"].figure == "1 of 8"


def test_warnings_about_commits():
    """Rows of two commits, or of changed code, are said to be so."""
    assert html.warnings([{"commit": "a", "dirty": False}]) == []
    assert len(html.warnings([{"commit": "a", "dirty": True}, {"commit": "b"}])) == 2
    assert len(html.warnings([{}])) == 1
