"""A comparison through `run`: bytes are those of the arrays, text is the library's, a row that does nothing fails. And `evaluate`."""

import math
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tokenizers
from oracles import model as oracle
from tokenizers import models, pre_tokenizers, trainers

import tokeff
from tokeff import experiment
from tokeff.data import sources, tasks
from tokeff.errors import UserError
from tokeff.evals import comparison
from tokeff.evals.comparison import Bench, Comparison, Line, greedy_match, line
from tokeff.evals.cost import peak_bytes
from tokeff.evals.fidelity import Encoded, Reader
from tokeff.evals.leaderboard import Texts
from tokeff.kv import methods as kv
from tokeff.models.config import Precision
from tokeff.models.load import Model
from tokeff.models.tokenizer import Tokenizer
from tokeff.report.run import run

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("comparison")]
LENGTH, NEW, SEED = 64, 8, 0
RANDOM, SNAPKV = kv.random_rows(0.5), kv.snapkv(0.5, window=6)
IDLE = Line("SnapKV", kv=kv.snapkv(0.999, window=6))
ROWS = (
    Line("Full"),
    Line("Random", kv=RANDOM),
    Line("SnapKV", kv=SNAPKV),
    Line("Recent", kv=RANDOM),  # what beats nobody: the random rows themselves
)


@cache
def model() -> Model:
    """The tiny model with a tokenizer of digits and of the most frequent words."""
    raw = tokenizers.Tokenizer(models.WordLevel(unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])
    known = trainers.WordLevelTrainer(vocab_size=tiny.CFG.V, special_tokens=["?", *"0123456789"], show_progress=False)
    raw.train_from_iterator([sources.text()], known)
    return Model(tiny.CFG, tiny.params(), Tokenizer(raw, tiny.CFG.V), Precision(), "tiny")


@pytest.fixture(scope="module")
def small():
    """The tiny model in the place of any, and the compile cache where the tests have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "load", lambda source: model())
        patch.setattr(comparison, "compile_cache", lambda: None)
        yield


@dataclass(frozen=True)
class Undrawn(Comparison):
    """Without figures, which take as long as all of its measurements."""

    def report(self):
        return ()


def compared(*rows: Line) -> Comparison:
    return Undrawn("tiny", rows, contexts=(LENGTH,), new=NEW, seed=SEED)


def ran(folder, *rows: Line):
    return run(experiment.Config(compared(*rows), folder / "tiny.py", ""), folder / "out")


@pytest.fixture(scope="module")
def measured(small, tmp_path_factory):
    """(the run's folder, its rows by method)."""
    folder = ran(tmp_path_factory.mktemp("comparison"), *ROWS)
    return folder, {row["method"]: row for row in folder.rows()}


@pytest.fixture(scope="module")
def bench(small) -> Bench:
    """What the run measured, once more, and nothing measured yet."""
    return compared(*ROWS).prepare()


def share(rows: int) -> float:
    """Bytes of a store of so many rows a head, their orders and their number, over those of the prompt's keys and values."""
    L, K, H = tiny.CFG.L, tiny.CFG.K, tiny.CFG.H
    return (2 * L * K * H * rows * 4 + L * K * rows * 4 + L * 4) / (2 * L * K * H * LENGTH * 4)


def test_bytes_are_those_of_the_arrays(measured):
    """Whole tiles of 8 rows: what is kept and what will be generated. The loop that decodes has little beside them."""
    _, rows = measured
    for method, kept in {"Full": LENGTH, "Random": LENGTH // 2, "SnapKV": LENGTH // 2}.items():
        row, expected = rows[method], share(math.ceil((kept + NEW) / 8) * 8)
        assert row["held"] == row["read"] == pytest.approx(expected)
        assert expected < row["peak"] < 2 * expected
    assert rows["Full"]["peak"] - rows["SnapKV"]["peak"] == pytest.approx(rows["Full"]["held"] - rows["SnapKV"]["held"], rel=0.25)


def test_peak_counts_a_buffer_once_and_no_weight():
    weight, state = jnp.ones((64, 64)), jnp.ones((256, 1024))
    add = lambda w, s: s + w.sum()  # noqa: E731
    for donated, copies in ((1, 1), ((), 2)):
        program = jax.jit(add, donate_argnums=donated).lower(weight, state).compile()
        assert peak_bytes(program, weight) == pytest.approx(copies * state.nbytes, rel=0.01)


def test_text_is_what_generate_says(measured, bench):
    """How far a method's continuation is the full cache's, also in a run that went on after the full cache was measured."""
    _, rows = measured
    context = [list(bench.reader(LENGTH).text.context)]
    full, *others = (tokeff.generate(model(), context, kv=row.kv, max_new=NEW, stop=False).tokens[0] for row in ROWS[:3])
    assert rows["Full"]["greedy_match"] == 1 and rows["Full"]["tokens_per_pass"] == 1 and rows["Full"]["decode_tok_s"] > 0
    for row, tokens in zip(ROWS[1:3], others, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(full, tokens, strict=True)) if a != b), NEW)
        assert rows[row.method]["greedy_match"] == same / NEW == greedy_match(bench, LENGTH, row, tokens)


def test_quality_is_against_the_full_cache(measured, bench):
    _, rows = measured
    full, n = rows["Full"], len(tasks.DEPTHS)
    assert full["kl"] == 0 and full["top1_agree"] == 1 and {row["n"] for row in rows.values()} == {n}
    for method in ("Random", "SnapKV"):
        assert rows[method]["kl_lo"] < rows[method]["kl"] < rows[method]["kl_hi"] and rows[method]["kl"] > 0.01
        assert 0 != rows[method]["answer_logprob"] != full["answer_logprob"]
    text, first = bench.reader(LENGTH).text, bench.quality(LENGTH, ROWS[0].setup).nll[0]
    _, logits = oracle.prefill(oracle.Model(tiny.params(), tiny.CFG), text.context)
    assert first == pytest.approx(np.log(np.exp(logits).sum()) - logits[text.held_out[0]], abs=1e-3)


def test_random_rows_do_not_beat_random_rows(measured):
    _, rows = measured
    assert not {"beats_random"} & {*rows["Full"], *rows["Random"]}
    assert rows["Recent"]["kl"] == rows["Random"]["kl"] and rows["Recent"]["beats_random"] is False
    assert isinstance(rows["SnapKV"]["beats_random"], bool)


def test_kept_rows_are_pictured(measured):
    folder, rows = measured
    kept = folder.kept(rows["SnapKV"])
    assert kept is not None and len(kept.tokens) == LENGTH and len(kept.needles) == len(tasks.DEPTHS)
    shares_LS = kept.share_LS()
    assert shares_LS.shape == (tiny.CFG.L, LENGTH) and (shares_LS[:, -6:] == 1).all()  # the window is always kept
    np.testing.assert_allclose(shares_LS.sum(axis=1), LENGTH // 2)
    assert "SnapKV" in (folder.path / "report.html").read_text()


@pytest.mark.parametrize("row", [IDLE, Line("DuoAttention", kv=kv.duo_attention(((0, 1),), 0.25))], ids=lambda row: row.method)
def test_a_row_that_does_nothing_fails(small, tmp_path, row):
    """A budget below 1 of which every row is kept, or that no head has: what was measured before stays, and nothing is recorded of it."""
    with pytest.raises(UserError, match=f"{row.method} held and read everything at a budget of {comparison.budget_of(row)}"):
        ran(tmp_path, Line("Full"), row)
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert len(lines) == 1 and '"Full"' in lines[0]


def test_a_row_that_does_nothing_fails_a_leaderboard():
    reader = Reader(model(), Encoded(tiny.prompts()[0], (), (), tiny.prompts()[1][:5], ()))
    with pytest.raises(UserError, match="SnapKV held and read everything at a budget of 0.999"):
        Texts(model(), reader).figures(IDLE)


def test_a_budget_is_found_in_the_heads_that_have_it():
    """Those that do not keep everything, and in what is coded."""
    for method in ("RazorAttention", "DuoAttention"):
        assert comparison.budget_of(line(method, budget=0.25)) == 0.25
    assert comparison.budget_of(line("KIVI")) is None and comparison.budget_of(Line("KIVI", kv=kv.kivi(rule=SNAPKV))) == 0.5


def test_evaluate_says_what_a_comparison_says(measured):
    """One text, question by question and token by token the same figures; without a policy, the full cache against itself."""
    _, rows = measured
    for row in ROWS[:3]:
        found = tokeff.evaluate(model(), None if row.method == "Full" else row.kv, length=LENGTH, n=1, seed=SEED)
        told = rows[row.method]
        for name, figure in {"kl": "kl", "loss": "loss", "top1": "top1_agree", "logprob": "answer_logprob"}.items():
            assert found[name].value == pytest.approx(told[figure]), name
        assert found["exact"].value * found["exact"].n == told["needles_exact"] and found["exact"].n == told["n"]
    assert found["full_exact"].value == 0 and found["ranked_by"] == "logprob"  # nobody taught the tiny model to answer
