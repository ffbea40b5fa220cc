"""A leaderboard averages over texts, compares text by text with random rows, and resumes by whole texts."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from tokeff import experiment
from tokeff.errors import UserError
from tokeff.evals.comparison import Line, line, timed_prefill
from tokeff.evals.cost import pattern_read
from tokeff.evals.fidelity import Encoded, Reader
from tokeff.evals.leaderboard import Batch, Leaderboard, Texts, averaged, entries, name_of, ranked
from tokeff.generation import Setup
from tokeff.kv import methods as kv
from tokeff.listing import find, methods
from tokeff.models.config import Precision
from tokeff.models.load import Model
from tokeff.report.folder import RunFolder
from tokeff.sparse import methods as sparse

pytestmark = pytest.mark.core
CONFIG = Path(__file__).parents[2] / "configs" / "leaderboard" / "kv.py"


def row(method, batch, kl, **more):
    """One measurement: a batch of as many texts as there are numbers in `kl`."""
    each = lambda x: [x] * len(kl)  # noqa: E731
    return {
        "method": method, "family": find(method).family, "lossless": False, "budgeted_by": "held", "budget": 0.25, "context": 64,
        "task": "multi_question", "batch": batch, "held": 0.25, "read": 0.25,
        "exact": each(1), "asked": each(3), "full_exact": each(3), "answer_logprob": each(-2.0),
        "later_exact": each(0), "later_logprob": each(-3.0), "loss": each(3.0), "kl": list(kl), "top1_agree": each(0.5),
    } | more  # fmt: skip


ALL = {("multi_question", 64)}
SNAPKV, H2O = kv.snapkv(0.5, window=6), kv.h2o(0.5)


def test_every_budgeted_method_stands_at_every_budget():
    lines = entries(methods(), (0.5, 0.25))
    names = [name_of(x) for x in lines]
    assert len(set(names)) == len(names)
    assert {"Full", "SnapKV@0.5", "SnapKV@0.25", "Truncated@0.25", "MInference"} <= set(names)


def test_texts_are_averaged_and_compared_one_by_one():
    chance = [row("Random", 0, (0.5, 0.9)), row("Random", 1, (0.7,))]
    better = [row("SnapKV", 0, (0.4, 0.8)), row("SnapKV", 1, (0.6,))]  # by .1 on each text, though texts differ by more
    found = averaged(better, chance, ALL)
    assert found["kl"] == pytest.approx(0.6) and found["kl_n"] == 3 and found["kl_lo"] < 0.6 < found["kl_hi"]
    assert (found["needles_exact"], found["n"], found["later_exact"]) == (3, 9, 0) and found["beats_random"]
    assert not averaged([row("SnapKV", 0, (0.4, 1.0)), row("SnapKV", 1, (0.7,))], chance, ALL)["beats_random"]
    turns = averaged([row("SnapKV", 0, (0.4,)), row("SnapKV", 1, (0.7,), turns_exact=[2], turns_logprob=[-1.0])], chance, ALL)
    assert (turns["turns_exact"], turns["turns_exact_n"], turns["turns_logprob"]) == (2, 3, -1.0)


def test_answers_count_where_the_full_cache_knows_them():
    """Four of five questions are enough, and at each length by itself; those to other tasks stand apart. KL is of all texts."""
    easy = row("SnapKV", 0, (0.4,), full_exact=[4], asked=[5])
    hard = row("SnapKV", 1, (0.8,), task="chains", full_exact=[2], answer_logprob=[-9.0])
    far = row("SnapKV", 2, (0.1,), context=128, full_exact=[0])
    assert ranked([easy, hard, far]) == {("multi_question", 64)}
    found = averaged([easy, hard], None, ranked([easy, hard, far]))
    assert (found["needles_exact"], found["n"], found["answer_logprob"], found["hard_logprob"]) == (1, 5, -2.0, -9.0)
    assert found["kl"] == pytest.approx(0.6)
    alone = averaged([far], None, set())
    assert "needles_exact" not in alone and "later_exact" not in alone and alone["hard_logprob"] == -2.0


def test_who_uses_more_bytes_is_not_said_to_beat_random_rows():
    chance = [row("Random", 0, (0.5, 0.9))]
    for held, said in ((0.27, True), (0.5, False)):
        assert ("beats_random" in averaged([row("SnapKV", 0, (0.4, 0.8), held=held)], chance, ALL)) == said


def test_rows_of_several_commits_say_so():
    found = averaged([row("SnapKV", 0, (0.4,), commit="a", dirty=True), row("SnapKV", 1, (0.4,), commit="b")], None, ALL)
    assert found["commits"] == ["a", "b"] and found["dirty"]


def test_speeds_of_another_run_stand_beside_their_budget(tmp_path):
    times = {"method": "SnapKV", "budget": 0.25, "step_ms": 2.0, "dense_ms": 3.0, "of_dense": 1.5, "of_floor": 0.5, "overhead_ms": 0.1}
    folder = RunFolder(tmp_path / "speeds")
    folder.start("x", {}, {})
    lines = [{"key": f"SnapKV/{n}", **times, "context": n, "step_ms": ms} for n, ms in ((64, 4.0), (128, 2.0))]
    (folder.path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    board = Leaderboard("b", (line("Full"), line("SnapKV", budget=0.25)), speeds=str(folder.path))
    with_times, without = board.summary([row("SnapKV", 0, (0.4,)), row("SnapKV", 0, (0.4,), budget=0.5)])
    assert (with_times["of_dense"], with_times["pays_from"], with_times["overhead_ms"]) == (1.5, "96", 0.1) and "of_dense" not in without
    assert board.identity() == Leaderboard("b", (line("Full"),)).identity()
    assert "of_dense" not in Leaderboard("b", (line("Full"),), speeds=str(tmp_path)).summary([row("SnapKV", 0, (0.4,))])[0]


def test_one_text_has_no_interval():
    found = averaged([row("SnapKV", 0, (0.4,))], [row("Random", 0, (0.5,))], ALL)
    assert found["kl"] == 0.4 and "kl_lo" not in found and "beats_random" not in found


def test_texts_without_a_question_have_no_answer():
    asked, silent = row("SnapKV", 0, (0.4,)), row("SnapKV", 1, (0.4,), asked=[0], exact=[0], full_exact=[0], answer_logprob=[None])
    found = averaged([asked, silent], None, ALL)
    assert (found["n"], found["answer_logprob"], found["kl_n"]) == (3, -2.0, 2)


def test_a_text_without_questions_is_measured_by_what_follows_it():
    m = Model(tiny.CFG, tiny.params(), None, Precision("float32", "float32", "float32"), "tiny")
    text = Encoded(tiny.prompts()[0], (), (), tiny.prompts()[1][:5], ())
    assert Reader(m, text).later(Setup()) == [[]]
    policy = kv.snapkv(0.5, window=6)
    measured = Texts(m, Reader(m, text)).figures(Line("SnapKV", kv=policy)) | {"batch": 0, "context": 64, "task": "multi_question"}
    found = averaged([measured], None, ALL)
    assert found["kl"] > 0 and not {"n", "later_logprob", "answer_logprob"} & set(found)


def test_a_prefill_in_pieces_is_timed_by_itself():
    m = Model(tiny.CFG, tiny.params(), None, Precision("float32", "float32", "float32"), "tiny")
    reader = Reader(m, Encoded(tiny.prompts()[0], (), (), (3,), ()))
    setups = [Setup(kv.h2o(24)), Setup(kv.h2o(24), bounded=16)]
    for setup in setups:
        timed_prefill(reader, setup)
    assert set(reader.seconds) == {reader.key(setup) for setup in setups} and len(reader.seconds) == 2


def test_a_rule_that_reads_the_prompt_twice_is_refused_in_pieces():
    with pytest.raises(UserError, match="reads the whole prompt again"):
        Leaderboard("b", (line("Full"), Line("KVzip", kv=kv.kvzip(0.5), bounded=16))).check()


TWO = (Batch("multi_question", 64, n=2), Batch("multi_question", 128))


def test_keys_go_batch_by_batch():
    board = Leaderboard("b", (line("Full"), line("SnapKV", budget=0.5)), batches=TWO)
    assert board.keys() == ["Full/0", "SnapKV@0.5/0", "Full/1", "SnapKV@0.5/1"]


def test_rows_with_a_prefill_of_their_own_are_at_some_budgets():
    board = Leaderboard("b", (line("Full"), *(line("GemFilter", budget=b) for b in (0.5, 0.25))), own=(0.25,))
    assert board.keys() == ["Full/0", "GemFilter@0.25/0"]


def test_a_leaderboard_grows_and_measures_changed_rows_again():
    small = Leaderboard("b", (line("Full"),), batches=TWO)
    large = Leaderboard("b", (line("Full"), line("SnapKV", budget=0.5)), batches=TWO)
    assert small.identity() == large.identity() != Leaderboard("b", (line("Full"),)).identity()
    measured = {"key": "SnapKV@0.5/0", "settings": repr(line("SnapKV", budget=0.5))}
    assert large.stands(measured) and not small.stands(measured)
    assert not Leaderboard("b", (line("SnapKV", budget=0.5, window=8),)).stands(measured)


@pytest.mark.parametrize("policy", tiny.sampled([kv.full(), SNAPKV, H2O], (SNAPKV, H2O)), ids=["Full", "SnapKV", "H2O"])
def test_a_batch_is_measured_as_its_texts_alone(policy):
    """Unlike questions and answers in one batch, question known and not known, against one text at a time."""
    m = Model(tiny.CFG, tiny.params(), None, Precision("float32", "float32", "float32"), "tiny")
    rng = np.random.default_rng(0)
    ids = lambda n: tuple(rng.integers(0, tiny.CFG.V, n).tolist())  # noqa: E731
    texts = [Encoded(ids(48), (ids(a), ids(a + 1)), (ids(2), ids(b)), ids(9), ()) for a, b in ((4, 3), (6, 5))]
    setup = Setup(policy)
    both = Reader(m, *texts, evidence=policy.needs())
    for b, (quality, later) in enumerate(zip(both.qualities(setup), both.later(setup), strict=True)):
        alone = Reader(m, texts[b])
        expected = alone.quality(setup)
        np.testing.assert_allclose(quality.logprob, expected.logprob, atol=1e-3)
        np.testing.assert_allclose(quality.nll, expected.nll, atol=1e-3)
        np.testing.assert_allclose([p for _, p in later], [p for _, p in alone.later(setup)[0]], atol=1e-3)


@pytest.mark.parametrize("policy", [SNAPKV, H2O], ids=["SnapKV", "H2O"])
def test_questions_asked_in_turns_stand_behind_their_answers(policy):
    """A turn is a question of its own whose prompt is all that was said before it; the first is one asked later."""
    m = Model(tiny.CFG, tiny.params(), None, Precision("float32", "float32", "float32"), "tiny")
    rng = np.random.default_rng(1)
    ids = lambda n: tuple(rng.integers(0, tiny.CFG.V, n).tolist())  # noqa: E731
    texts = [Encoded(ids(48), (ids(4), ids(3)), (ids(2), ids(n)), ids(9), ()) for n in (5, 2)]
    setup = Setup(policy)
    turns = Reader(m, *texts, evidence=policy.needs()).turns(setup)
    for text, got in zip(texts, turns, strict=True):
        (a, b), (x, y) = text.questions, text.answers
        alone = Reader(m, dataclasses.replace(text, questions=(a, (*a, *x, *b)), answers=(x, y)))
        np.testing.assert_allclose([p for _, p in got], [p for _, p in alone.later(setup)[0]], atol=1e-3)


def test_what_a_sparse_prefill_reads_is_counted():
    """A-shape's blocks, by the definition: the sinks' and the window's, of those up to a query's own."""
    m = Model(tiny.CFG, tiny.params(), None, Precision("float32", "float32", "float32"), "tiny")
    tokens, length = tiny.padded(tiny.prompts())
    whole = pattern_read(m, sparse.a_shape(sinks=16, window=1 << 20, block=16), tokens, length)
    few = pattern_read(m, sparse.a_shape(sinks=16, window=16, block=16), tokens, length)
    blocks = [-(-n // 16) for n in tiny.LENGTHS]
    read = sum(len({0, max(q - 1, 0), q}) for n in blocks for q in range(n))
    assert whole == 1.0 and few == pytest.approx(read / sum(q + 1 for n in blocks for q in range(n)))
    assert pattern_read(m, kv.cacheblend(16), tokens, length) is None


def test_answers_of_one_token_are_read_from_the_prompt():
    """All that is forced is the first token, which the prefill already predicts; nothing is left to read one by one."""
    m = Model(tiny.CFG, tiny.params(), None, Precision("float32", "float32", "float32"), "tiny")
    context, (first, second) = tiny.prompts()[0], ((5, 6), (7, 8, 9))
    both = Reader(m, Encoded(context, (first, second), ((3,), (4,)), (11,), ()))
    found = both.quality(Setup())
    for question, answer, got in zip((first, second), (3, 4), found.logprob, strict=True):
        logits = tiny.read(tiny.FULL, ((*context, *question),)).logits_BV[0]
        np.testing.assert_allclose(got, jax.nn.log_softmax(logits)[answer], atol=1e-3)
    assert found.nll.shape == (1,)


def test_texts_of_one_batch_ask_equally_often():
    m = Model(tiny.CFG, tiny.params(), None, Precision("float32", "float32", "float32"), "tiny")
    texts = [Encoded((1, 2, 3), ((4,),) * n, ((5,),) * n, (6,), ()) for n in (2, 1)]
    with pytest.raises(UserError, match="equally many questions, not 2, 1"):
        Reader(m, *texts)


def test_a_leaderboard_needs_the_full_cache():
    with pytest.raises(UserError, match="Full"):
        Leaderboard("b", (line("SnapKV", budget=0.5),)).check()


@pytest.mark.parametrize("suite", ["smoke", "full"])
def test_the_committed_config_loads(suite):
    board = experiment.load(str(CONFIG), suite).experiment
    board.check()
    assert len(set(board.keys())) == len(board.keys())


def test_an_unknown_suite_is_refused():
    with pytest.raises(UserError, match="smoke"):
        experiment.load(str(CONFIG), "all")
