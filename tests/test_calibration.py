"""What a search found reaches the methods that leave it open: from a file of its model, whole or not at all, and every row says so."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

import tokeff
from tokeff import calibration
from tokeff.context import from_json, to_json
from tokeff.data import sources
from tokeff.errors import UserError
from tokeff.evals.comparison import Comparison, Line, fitting, line
from tokeff.evals.crossover import Crossover
from tokeff.evals.fidelity import Encoded, Reader
from tokeff.evals.leaderboard import Batch, Leaderboard, Texts, averaged, entries
from tokeff.experiment import Config as File
from tokeff.generation import Setup
from tokeff.kv import methods as kv
from tokeff.listing import METHODS, find
from tokeff.models.config import Config, Precision
from tokeff.models.load import Model, fingerprint
from tokeff.report.run import run
from tokeff.sparse import methods as sparse

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("calibration")]
ROOT = Path(__file__).parents[1]
PRECISION = Precision("float32", "float32", "float32")
M = Model(tiny.CFG, tiny.params(), None, PRECISION, "tiny")
OPEN = [m.name for m in METHODS if m.calibrates]
SMOLLM2 = Config("smollm2-135m", V=49152, D=576, F=1536, L=30, N=9, K=3, H=64, max_len=8192)
FOUND = {
    "RazorAttention": {"heads": [[0], [], [1]]},
    "CompressKV": {"judges": [[0, 3], [1], [2, 3]], "importance": [0.5, 0.3, 0.2]},
    "TidalDecode": {"select": [1, 2]},
    "DoubleSparsity": {"channels": [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[0, 2], [1, 3]]]},
    "MInference": {"top": 3, "window": 24, "heads": [[0, 1], [2, 0], [1, 1]]},
}


def about(**changes):
    """A calibration file of the tiny model, as JSON."""
    methods = {name: {"settings": settings} for name, settings in FOUND.items()}
    return {"model": "tiny", "fingerprint": fingerprint(M), "precision": repr(PRECISION), "methods": methods} | changes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Calibrations of no model but the tiny one."""
    monkeypatch.setattr(calibration, "FOLDER", tmp_path)
    (tmp_path / "tiny.json").write_text(json.dumps(about()))
    return tmp_path


def fits(kind: str, part, cfg: Config) -> None:
    """UserError where a part of this kind does not fit a model of these sizes."""
    Setup(**{kind: part}).check(Model(cfg, None, None, PRECISION, cfg.name), [1000], 1)  # type: ignore[arg-type]


def settled(row: Line, model: str = "tiny") -> Line:
    return Leaderboard("b", (row,), model=model).settled().rows[0]


# -- the committed file


def test_what_methods_leave_open_are_settings_of_theirs():
    assert len(OPEN) == 8
    for name in OPEN:
        assert set(find(name).calibrates) <= set(find(name).settings())


@pytest.mark.parametrize("name", OPEN)
def test_the_committed_calibration_fits_its_model_and_changes_the_method(name):
    found = calibration.settings("smollm2-135m", name)
    part = find(name).build(**found)
    fits(find(name).part, part, SMOLLM2)
    if find(name).part != "decode":
        assert from_json(to_json(part)) == part, "a context saved under it could not be read"
    assert part != find(name).make()
    smaller = dataclasses.replace(SMOLLM2, L=5, K=1, N=1, windows=(None,) * 5)
    with pytest.raises(UserError) as refused:
        fits(find(name).part, part, smaller)
    assert "\n" not in str(refused.value)


def test_the_committed_calibration_says_how_it_was_found():
    """On the text that no task reads, every method, and what it is worth on texts that are evaluated."""
    found = json.loads(calibration.file_of("smollm2-135m").read_text())
    assert found["text"] == {"source": sources.CALIBRATION, "digest": sources.digest(sources.CALIBRATION)}
    assert set(found["methods"]) == set(OPEN) and set(found["measured"]) == {name for name in OPEN if find(name).part != "decode"}
    assert found["command"] == "python experiments/calibrate.py smollm2-135m" and found["tokeff"]
    assert all(entry["recipe"]["seconds"] > 0 and entry["recipe"]["sizes"]["seed"] == 1000 for entry in found["methods"].values())


def test_the_published_table_is_what_was_measured():
    """docs/calibration.md, row by row: the means of the file."""
    found, page = json.loads(calibration.file_of("smollm2-135m").read_text()), (ROOT / "docs" / "calibration.md").read_text()
    for name, row in found["measured"].items():
        for kind, of in row.items():
            kl, logprob = float(np.mean(of["kl"])), float(np.mean(of["answer_logprob"]))
            start = f"| {name if kind == 'default' else ''} | {kind} | {100 * of['held']:.0f}% | {100 * of['read']:.0f}% | {kl:.3f} | "
            lines = [line for line in page.splitlines() if line.startswith(start)]
            assert any(line.endswith(f"| {logprob:.2f} | {of['exact']} |") for line in lines), start


@pytest.mark.slow
def test_the_committed_calibration_is_of_the_preset():
    m = tokeff.load("smollm2-135m", PRECISION)
    found = calibration.read(m.name)
    assert found is not None and found.precision == repr(PRECISION) and found.fingerprint == fingerprint(m)


# -- files


def test_settings_come_back_as_tuples(folder):
    assert calibration.settings(M, "RazorAttention") == {"heads": ((0,), (), (1,))}
    assert calibration.settings("tiny", "CompressKV")["importance"] == (0.5, 0.3, 0.2)
    kv.compresskv(0.5, **calibration.settings(M, "CompressKV")).check(tiny.CFG, 64)


@pytest.mark.parametrize(("model", "method"), [("nobody", "CompressKV"), ("tiny", "Kascade")])
def test_a_missing_calibration_is_a_line_that_names_the_recipe(folder, model, method):
    with pytest.raises(UserError, match=f"python experiments/calibrate.py {model}$") as refused:
        calibration.settings(model, method)
    assert "\n" not in str(refused.value)


def test_methods_without_a_search_have_no_calibration(folder):
    with pytest.raises(UserError, match="leaves nothing"):
        calibration.settings("tiny", "SnapKV")
    with pytest.raises(UserError, match="did you mean"):
        calibration.settings("tiny", "CompresKV")


def one(name, settings):
    return json.dumps(about(methods={name: {"settings": settings}}))


DAMAGED = {
    "empty": "", "cut": json.dumps(about())[:200], "no object": "[1, 2]", "null": "null", "no methods": json.dumps({"model": "tiny"}),
    "methods are a list": json.dumps(about(methods=[1])), "no settings": json.dumps(about(methods={"TidalDecode": {}})),
    "unknown method": one("Nobody", {}), "closed method": one("SnapKV", {"window": 8}), "other setting": one("TidalDecode", {"dense": [0]}),
    "one missing": one("CompressKV", {"judges": [[0]]}), "one more": one("TidalDecode", {"select": [2], "budget": 1}),
    "text for a number": one("TidalDecode", {"select": ["2"]}), "a number for a list": one("TidalDecode", {"select": 2}),
    "true for a number": one("TidalDecode", {"select": [True]}), "shallow": one("RazorAttention", {"heads": [0, 1]}),
    "deep": one("RazorAttention", {"heads": [[[0]]]}), "not a number": one("CompressKV", {"judges": [[0]], "importance": [float("nan")]}),
    "an object": one("TidalDecode", {"select": {"0": 2}}), "very deep": "[" * 100_000, "number for text": json.dumps(about(fingerprint=3)),
    "half a byte": "\udce2",
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_a_line_that_names_the_recipe(folder, kind):
    (folder / "tiny.json").write_bytes(DAMAGED[kind].encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"tiny.json is damaged .*python experiments/calibrate.py tiny$") as refused:
        calibration.read("tiny")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400
    with pytest.raises(UserError, match="damaged"):
        settled(line("TidalDecode"))


def test_other_weights_of_the_same_name_are_refused(folder):
    other = dataclasses.replace(M, params=dataclasses.replace(M.params, embed_VD=M.params.embed_VD * 2))
    calibration.settings(M, "TidalDecode")
    with pytest.raises(UserError, match=r"other weights .*calibrate.py tiny$"):
        calibration.settings(other, "TidalDecode")
    coarse = dataclasses.replace(other, precision=Precision("bfloat16", "bfloat16", "bfloat16"))
    assert calibration.settings(coarse, "TidalDecode") == {"select": (1, 2)}  # rounded weights cannot be told apart


def test_models_are_found_by_the_name_that_load_gives_them(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.gguf").write_bytes(b"")
    named = ["smollm2-135m", str(tmp_path / "folder"), str(tmp_path / "folder" / ".." / "folder"), str(tmp_path / "file.gguf"), "org/repo"]
    assert [calibration.name_of(source) for source in named] == ["smollm2-135m", "folder", "folder", "file", "org/repo"]
    assert calibration.file_of("org/repo").name == "org--repo.json" and calibration.read("../../setup") is None


# -- rows


def test_rows_take_what_was_found_and_keep_their_own(folder):
    row = settled(line("TidalDecode", budget=0.5, recent=8))
    assert row.calibrated is True and row.kv == sparse.tidaldecode(0.5, select=(1, 2), recent=8)
    row = settled(line("CompressKV", budget=0.5, window=6))
    assert row.kv == kv.compresskv(0.5, 6, judges=((0, 3), (1,), (2, 3)), importance=(0.5, 0.3, 0.2))
    row = settled(line("DoubleSparsity"))
    assert row.kv == sparse.double_sparsity(channels=calibration.settings("tiny", "DoubleSparsity")["channels"])
    row = settled(line("MInference"))
    assert row.prefill == sparse.minference(top=3, window=24, heads=((0, 1), (2, 0), (1, 1)))


@pytest.mark.parametrize(
    "row",
    [
        line("TidalDecode", select=(2, 5)), line("CompressKV", judges=((1,),)), line("RazorAttention", heads=((), (0,), (), ())),
        line("MInference", vertical=64),
    ],
    ids=lambda row: row.method,
)  # fmt: skip
def test_rows_with_settings_of_their_own_are_not_calibrated(folder, row):
    assert settled(row) == dataclasses.replace(row, calibrated=False)


@pytest.mark.parametrize("name", OPEN)
def test_without_a_calibration_rows_are_the_defaults_and_say_so(folder, name):
    row = settled(line(name), "nobody")
    assert row == dataclasses.replace(line(name), calibrated=False)
    assert getattr(row, find(name).part) == find(name).make()


def test_rows_say_nothing_where_there_is_nothing_to_calibrate(folder):
    for name in ("Full", "SnapKV", "GemFilter"):
        assert settled(line(name)) == line(name) and line(name).calibrated is None


def test_a_row_may_refuse_or_demand_a_calibration(folder):
    row = line("TidalDecode")
    assert settled(dataclasses.replace(row, calibrated=False)) == dataclasses.replace(row, calibrated=False)
    wanted = dataclasses.replace(row, calibrated=True)
    assert settled(wanted) == settled(row)
    with pytest.raises(UserError, match=r"no calibration of TidalDecode .*calibrate.py nobody$"):
        settled(wanted, "nobody")


def test_settling_twice_changes_nothing(folder):
    once = Leaderboard("b", tuple(line(name) for name in OPEN), model="tiny").settled()
    assert once.settled() == once and sum(bool(row.calibrated) for row in once.rows) == len(FOUND)


def test_every_experiment_settles_its_rows(folder):
    rows = (line("Full"), line("TidalDecode"))
    for experiment in (Comparison("c", rows, model="tiny"), Leaderboard("l", rows, model="tiny"), Crossover("x", rows, model="tiny")):
        experiment = experiment.settled()
        experiment.check()
        assert [row.calibrated for row in experiment.rows] == [None, True]


def test_a_comparison_takes_further_lengths_only_of_the_rows_it_names():
    rows = (line("Full"), line("Random"))
    assert Comparison("c", rows, speeds=(512,)).keys()[2:] == ["Full/512/speed", "Random/512/speed"]
    assert Comparison("c", rows, speeds=(512,), timed=("Random",)).keys()[2:] == ["Random/512/speed"]
    with pytest.raises(UserError, match="timed='SnapKV' is no row of this comparison; name some of Full, Random"):
        Comparison("c", rows, speeds=(512,), timed=("SnapKV",)).check()


def test_a_leaderboard_measures_again_what_was_calibrated_anew(folder):
    board = Leaderboard("b", (line("TidalDecode"),), model="tiny").settled()
    measured = {"settings": repr(board.rows[0])}
    assert board.stands(measured)
    (folder / "tiny.json").write_text(one("TidalDecode", {"select": [2]}))
    assert not Leaderboard("b", (line("TidalDecode"),), model="tiny").settled().stands(measured)


def test_settings_that_do_not_fit_the_model_are_refused_before_anything_is_measured(folder):
    (folder / "tiny.json").write_text(one("RazorAttention", {"heads": [[0]] * 9}))
    rows = Leaderboard("b", (line("RazorAttention"),), model="tiny").settled().rows
    with pytest.raises(UserError, match="heads names 9 layers"):
        fitting(M, rows, [64])
    (folder / "tiny.json").write_text(json.dumps(about(fingerprint="other")))
    rows = Leaderboard("b", (line("RazorAttention"),), model="tiny").settled().rows
    with pytest.raises(UserError, match="other weights"):
        fitting(M, rows, [64])
    assert fitting(M, Leaderboard("b", (line("RazorAttention"),), model="nobody").settled().rows, [64]) is M


def test_measured_rows_say_whether_they_are_calibrated(folder):
    ids = tuple(np.random.default_rng(0).integers(0, tiny.CFG.V, 140).tolist())
    text = Encoded(ids[:128], (ids[128:132],), (ids[132:134],), ids[134:], ())
    for model, said in (("tiny", True), ("nobody", False)):
        found = Texts(M, Reader(M, text)).figures(settled(line("RazorAttention", budget=0.125), model))
        assert found["calibrated"] is said
        assert averaged([found | {"context": 128, "batch": 0, "task": "any"}], None, set())["calibrated"] is said
    assert "calibrated" in Texts(M, Reader(M, text)).figures(line("Full"))


def test_a_run_records_what_it_measured(folder, tmp_path, monkeypatch):
    """From the command's side: `run` settles the experiment, and its rows, config and table come from that."""
    monkeypatch.setattr("tokeff.evals.leaderboard.load", lambda source: M)
    monkeypatch.setattr("tokeff.evals.leaderboard.compile_cache", lambda: None)
    monkeypatch.setattr(Leaderboard, "measure", lambda self, context, key: measured(self, key))

    def measured(board, key):
        row = next(row for row in board.rows if key.startswith(row.method))
        return {"method": row.method, "task": "any", "context": 64, "calibrated": row.calibrated, "settings": repr(row), "batch": 0} | {
            "family": "sparse", "lossless": False, "budgeted_by": "read", "budget": 0.5, "held": 1.0, "read": 0.5, "top1_agree": [1.0],
            "exact": [1], "asked": [1], "full_exact": [1], "loss": [1.0], "answer_logprob": [-1.0], "kl": [0.1],
        }  # fmt: skip

    board = Leaderboard("b", entries([find("Full"), find("TidalDecode")], (0.5,)), model="tiny", batches=(Batch("single_needle", 64),))
    folder_of_run = run(File(board, Path("b.py"), "B."), tmp_path / "run")
    rows = {row["method"]: row for row in folder_of_run.rows()}
    assert rows["TidalDecode"]["calibrated"] is True and "select=(1, 2)" in rows["TidalDecode"]["settings"]
    assert rows["Full"]["calibrated"] is None


# -- the recipe, on the tiny model


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("calibrate_recipe", ROOT / "experiments" / "calibrate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def needle(seed: int, right: bool) -> Encoded:
    """A context with a question whose answer is what the model says, or is not."""
    rng = np.random.default_rng(seed)
    context, question = (tuple(rng.integers(0, tiny.CFG.V, n).tolist()) for n in (64, 5))
    (answer,) = tiny.text(tiny.decode(rows=[(*context, *question)], new=2))
    answer = tuple(answer if right else [(t + 1) % tiny.CFG.V for t in answer])
    return Encoded(context, (question,), (answer,), context[:6], ((20, 26),))


def test_the_recipe_knows_every_method_that_leaves_something_open(recipe):
    assert set(recipe.SEARCHES) == set(OPEN)


def test_the_recipe_on_the_tiny_model(recipe, tmp_path, monkeypatch):
    """Searches, file and measurements; what is read back fits the model, and says what it read."""
    monkeypatch.setattr(calibration, "FOLDER", tmp_path)
    sizes = recipe.Sizes(length=64, ahead=8, passages=2, tuned=1, long=96, needles=2, random=16, budget=0.5, last=8, shares=(0.5,), tries=2)
    ids = tuple(np.random.default_rng(3).integers(0, tiny.CFG.V, 200).tolist())
    text = recipe.Text(ids, (needle(0, True), needle(1, False)))
    entries = recipe.recipe(M, OPEN, text, sizes)
    recipe.write(calibration.file_of("tiny"), recipe.about(M) | {"methods": entries})
    assert entries["CompressKV"]["recipe"]["needles"] == 1 and entries["CompressKV"]["recipe"]["of"] == 2
    found = {name: calibration.settings(M, name) for name in OPEN}
    assert all(found[name] == entries[name]["settings"] for name in OPEN)
    assert not list(tmp_path.glob("*.part"))
    small = {name: found[name] for name in ("CompressKV", "RazorAttention", "MInference")}
    rows = recipe.measure(M, [dataclasses.replace(needle(2, True), held_out=ids[:6])], small, budget=0.5)
    assert [set(rows[name]) for name in small] == [{"default", "calibrated"}, {"default", "calibrated", "lot"}, {"default", "calibrated"}]
    assert all(np.isfinite(kind["kl"]).all() and kind["held"] > 0 and kind["asked"] == 1 for row in rows.values() for kind in row.values())


def test_needles_that_are_never_answered_are_refused(recipe):
    text = recipe.Text((), (needle(1, False),))
    with pytest.raises(UserError, match="answers no needle"):
        recipe.compress(M, text, recipe.Sizes(length=64))


def test_a_text_that_is_too_short_is_refused(recipe):
    with pytest.raises(UserError, match="do not fit a text of 100"):
        recipe.Text((1,) * 100, ()).passages(recipe.Sizes())
