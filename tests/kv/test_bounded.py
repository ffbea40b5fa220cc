"""Reading a prompt in bounded memory: against the oracle, exact where nothing is dropped, and never more rows than budget and piece."""

import gc
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from oracles import bounded as oracle
from oracles.against import dense

from tokeff.errors import UserError
from tokeff.kv import bounded
from tokeff.kv import methods as kv
from tokeff.kv import prefill as prefills
from tokeff.kv.bounded import check_bounded, held_between, prefill_bounded
from tokeff.kv.cache import Room
from tokeff.kv.classes import ByClass
from tokeff.kv.evidence import Evidence
from tokeff.kv.extend import pack
from tokeff.kv.keep import Keep
from tokeff.kv.policy import Prefilled
from tokeff.kv.prefill import Gather, prefill
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


CAM = kv.cam(ROWS, 4, over=6)


def coin(head: int, order: int) -> float:
    return float(CAM.coin(jnp.full((1, tiny.CFG.K, 1), order))[0, head, 0])


# (policy, the oracle's rule; where rows leave something, how)
CASES = {
    "h2o": (kv.h2o(ROWS), oracle.heavy(ROWS, 12)),
    "snapkv": (kv.snapkv(ROWS, window=6), oracle.window(ROWS, 6, 5)),
    "recent": (kv.recent_rows(ROWS), oracle.newest(ROWS)),
    "share": (kv.streaming_llm(0.375), oracle.newest(ROWS, 4)),  # of the whole prompt, from the first piece on
    "cam": (CAM, oracle.newest(ROWS, 4), oracle.bequeathed(6, coin)),
    "classes": (ByClass(kv.recent_rows(16), kv.snapkv(ROWS, window=6), ((1,),)), [oracle.window(ROWS, 6, 5), oracle.newest(16)]),
    "a head that keeps everything": (kv.duo_attention(((1,),), ROWS), [oracle.newest(ROWS, 4), lambda mass, last, orders, end: orders]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_rows_that_stay_are_those_of_the_oracle(name):
    policy, *rule = CASES[name]
    model, _, _ = dense(0)
    expected = oracle.Piecewise(model, tiny.prompts()[0], PIECE, *rule)
    prompt = read(policy, tiny.prompts()[:1])
    packed = pack(policy, prompt.layers, Room(0), tiny.CFG)
    for i, layer in enumerate(packed):
        assert tiny.kept(policy, layer)[0] == [expected.kept(i, h) for h in range(tiny.CFG.K)], f"layer {i}"
    np.testing.assert_allclose(np.asarray(prompt.logits_BV)[0], expected.logits, atol=1e-4)
    if name == "cam":
        values = [[layer.v_BKCH[0, h, np.argsort(layer.order_BKC[0, h])][-ROWS:] for h in range(tiny.CFG.K)] for layer in packed]
        wanted = [[np.stack([rows[o][1] for o in sorted(rows)]) for rows in heads] for heads in expected.rows]
        np.testing.assert_allclose(values, wanted, atol=1e-4)


# In the memory that all rows take: policies whose rows wait to be coded, merged or selected, which are read exactly, and those in
# which some heads keep everything. Layers in which none does hold less.
HELD_WHOLE = {
    "Full", "RazorAttention", "DuoAttention", "ShadowKV", "LOOK-M", "EMS", "KIVI", "GEAR", "MiniCache", "MiniCache4bit", "ThinK",
    "TransMLA", "SpAttenCache", "Hydragen", "TidalDecode", "Quest", "DoubleSparsity", "TokenSelect", "Kascade", "InfLLM", "SentenceKV",
    "HiP", "LServe", "RecycledAttention", "TopK", "TopP",
}  # fmt: skip


def bounded_methods(daily=None, where=lambda m: True):
    """Parameters: listed policies that can be read in pieces; those not in `daily`, where it is given, in `make proofs`."""
    once = [m for m in METHODS if m.part == "kv" and where(m)]
    found = [m for m in once if all(type(kind).revisit is Evidence.revisit for kind in m.make(**tiny.settings(m)).needs())]
    later = [pytest.mark.proof]
    return [pytest.param(m, id=m.name, marks=[runs.together(m.name), *(later if daily and m.name not in daily else [])]) for m in found]


def most_held(method, layer: int, rows: int) -> int:
    """Of so many rows of a layer, how many the budget leaves until the next piece comes."""
    policy = method.make(**tiny.settings(method))
    if method.name in HELD_WHOLE and (method.name != "DuoAttention" or policy.of(layer)):
        return rows
    rule = policy if isinstance(policy, Keep) else policy.rest if method.name == "DuoAttention" else policy.rule
    return min(rows, rule.rows(LENGTH, Here(layer, tiny.CFG)))


@pytest.mark.parametrize("method", bounded_methods(runs.attending(), lambda m: m.name not in HELD_WHOLE - {"DuoAttention"}))
def test_with_a_whole_budget_nothing_changes(method):
    policy = method.make(**(tiny.identity(method) if method.identity is not None else {}))
    whole = runs.prompt()
    prompt = read(policy, piece=runs.CHUNK)
    np.testing.assert_allclose(prompt.logits_BV, whole.logits_BV, atol=1e-4)
    for mine, theirs in zip(tiny.packed(policy, prompt), tiny.packed(policy, whole), strict=True):
        assert tiny.kept(policy, mine) == tiny.kept(policy, theirs)


@pytest.mark.parametrize("method", bounded_methods())
def test_a_layer_holds_its_budget_and_a_piece(method):
    """Two pieces, of 48 and 16 rows: what each layer held of the first and all of the second, as `held_between` says."""
    policy = method.make(**tiny.settings(method))
    prompt = runs.bounded(policy)
    tiny.packed(policy, prompt)
    rows = [layer.k_BKSH.shape[2] - (LENGTH - runs.PIECE) for layer in prompt.layers]
    assert rows == [most_held(method, i, runs.PIECE) for i in range(tiny.CFG.L)]
    assert rows == [held_between(policy, tiny.CFG, runs.PIECE, LENGTH, i) for i in range(tiny.CFG.L)]
    assert method.name in HELD_WHOLE or sum(rows) < tiny.CFG.L * runs.PIECE, "what is not held whole lets rows go"


@pytest.mark.parametrize("method", bounded_methods(("SnapKV",)))
def test_however_many_pieces_it_holds_no_more(method, monkeypatch):
    """Pieces of 12: at any time the budget and a piece, in every layer, or all that has been read."""
    policy, seen = method.make(**tiny.settings(method)), []
    squeeze = bounded.squeeze_one

    def counted(policy, cfg, piece, more_B, i, rows):
        left = squeeze(policy, cfg, piece, more_B, i, rows)
        seen.append((i, rows.k_BKSH.shape[2], left.k_BKSH.shape[2]))
        return left

    monkeypatch.setattr(bounded, "squeeze_one", counted)
    prompt = read(policy, tiny.prompts()[:1], piece=12)
    before = [0] * tiny.CFG.L
    for i, read_now, left in seen:
        assert (read_now, left) == (before[i] + 12, most_held(method, i, read_now))
        before[i] = left
    assert len(seen) == 5 * tiny.CFG.L and [layer.k_BKSH.shape[2] for layer in prompt.layers] == [n + 4 for n in before]


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


@pytest.mark.proof
@pytest.mark.parametrize("policy", [kv.adakv(0.125), kv.pyramidkv(0.125)], ids=lambda p: type(p).__name__)
def test_live_buffers_of_8k_are_those_of_2k_and_the_kept_rows(policy, monkeypatch):
    """Budgets that differ by head and by layer, a prompt of 8,192 tokens really read: bytes of all live arrays, counted at every layer of
    every piece, before and after rows go, beside those that were there at first."""
    params, most = tiny.params(LONG), [0]
    squeeze, one_layer = bounded.squeeze_one, prefills.one_layer

    def live():
        return sum(x.nbytes for x in jax.live_arrays())

    def counted(f):
        def then(*given, **named):
            most[0] = max(most[0], live() - there)
            out = jax.block_until_ready(f(*given, **named))
            most[0] = max(most[0], live() - there)
            return out

        return then

    monkeypatch.setattr(bounded, "squeeze_one", counted(squeeze))
    monkeypatch.setattr(prefills, "one_layer", counted(one_layer))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, LONG.V, (1, 8192)), jnp.int32)
    lengths = {n: jnp.asarray([n], jnp.int32) for n in (2048, 8192)}
    gc.collect()
    there = live()
    whole = prefill(params, LONG, tokens[:, :2048], lengths[2048], evidence=policy.needs(), dtype="float32")
    dense_2k, most[0] = most[0], 0
    assert dense_2k >= sum(x.nbytes for layer in whole.layers for x in (layer.k_BKSH, layer.v_BKSH))
    del whole
    gc.collect()
    there = live()
    prompt = prefill_bounded(params, LONG, tokens, lengths[8192], policy, piece=1024, evidence=policy.needs(), dtype="float32")
    packed = pack(policy, prompt.layers, Room(0), LONG)
    kept = 2 * LONG.H * 4 * sum(len(head) for layer in packed for head in tiny.kept(policy, layer)[0])
    assert kept == pytest.approx(8192 // 8 * LONG.L * 2 * LONG.K * LONG.H * 4, rel=0.01)
    assert most[0] <= 1.3 * (kept + dense_2k) and most[0] < 8192 * LONG.L * 2 * LONG.K * LONG.H * 4 / 2


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
