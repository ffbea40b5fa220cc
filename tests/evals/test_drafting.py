"""What drafting gains: measured on a small model, and the arithmetic behind it on made-up timings."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from tokeff import experiment
from tokeff.decode.draft_model import DraftModel
from tokeff.decode.methods import prompt_lookup, token_recycling
from tokeff.errors import UserError
from tokeff.evals import continuations, drafting, machines, speedup
from tokeff.evals.continuations import CLASSES
from tokeff.evals.drafting import Drafted, Drafting, drafted, entries
from tokeff.evals.machines import H200, V5E, Work
from tokeff.evals.speedup import DENSE, MINE, PLAIN, WRONG, Group, exactness, speeds
from tokeff.kv import methods as kv
from tokeff.listing import Method, find, methods
from tokeff.models.config import Precision
from tokeff.models.load import Model
from tokeff.report.run import run

pytestmark = pytest.mark.core
CONFIG = Path(__file__).parents[2] / "configs" / "leaderboard" / "decoding.py"
NEW = 12
TEXT = (5,) * 9


def model() -> Model:
    return Model(tiny.CFG, tiny.params(), None, Precision("float32", "float32", "float32"), "tiny")


@pytest.fixture
def small(monkeypatch):
    """The tiny model with its own two prompts in the place of every class."""
    texts = [SimpleNamespace(ids=list(row)) for row in tiny.prompts()]
    monkeypatch.setattr(continuations, "LONGEST", max(tiny.LENGTHS))
    for module in (drafting, continuations):
        monkeypatch.setattr(module, "of_class", lambda name: tuple(texts))
        monkeypatch.setattr(module, "ids", lambda m, prompt: prompt.ids)
    monkeypatch.setattr(drafting, "load", lambda source: model())
    monkeypatch.setattr(drafting, "LONGEST", max(tiny.LENGTHS))
    monkeypatch.setattr(drafting, "compile_cache", lambda: None)
    monkeypatch.setattr(drafting.common, "READ_BYTES", 2**23)


LOOKUP = Drafted("Lookup", prompt_lookup(3, 2), batches=(1, 2))
TREE = Drafted("Tree", token_recycling(((0,), (1,), (0, 0)), 2), classes=("prose",), prompts=1)


def board(*rows: Drafted, **settings) -> Drafting:
    given = dict(classes=("copy-heavy", "prose"), batched=("prose",), widths=(1, 2), prompts=2, new=NEW, rounds=1, passes=3)
    return Drafting("decoding", rows, **given | settings)


def test_a_run_measures_resumes_and_reports(small, tmp_path):
    """Drafted text is plain text, every pass commits a token at least, and rows that come later leave the others alone."""
    config = experiment.Config(board(LOOKUP), tmp_path / "decoding.py", "")
    found = run(config, tmp_path / "out").rows()
    assert [row["key"] for row in found] == ["verify-cost", "Lookup/copy-heavy/1", "Lookup/prose/1", "Lookup/prose/2"]
    assert [n for n, _ in found[0]["curve"]] == [1, 2]
    for row in found[1:]:
        assert row["exact"] and row["note"] == "" and row["nodes"] == 4 and row["texts"] == 2
        assert row["tokens"] == [NEW - 1] * 2 and all(1 <= n <= NEW - 1 for n in row["passes"])
        assert 1 <= row["mat"] == pytest.approx(2 * (NEW - 1) / sum(row["passes"])) and row["tn"] > 0
    assert found[1]["passes"] == found[3]["passes"]  # a sequence's own passes do not depend on the batch
    more = experiment.Config(board(LOOKUP, TREE), tmp_path / "decoding.py", "")
    again = run(more, tmp_path / "out").rows()
    assert again[:4] == found and [row["key"] for row in again[4:]] == ["Tree/prose/1"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "break-even" in table and "T(2)" in table and "H200" in table
    drawn = {file.stem for file in (tmp_path / "out" / "plots").glob("*.png")}
    assert drawn == {"payoff", "mat-bars-by-class", "of_dense-bars-by-class", "of_dense-batch-by-class"}


def decoder(text, passes):
    """What a decoder made of one prompt: a stand-in for `Continuation`."""
    return SimpleNamespace(
        texts=[list(text)], passes=[passes], committed=[len(text) - 1], steady=True, new=NEW, setup=SimpleNamespace(kv=tiny.FULL)
    )


def group(*, mine=TEXT, dense_s=(8.0, 16.0), mine_s=(4.0, 10.0), wrong_s=(3.0, 6.0), passes=4) -> Group:
    """8 tokens behind the first: 8 passes of 1 s (2 s in a slower round) by plain decoding, `passes` by the drafter, 2 of wrong drafts."""
    plain = decoder(TEXT, 8)
    runs = {DENSE: plain, PLAIN: plain, MINE: decoder(mine, passes), WRONG: decoder(TEXT[:3], 2)}
    return Group(None, runs, {DENSE: [*dense_s], PLAIN: [*dense_s], MINE: [*mine_s], WRONG: [*wrong_s]})  # type: ignore[arg-type]


def test_ratios_are_medians_within_rounds():
    """One round is twice as slow as the other for everybody, and the drafter's second one slower still."""
    found = speeds([group()])
    assert found["mat"] == 2.0 and found["t1_ms"] == pytest.approx(1500)
    assert found["tn"] == pytest.approx(1.5)  # 1.5 s a pass against 1, and 3 against 2
    assert found["of_dense"] == pytest.approx((2 + 1.6) / 2)
    share = (((1.0 - 1.5) / 1) + ((2.5 - 3.0) / 2)) / 2
    assert found["draft_ms"] == pytest.approx(-500) and found["break_even"] == pytest.approx(2 - share)
    assert found["expected"] == pytest.approx(2 / (1.5 + share))


def test_prompts_weigh_by_their_seconds_and_five_have_an_interval():
    """Twice as fast on one and as fast on the other: 16 tokens in the time of 12."""
    fast, same = group(dense_s=(8.0,), mine_s=(4.0,), wrong_s=(3.0,)), group(dense_s=(8.0,), mine_s=(8.0,), wrong_s=(3.0,), passes=8)
    found = speeds([fast, same])
    assert found["of_dense"] == pytest.approx(16 / 12) and found["mat"] == pytest.approx(16 / 12) and "mat_lo" not in found
    found = speeds([fast, fast, fast, same, same])
    assert found["mat_lo"] < found["mat"] < found["mat_hi"] and found["mat_n"] == 5
    with pytest.raises(UserError, match="nothing to draft"):
        speeds([])


def test_texts_may_part_at_a_tie_alone(monkeypatch):
    groups = [group(), group(mine=(5, 5, 7, 7, 7, 7, 7, 7, 7))]
    for margin, exact, note in ((1e-4, True, "1 of 2 cut at a tie"), (0.1, False, "1 of 2 texts differ from plain decoding's")):
        monkeypatch.setattr(speedup, "margins", lambda *_, margin=margin: [np.full(9, margin)])
        assert exactness(model(), groups) == {"exact": exact, "note": note}
    groups[0].runs[MINE].steady = False
    assert exactness(model(), groups[:1]) == {"exact": False, "note": "the text changed between rounds"}


def test_margins_are_those_of_the_model():
    """Teacher-forced: the first from the prompt's logits, the others from one-row decoding, which picks the best token each time."""
    m, policy = model(), tiny.FULL
    prompt = tiny.read(policy)
    texts = [row[:6] for row in tiny.text(tiny.decode(policy))]
    layers, logits = tiny.packed(policy, prompt), [np.asarray(prompt.logits_BV)]
    logits += [out for out, _ in tiny.forced(policy, layers, prompt, [row[:-1] for row in texts])]
    best = np.sort(np.stack(logits, axis=1), axis=-1)
    found = speedup.margins(m, prompt, texts, 6)
    np.testing.assert_allclose(found, best[..., -1] - best[..., -2], atol=1e-4)


def test_a_pass_reads_weights_until_it_computes_more():
    """Without a cache the ridge of an H200 lies at 989e12 x 2 bytes / (2 x 4.8e12) rows; below it rows are free."""
    work, ridge = Work(10**9, 0, 0), 989e12 / 4.8e12
    assert machines.ratio(H200, work, int(ridge)) == 1 and machines.ratio(H200, work, round(3 * ridge)) == pytest.approx(3, rel=1e-2)
    assert machines.ratio(H200, work, 64, batch=16) == pytest.approx(16 * 64 / ridge)
    assert machines.seconds(V5E, work, 1) == pytest.approx(2e9 / 819e9)
    assert machines.ratio(V5E, work, 81) == 1
    cached = Work(10**9, 1000, 100)
    assert machines.seconds(H200, cached, 1, batch=2, context=500) == pytest.approx(2 * (1e9 + 1e6) / 4.8e12)


def test_the_work_of_a_pass_is_counted_without_what_is_looked_up_or_stands_beside():
    cfg = tiny.CFG
    layer = 2 * cfg.D + cfg.D * cfg.H * (2 * cfg.N + 2 * cfg.K) + 3 * cfg.D * cfg.F
    work = Work(cfg.L * layer + cfg.D + cfg.V * cfg.D, 2 * cfg.L * cfg.K * cfg.H, 4 * cfg.L * cfg.N * cfg.H)
    assert Work.of(model().attach(draft=tiny.params())) == Work.of(model()) == work


@pytest.mark.parametrize(("mat", "draft"), [(2.0, 0.0), (3.1, 0.4), (1.2, -0.3)])
def test_at_break_even_nothing_is_gained(mat, draft):
    level = machines.break_even(mat, draft)
    assert machines.expected(mat, level, draft) == pytest.approx(1)
    assert machines.expected(mat, level - 0.1, draft) > 1 > machines.expected(mat, level + 0.1, draft)


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        (board(Drafted("Plain")), "drafts nothing"),
        (board(LOOKUP, rounds=0), "rounds 0 measures nothing"),
        (board(LOOKUP, new=1), "give 2 or more"),
        (board(Drafted("x", prompt_lookup(), prompts=9999)), "wants 9999 prompts"),
        (board(Drafted("x", prompt_lookup(), batches=(0,))), "wants 0 prompts"),
        (board(Drafted("x", prompt_lookup(), classes=("poetry",))), "no prompt class 'poetry'"),
        (board(Drafted("x", prompt_lookup(), kv.h2o(0.5, evict=1))), "does not fit"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, fix):
    with pytest.raises(UserError, match=fix):
        wrong.check()


def test_what_is_no_drafter_is_refused():
    with pytest.raises(UserError, match="SnapKV is no drafter"):
        drafted("SnapKV")


def test_published_trees_are_named_by_their_drafts():
    listed = [m for m in methods() if m.part == "decode" and m.name in ("PromptLookup", "TokenRecycling")]
    assert [row.method for row in entries(listed)] == ["PromptLookup", "TokenRecycling"]
    assert [(row.method, row.decode.nodes) for row in entries(listed, "paper")] == [("TokenRecycling 80", 81)]


def speculative(cfg, length: int = 2):
    return DraftModel(cfg, length)


def test_drafters_that_run_a_model_wait_for_it(monkeypatch, capsys):
    known = Method("Speculative", "decode", "decode", speculative, True)
    monkeypatch.setattr(drafting, "find", lambda name: known if name == known.name else find(name))
    monkeypatch.setattr(drafting, "load", lambda source: model())
    rows = (LOOKUP, drafted("Speculative", length=3))
    assert board(*rows).settled().rows == (LOOKUP,) and "left out, for want of a draft model: Speculative" in capsys.readouterr().err
    row = board(*rows, draft="folder").settled().rows[1]
    assert row.decode == DraftModel(tiny.CFG, 3) and row.given is None and row.weights
    assert board(*rows, draft="folder").identity() == board(LOOKUP).identity()
    monkeypatch.setattr(drafting, "find", lambda name: Method("Paced", "decode", "decode", lambda drafter: drafter, True))
    with pytest.raises(UserError, match="Paced needs drafter"):
        drafted("Paced")


def test_shared_8_grams_are_counted_in_the_continuation():
    spec = importlib.util.spec_from_file_location("copy_heavy", CONFIG.parents[2] / "experiments" / "copy_heavy.py")
    assert spec is not None and spec.loader is not None
    copy_heavy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy_heavy)
    prompt = list(range(20))
    assert copy_heavy.share(range(5, 15), prompt) == 1 and copy_heavy.share(range(15, 30), prompt) == 0
    assert copy_heavy.share([*range(10), 99, 98], prompt) == 3 / 5  # of 5 8-grams the two at the end are new
    assert copy_heavy.share(range(7), prompt) == 0


@pytest.mark.parametrize("suite", ["smoke", "full"])
def test_the_committed_config_loads(suite):
    made = experiment.load(str(CONFIG), suite).experiment.settled()
    made.check()
    assert len(set(made.keys())) == len(made.keys())
    if suite == "full":
        listed = {row.listed for row in made.rows}
        assert {"PromptLookup", "TokenRecycling"} <= listed and {"TokenRecycling 80", "TokenRecycling 4"} <= {r.method for r in made.rows}


def test_the_committed_leaderboard_is_exact_and_reaches_what_was_aimed_at():
    """Every drafter on every class, published trees too; MAT and speed on copies, MAT on code and prose, and what a pace costs at worst."""
    folder = CONFIG.parents[2] / "experiments" / "results" / "decoding"
    rows = {row["key"]: row for row in map(json.loads, (folder / "results.jsonl").read_text().splitlines())}
    made = experiment.load(str(CONFIG), "full").experiment.settled()
    assert set(made.keys()) <= set(rows), "run: tokeff run configs/leaderboard/decoding.py --suite full"
    assert all(row["exact"] for row in rows.values() if row.get("lossless"))
    free = {m.name for m in methods() if m.part == "decode" and m.lossless and m.bare}  # without a draft model
    best = {name: max(row["mat"] for row in rows.values() if row.get("class") == name and row["method"] in free) for name in CLASSES}
    assert best["copy-heavy"] >= 4 and best["code"] >= 2.0 and best["prose"] >= 1.5
    assert rows["PromptLookup/copy-heavy/1"]["of_dense"] >= 1.5
    assert min(rows[f"SmartSpec/{name}/1"]["of_dense"] for name in CLASSES) >= 0.95
    assert {rows[f"{name}/chat/{n}"]["batch"] for name in ("PromptLookup", "EarlyExit") for n in (1, 4, 16)} == {1, 4, 16}
