"""Reading a prompt in bounded memory: against the oracle, exact where nothing is dropped, and never more rows than budget and piece."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import runs
import tiny
from oracles import bounded as oracle
from oracles.against import dense

from tokeff.errors import UserError
from tokeff.kv import methods as kv
from tokeff.kv.bounded import check_bounded, prefill_bounded
from tokeff.kv.cache import Room
from tokeff.kv.evidence import Evidence
from tokeff.kv.extend import pack
from tokeff.kv.keep import Keep
from tokeff.kv.policy import Policy, Prefilled
from tokeff.kv.prefill import Gather
from tokeff.listing import METHODS
from tokeff.models.config import Config
from tokeff.models.flow import Flow, Here
from tokeff.models.transformer import one_layer
from tokeff.reduce.methods import gemfilter
from tokeff.sparse.methods import a_shape, quest

pytestmark = pytest.mark.core
PIECE, LENGTH = 24, tiny.LENGTHS[0]
ROWS = 24


def read(policy, rows=None, piece=PIECE):
    tokens, length = tiny.padded(rows or tiny.prompts())
    return prefill_bounded(
        tiny.params(), tiny.CFG, tokens, length, policy, piece=piece, evidence=policy.needs(), dtype="float32"
    )


CASES = {
    "h2o": (kv.h2o(ROWS), oracle.heavy(ROWS, 12)),
    "snapkv": (kv.snapkv(ROWS, window=6), oracle.window(ROWS, 6, 5)),
    "recent": (kv.recent_rows(ROWS), oracle.newest(ROWS)),
    "share": (kv.streaming_llm(0.375), oracle.newest(ROWS, 4)),  # of the whole prompt, from the first piece on
}


@pytest.mark.parametrize("name", CASES)
def test_the_rows_that_stay_are_those_of_the_oracle(name):
    policy, keep = CASES[name]
    model, _, _ = dense(0)
    expected = oracle.Piecewise(model, tiny.prompts()[0], PIECE, keep)
    prompt = read(policy, tiny.prompts()[:1])
    packed = pack(policy, prompt.layers, Room(0), tiny.CFG)
    for i, layer in enumerate(packed):
        assert tiny.kept(policy, layer)[0] == [expected.kept(i, h) for h in range(tiny.CFG.K)], f"layer {i}"
    np.testing.assert_allclose(np.asarray(prompt.logits_BV)[0], expected.logits, atol=1e-4)


def lets_go(policy) -> bool:
    """Whether it drops rows between pieces: not if it holds all of them, or reads the prompt a second time."""
    again = any(type(kind).revisit is not Evidence.revisit for kind in policy.needs())
    return type(policy).squeeze is not Policy.squeeze and not again


def bounded_methods(daily=None):
    """Parameters: listed policies that drop rows between pieces; those not in `daily`, where it is given, in `make proofs`."""
    found = [m for m in METHODS if m.part == "kv" and lets_go(m.make(**tiny.settings(m)))]
    later = [pytest.mark.proof]
    return [pytest.param(m, id=m.name, marks=[runs.together(m.name), *(later if daily and m.name not in daily else [])]) for m in found]


@pytest.mark.parametrize("method", bounded_methods(runs.attending()))
def test_with_a_whole_budget_nothing_changes(method):
    policy = method.make(**(tiny.identity(method) if method.identity is not None else {}))
    whole = runs.prompt()
    prompt = read(policy, piece=runs.CHUNK)
    np.testing.assert_allclose(prompt.logits_BV, whole.logits_BV, atol=1e-4)
    for mine, theirs in zip(tiny.packed(policy, prompt), tiny.packed(policy, whole), strict=True):
        assert tiny.kept(policy, mine) == tiny.kept(policy, theirs)


@pytest.mark.parametrize("method", bounded_methods())
def test_a_layer_never_holds_more_than_its_budget_and_a_piece(method):
    policy = method.make(**tiny.settings(method))
    prompt = runs.bounded(policy)
    tiny.packed(policy, prompt)
    most = max(layer.k_BKSH.shape[2] for layer in prompt.layers)
    if isinstance(policy, Keep) and type(policy).squeeze is Keep.squeeze and policy.span == "layer":
        assert most <= max(policy.rows(LENGTH, Here(i, tiny.CFG)) for i in range(tiny.CFG.L)) + runs.PIECE
        assert most < LENGTH
    else:
        assert most <= LENGTH


@pytest.mark.parametrize("name", CASES)
def test_a_batch_reads_as_single_prompts_do(name):
    policy = CASES[name][0]
    both = pack(policy, read(policy).layers, Room(0), tiny.CFG)
    for b, row in enumerate(tiny.prompts()):
        alone = pack(policy, read(policy, (row,)).layers, Room(0), tiny.CFG)
        for mine, theirs in zip(both, alone, strict=True):
            assert tiny.kept(policy, mine)[b] == tiny.kept(policy, theirs)[0]


@pytest.mark.parametrize("make", [kv.snapkv, kv.adakv], ids=lambda make: make.__name__)
def test_a_sequence_that_ended_earlier_keeps_what_it_would_keep_alone(make):
    """Heads of AdaKV hold different numbers of rows, chosen at the sequence's own end and not where the longest of its batch ends."""
    policy, rows = make(ROWS, window=6), (tiny.prompts()[0], tiny.prompts()[1][:40])
    both, alone = (pack(policy, read(policy, some).layers, Room(0), tiny.CFG) for some in (rows, rows[1:]))
    for mine, theirs in zip(both, alone, strict=True):
        assert tiny.kept(policy, mine)[1] == tiny.kept(policy, theirs)[0]


def test_rows_that_come_later_find_their_slots_behind_those_kept():
    """A selecting policy over a rule holds fewer rows than the prompt had; what comes is written behind them."""
    policy = replace(quest(1.0, page=4, dense=(0,)), within=kv.snapkv(ROWS, window=6))
    prompt, alone = read(policy), read(policy.within)
    given = np.random.default_rng(3).integers(0, tiny.CFG.V, (len(tiny.LENGTHS), 4))
    mine, theirs = (
        [out for out, _ in tiny.forced(p, pack(p, x.layers, Room(4), tiny.CFG), x, given)]
        for p, x in ((policy, prompt), (policy.within, alone))
    )
    np.testing.assert_allclose(mine, theirs, atol=1e-4)


LONG = Config("long", V=61, D=64, F=96, L=8, N=4, K=2, H=16, max_len=16384, tied=False)


def peak(policy, before: int, step: int, length: int) -> int:
    """Bytes in use beside the weights when a prefill's last layer reads `step` rows behind `before` that are there: what the other
    layers hold by then, and the arguments, results and temporaries of this layer's program."""
    shape = partial(jax.ShapeDtypeStruct, dtype="float32")
    k, order, count = shape((1, LONG.K, before, LONG.H)), shape((1, LONG.K, before), dtype="int32"), shape((1,), dtype="int32")
    evidence = {kind: kind.like(1, before, LONG) for kind in policy.needs()} if before else {}
    layer = Prefilled(k, k, order, count, shape((), dtype="int32"), evidence, count, length)  # type: ignore[arg-type]
    rows = shape((1, step), dtype="int32")
    flow = Flow(shape((1, step, LONG.D)), rows, rows, rows)  # type: ignore[arg-type]
    block = jax.tree.map(lambda x: shape(x.shape), tiny.weights(LONG)[0].blocks[0])
    gather = Gather(tuple(policy.needs()), gaps=True)
    lowered = one_layer.lower(block, flow, layer, None, None, policy=gather, cut=None, here=Here(0, LONG))
    use, (_, after, _) = lowered.compile().memory_analysis(), lowered.out_info
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(after))
    weights = sum(4 * x.size for x in jax.tree.leaves(block))
    program = use.argument_size_in_bytes + use.output_size_in_bytes + use.temp_size_in_bytes - weights
    return (LONG.L - 1) * held + program


@pytest.mark.parametrize("policy", [kv.h2o(0.125), kv.snapkv(0.125), kv.streaming_llm(0.125)], ids=lambda p: type(p.score).__name__)
def test_the_peak_of_8k_is_that_of_2k_and_the_kept_rows(policy):
    kept = 8192 // 8 * LONG.L * 2 * LONG.K * LONG.H * 4
    dense_2k, dense_8k, small = peak(policy, 0, 2048, 2048), peak(policy, 0, 8192, 8192), peak(policy, 1024, 1024, 8192)
    assert small <= 1.3 * (kept + dense_2k)
    assert small < dense_8k / 3


def test_what_needs_the_whole_prompt_is_refused():
    for policy, cut, pattern, words in (
        (kv.full(), gemfilter(), None, "ranks the whole prompt"),
        (kv.full(), None, a_shape(), "blocks of a whole prompt"),
        (kv.kvzip(), None, None, "reads the whole prompt again"),
    ):
        with pytest.raises(UserError, match=words):
            check_bounded(512, policy, cut, pattern)
    with pytest.raises(UserError, match="bounded=0"):
        check_bounded(0, kv.full(), None, None)
