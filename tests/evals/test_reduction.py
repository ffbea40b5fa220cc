"""Token reduction at equal mean tokens a layer: all kinds are measured, stand on one page, and resume."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tokenizers
from tokenizers import models, pre_tokenizers

from tokeff import experiment
from tokeff.data.canvases import SIDE, WORDS
from tokeff.data.digits import Material
from tokeff.data.drawing import photographs
from tokeff.data.speech import Clip
from tokeff.errors import UserError
from tokeff.evals import hearing, reading, reduction, seeing, watching
from tokeff.evals.fidelity import Encoded
from tokeff.evals.hearing import Hearing
from tokeff.evals.leaderboard import Batch
from tokeff.evals.reduction import AtShare, Reduction, beats, entries
from tokeff.evals.seeing import Answering, Labelling, at_share
from tokeff.evals.watching import Watching
from tokeff.models.config import Config, Precision
from tokeff.models.fresh import fresh_decoder, fresh_projector, fresh_vit
from tokeff.models.llava_rows import Llava, LlavaConfig
from tokeff.models.load import Model
from tokeff.models.pixels import HALF, Preprocessing
from tokeff.models.tokenizer import Tokenizer
from tokeff.models.vit_config import ViTConfig
from tokeff.models.vit_hf import ImageModel
from tokeff.models.whisper_config import WhisperConfig
from tokeff.models.whisper_load import Whisper, build
from tokeff.reduce.pictures import FastV
from tokeff.report import table
from tokeff.report.folder import RunFolder
from tokeff.report.run import run, summed

pytestmark = pytest.mark.core
CONFIG = Path(__file__).parents[2] / "configs" / "leaderboard" / "reduce.py"
SHARES = (0.66, 0.33, 0.22, 0.11)


def model() -> Model:
    return Model(tiny.CFG, tiny.params(), None, Precision("float32", "float32", "float32"), "tiny")


# -- the experiment


@pytest.fixture
def small(monkeypatch):
    """The tiny model and texts of its own tokens."""
    rng = np.random.default_rng(0)

    def made(task, seed, length, encode):
        return Encoded(tuple(rng.integers(0, 61, length).tolist()), ((3, 4, 5),), ((6, 7),), (1, 2, 3, 4), ())

    monkeypatch.setattr(reading.tasks, "make", made)
    monkeypatch.setattr(reading, "encode_example", lambda m, example: example)
    monkeypatch.setattr(reading, "encoder", lambda tokenizer: None)
    monkeypatch.setattr(reduction, "load", lambda source: model())
    monkeypatch.setattr(Model, "tok", None)
    monkeypatch.setattr(reduction, "compile_cache", lambda: None)


def board(*rows, **given) -> Reduction:
    return Reduction("reduce", rows, **{"batches": (Batch("t", 48, n=2),), "timed": 48, "rounds": 1} | given)


def test_a_run_measures_resumes_and_reports(small, tmp_path):
    rows = (AtShare("Full"), AtShare("LazyLLM", share=0.66), AtShare("Random", share=0.66))
    config = experiment.Config(board(*rows), tmp_path / "reduce.py", "")
    found = run(config, tmp_path / "out").rows()
    names = ["text/Full@1", "text/LazyLLM@0.66", "text/Random@0.66"]
    assert [row["key"] for row in found] == [*(f"{name}/0" for name in names), *(f"{name}/time" for name in names)]
    full, lazy, _, dense, timed, _ = found
    assert full["share"] == 1 and full["kl"] == [0.0, 0.0] and lazy["share"] == pytest.approx(0.66, abs=0.02)
    assert len(lazy["kl"]) == 2 and min(lazy["kl"]) > 0 and lazy["layers"] == timed["layers"]
    assert timed["prefill_s"] > 0 and timed["first_token_s"] > timed["prefill_s"] and 0 < timed["flops"] < 1
    assert dense["flops"] == dense["speedup"] == dense["first_token_speedup"] == 1
    assert 0 < timed["held"] < dense["held"] and timed["kv_mib"] / dense["kv_mib"] == pytest.approx(timed["held"] / dense["held"])
    more = experiment.Config(board(*rows, AtShare("Pooled", share=0.66)), tmp_path / "reduce.py", "")
    again = run(more, tmp_path / "out").rows()
    assert again[:6] == found and [row["key"] for row in again[6:]] == ["text/Pooled@0.66/0", "text/Pooled@0.66/time"]
    lines = more.experiment.summary(again)
    assert [row["method"] for row in lines] == ["Full", "LazyLLM", "Random", "Pooled"] and lines[1]["n"] == 2
    assert isinstance(lines[1]["beats"], bool) and "beats" not in lines[2] and lines[1]["speedup"] > 0 and lines[1]["perplexity"] > 1
    table = (tmp_path / "out" / "table.md").read_text()
    assert "rows kept" in table and "speed-up" in table and "LazyLLM" in table


def test_beating_is_example_by_example():
    mine, near = {"0": {"paired": [1.0, 3.0, 5.0]}}, {"0": {"paired": [0.9, 2.88, 4.9]}}
    assert beats(mine, near) is True and beats(near, mine) is False
    assert beats(mine, {"0": {"paired": [0.9, 2.88, 5.3]}}) is False
    assert beats(mine, {"1": {"paired": [0.0] * 3}}) is None and beats(mine, {"0": {"note": "left out"}}) is None


@pytest.mark.parametrize("suite", ["smoke", "full", *reduction.KINDS])
def test_the_committed_config_loads(suite):
    made = experiment.load(str(CONFIG), suite).experiment
    made.check()
    kinds = {suite} if suite in reduction.KINDS else set(reduction.KINDS)
    assert len(set(made.keys())) == len(made.keys()) and {row.kind for row in made.rows} == kinds
    if suite != "smoke":  # what one kind measured stands in the folder of all
        whole = experiment.load(str(CONFIG), "full").experiment
        assert set(made.keys()) <= set(whole.keys()) and made.identity() == whole.identity()


@pytest.mark.parametrize(
    ("rows", "given", "says"),
    [
        ((AtShare("Full"), AtShare("LazyLM", share=0.3)), {}, "did you mean 'LazyLLM'?"),
        ((AtShare("Full"), AtShare("LazyLLM", share=1.2)), {}, "share 1.2 is not a share"),
        ((AtShare("ToMe", "sond", 0.3),), {}, "did you mean 'sound'?"),
        ((AtShare("ToMe", "sound", 0.3),), {}, "need the row 'Full'"),
        ((), {}, "nothing of what is to be measured"),
        ((AtShare("Full"),), {"tasks": ("pair",)}, "give some of name, where, count, row"),
        ((AtShare("Full"),), {"rounds": 0}, "give 1 or more"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(rows, given, says):
    with pytest.raises(UserError) as error:
        board(*rows, **given).check()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_suite_is_refused():
    with pytest.raises(UserError, match="smoke"):
        experiment.load(str(CONFIG), "all")


def test_kinds_that_are_not_there_are_left_out_with_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TOKEFF_CACHE", str(tmp_path))
    left = board(*(row for kind in reduction.KINDS for row in entries(kind, (0.33,)))).settled()
    assert {row.kind for row in left.rows} == {"text"}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and said[0].startswith("left out: sound: whisper-tiny.en is not in the cache")


# -- sound and pictures


def test_sound(monkeypatch):
    rng = np.random.default_rng(0)
    cfg = WhisperConfig("tiny", V=40, D=16, F=24, L=2, layers=2, N=2, I=4, S=20, max_len=16, eos=0, start=(3,))
    params = build(cfg, lambda name, stored, shape: jnp.asarray(rng.normal(size=shape) * 0.3 + name.endswith("norm.weight"), jnp.float32))
    m = Whisper(cfg, params, type("Words", (), {"decode": lambda self, ids: " ".join(map(str, ids))})(), "tiny")  # type: ignore[arg-type]
    monkeypatch.setattr(hearing, "MOST", 6)
    monkeypatch.setattr(hearing, "pieces", lambda m, sounds: (rng.normal(size=(3, 40, 4)).astype(np.float32), [0, 0, 1]))
    monkeypatch.setattr(hearing, "read_wav", lambda path: None)
    heard = Hearing(m, (Clip(Path("a"), "1 2"), Clip(Path("b"), None)), 2, 1)
    assert heard.wanted == ["1 2"] and len(heard.full) == 2
    full, some = heard.figures("Full", 1.0), heard.figures("ToMe", 0.5)
    assert full["heard_kl"] == [0.0, 0.0] and full["share"] == full["flops"] == full["encoder_speedup"] == 1
    assert [wrong for wrong, _ in full["changed"]] == [0]  # of the clip that the two windows are
    assert some["share"] == pytest.approx(0.5, abs=0.03) and min(some["heard_kl"]) > 0 and some["wrong"][0][1] == 2 and some["flops"] < 1
    assert heard.drop("ToMe, at once", 0.5) == (10, 0)
    assert hearing.averaged(some)["heard_kl"] == pytest.approx(np.mean(some["heard_kl"]))


def test_a_word_error_rate_has_its_interval_over_clips():
    """Of all words together; drawn clips bring their errors and their words."""
    found = hearing.rate([(1, 10), (3, 10), (0, 20)], "wer")
    assert found["wer"] == 0.1 and found["wer_n"] == 40 and 0 == found["wer_lo"] < 0.1 < found["wer_hi"] <= 0.3
    assert set(hearing.rate([(1, 10)], "wer")) == {"wer", "wer_n"} and hearing.rate([], "wer") == {}


def test_simple_rules_that_look_are_baselines_too_where_they_fit():
    assert {"FasterVLM", "DART"} <= set(reduction.baselines("pictures")) and "FasterVLM" in reduction.baselines("clips")
    assert "FasterVLM, in place" not in reduction.baselines("pictures")

    def part(method, paired):
        row = {"method": method, "kind": "pictures", "target": 0.33, "part": "all", "measured_s": 1.0}
        return {"all": row | ({"share": 0.33, "paired": paired} if paired else {"note": "left out: too few"})}

    mine = part("DivPrune", [1.0] * 9 + [0.0])
    assert reduction.averaged(mine, [part("FasterVLM", [0.0] * 10), part("DART", None)])["beats"]
    assert not reduction.averaged(mine, [part("FasterVLM", [1.0] * 10), part("DART", None)])["beats"]


@pytest.fixture(scope="module")
def pictured():
    """(a tower that names digits, a model of pictures, two tasks of made-up digits)."""
    rng = np.random.default_rng(0)
    glyph = np.zeros((40, 28, 28), np.uint8)
    glyph[:, 5:23, 9:19] = rng.integers(150, 256, (40, 18, 10))
    stuff = Material("test", glyph, np.arange(40) % 10, photographs([rng.integers(0, 256, (100, 100, 3), dtype=np.uint8)]))
    cfg = ViTConfig("tower", D=16, F=24, L=3, N=2, image=(SIDE, SIDE), patch=12, V=10, act="gelu_tanh", eps=1e-6)
    tower = ImageModel(cfg, fresh_vit(cfg, 0), Preprocessing(exact=cfg.image, mean=HALF[0], std=HALF[1]), "tower")
    words = ("<pad>", "<eos>", "<image>", "<video>", *WORDS)
    raw = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(list(words[:4]))
    text = Config("tiny", V=len(words), D=16, F=24, L=3, N=2, K=1, H=8, max_len=512, eos=(1,))
    front = fresh_projector(whole := LlavaConfig(cfg, 2, (1,), canvases=((SIDE, 2 * SIDE),), most=9, video=3), tower.params, 16, 3)
    tok = Tokenizer(raw, len(words), special={"pad_token": "<pad>"})
    v = Llava(whole, front, Model(text, fresh_decoder(text, 2), tok, Precision(), "tiny"), tower.preprocessing, "tiny")
    return tower, v, {task: reduction.make(task, stuff, 6, 0) for task in ("name", "where")}


def test_labels(pictured):
    tower, _, given = pictured
    found = Labelling(tower, given["name"], 1).figures("ToMe", 0.5)
    assert found["share"] == pytest.approx(0.5, abs=0.02) and len(found["paired"]) == 6 and found["flops"] < 1
    assert found["picture_speedup"] > 0


def test_answers_behind_a_pass_that_drops_none_are_the_model(pictured):
    """The prompt first and the answer behind it, as question and answer in one pass."""
    _, v, given = pictured
    answering = Answering(v, given, 1)
    asked = {task: seeing.asked(v, some) for task, some in given.items()}
    for a in asked.values():
        plain = np.asarray(answering.answered(a, None, slice(0, 6)))
        assert answering.forced(a, FastV((1,), (1.0,)), slice(0, 6)).tolist() == plain.tolist()
    a = asked["where"]
    prompt = answering.read(a, None, slice(0, 6))
    said, _, _ = seeing_logits(v, a)
    np.testing.assert_allclose(prompt.logits_BV, said[:, 0], atol=1e-4)


@pytest.mark.parametrize("method", ["RandomPatches", "CDPruner"])
def test_what_enters_the_timed_decoder_is_what_answers_read(pictured, method):
    """Rows that a method leaves, one that looks at the question among them: the logits of question and answer in one pass."""
    _, v, given = pictured
    answering, a = Answering(v, given, 1), seeing.asked(v, given["where"])
    way = answering.way(method, 0.33)
    prompt = answering.prefilled(*answering.entering(a, way, slice(0, 6)))
    about = seeing.directions(v, jnp.asarray(a.tokens_BS), jnp.asarray(a.answer_B))
    said, _, _ = seeing_logits(v, a, way, about)
    np.testing.assert_allclose(prompt.logits_BV, said[:, 0], atol=1e-4)


def seeing_logits(v, a, way=None, about=None):
    from tokeff.evals.vision import answer_logits

    seen = seeing.picture_vectors(v, a.task, jnp.asarray(a.crops_BTYXC), way, about)
    return answer_logits(v.text.params, v.text.cfg, seen, a.tokens_BS, a.length_B, a.answer_B, a.marks)


def test_pictures(pictured):
    _, v, given = pictured
    answering = Answering(v, {"where": given["where"]}, 1)
    held = answering.figures("RandomPatches, in place", 0.33)
    assert held["share"] == pytest.approx(16 / 49) and held["rows_left"] == 17 and len(held["paired"]) == 6
    assert {"RandomPatches", "RandomPatches, in place"} < set(seeing.BASELINES) < set(seeing.METHODS)
    before, inside = answering.figures("RandomPatches", 0.33), answering.figures("PyramidDrop", 0.33)
    assert before["rows_left"] == 17 and before["share"] == pytest.approx(16 / 49) and before["held"] < 0.5
    assert inside["share"] == pytest.approx(0.33, abs=0.02) and inside["layers"] == [0, 1, 2] and len(inside["paired"]) == 6
    assert before["flops"] < 1 and inside["flops"] < 1 and inside["picture_speedup"] > 0
    assert before["decoder_speedup"] > 0 and answering.figures("Full", 1.0)["decoder_speedup"] == 1


def test_settings_at_a_share():
    cfg = ViTConfig("tower", D=96, F=288, L=5, N=3, image=(84, 84), patch=6)
    for name in (m.name for m in seeing.VISUAL):
        if name in ("TokenCorrCompress", "MustDrop"):
            with pytest.raises(UserError, match="picture's own"):
                at_share(name, cfg, 0.33)
            continue
        rows = [at_share(name, cfg, share).rows(cfg) for share in SHARES]
        assert all(abs(n - share * 196) < 0.25 * share * 196 + 3 for n, share in zip(rows, SHARES)) or name == "AIM", (name, rows)


def test_clips(pictured):
    """Every method leaves about the share it is asked for, of which some have none that is small."""
    _, v, _ = pictured
    stuff = Material("test", np.full((40, 28, 28), 200, np.uint8), np.arange(40) % 10, photographs([np.zeros((100, 100, 3), np.uint8)]))
    given = {task: reduction.make(task, stuff, 3, 0) for task in watching.TASKS}
    watched = Watching(v, given, reduction.make("order", stuff, 2, 1), 1)
    full = watched.figures("Full", 1.0)
    assert full["share"] == full["flops"] == full["held"] == full["clip_speedup"] == 1 and full["rows_left"] == 8 * 16 + 1
    for method, share, about in (("DyCoke", 0.66, 0.65), ("OnDeviceSora", 0.66, 0.5), ("RandomPatches, in place", 0.33, 5 / 16)):
        some = watched.figures(method, share)
        assert some["share"] == pytest.approx(about, abs=0.02) and some["flops"] < 1 and len(some["paired"]) == 3, (method, some)
    for method in ("DyCoke", "StillRuns", "OnDeviceSora"):
        with pytest.raises(UserError, match=f"{method} leaves more than 0.11 of the rows"):
            watched.way(method, 0.11)
    assert watched.way("HoliTom", 0.33).budget == 0.33
    rest = (watched.alike <= watched.way("StillRuns", 0.33).tau).mean()
    assert (1 + 7 * rest) / 8 == pytest.approx(0.33, abs=0.02)


def test_what_is_committed_is_of_the_full_suite():
    """Every row stands as it would in a run of today: it would not be measured again."""
    rows = [json.loads(line) for line in (CONFIG.parents[2] / "experiments" / "results" / "reduce" / "results.jsonl").open()]
    whole = experiment.load(str(CONFIG), "full").experiment
    assert {row["key"] for row in rows} <= set(whole.keys()) and all(map(whole.stands, rows))
    lines = {(row["kind"], row["method"], row["target"]): row for row in whole.summary(rows)}
    best, full = lines["pictures", "FasterVLM, in place", 0.33], lines["pictures", "Full", 1.0]
    assert best["beats"] and full["accuracy"] - best["accuracy"] == pytest.approx(0.03)  # as README and docs/vision.md say


def test_the_committed_table_is_that_of_its_rows():
    """Of all kinds; what was measured last is not what a table is made of."""
    folder = RunFolder(CONFIG.parents[2] / "experiments" / "results" / "reduce")
    rows = summed(experiment.load(str(CONFIG), "full").experiment, folder)
    assert folder.path.joinpath("table.md").read_text() == table.markdown(table.build(rows))
    assert {row["kind"] for row in rows} == set(reduction.KINDS)
