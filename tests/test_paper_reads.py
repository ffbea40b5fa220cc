"""The published numbers of methods that read few rows, or hold them in another form: what two tokens read of thousands of random rows is
what the oracle reads, at the same numbers. tests/test_settings.py has the methods that keep some of the rows."""

from functools import partial
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_settings as settings
import tiny
from oracles import model as oracle
from oracles import quant, reading, scores, selection, sentences

from tokeff.kv import retell
from tokeff.kv.cache import Room
from tokeff.kv.extend import pack
from tokeff.kv.prefill import Gather, Prompt, blank
from tokeff.listing import find
from tokeff.models.config import Config
from tokeff.models.flow import Flow, Here

pytestmark = pytest.mark.core
STEPS = 2
ENDS = (3, 11)


def sized(K=1, N=2, H=8) -> Config:
    """Six layers, so that published numbers of layers name some of them."""
    return Config("random rows", V=50, D=8, F=8, L=6, N=N, K=K, H=H, max_len=1 << 17)


ONE, TWO, SMALL, WIDE, LONG = sized(), sized(2, 4), sized(1, 1), sized(2, 4, 128), sized(1, 2, 64)


def given(cfg, S, layer):
    """Random (q_SNH, k_SKH, v_SKH) before rotation. Of wide keys 160 directions hold nearly all: which directions a rank takes is plain."""
    rng = np.random.default_rng(layer)
    q, k, v = (rng.standard_normal((S, heads, cfg.H)) for heads in (cfg.N, cfg.K, cfg.K))
    if cfg is WIDE:
        strong = rng.standard_normal((S, 160)) @ rng.standard_normal((160, cfg.K * cfg.H)) / 160**0.5
        k = 0.05 * k + strong.reshape(k.shape)
    return [x.astype(np.float32) for x in (q, k * rng.uniform(0.5, 2, (S, cfg.K, 1)), v)]


def ids_of(S):
    return np.random.default_rng(9).integers(0, 50, S)


@partial(jax.jit, static_argnames=("needs", "layer", "cfg"))
def prefilled(q, k, v, ids, *, needs, layer, cfg):
    """One layer of a prefill with what these queries tell."""
    (S, *_), here = q.shape, Here(layer, cfg)
    order = jnp.arange(S, dtype=jnp.int32)[None]
    flow, q, k, v = Flow(jnp.zeros((1, S, cfg.D)), order, order, order, id_BT=ids[None]), q[None], k[None], v[None]
    rows = blank(cfg, 1, jnp.array([S]), "float32")[layer]
    if needs:
        return Gather(needs).attend(q, k, v, flow, flow, rows, None, None, here)[1]
    return rows.replace(k_BKSH=here.rotate(k, order[..., None]).swapaxes(1, 2), v_BKSH=v.swapaxes(1, 2), order_BKS=order[:, None])


@partial(jax.jit, static_argnames=("policy", "at", "cfg"))
def packed(rows, *, policy, at, cfg):
    return [policy.pack_layer(layer, Room(STEPS), Here(i, cfg)) for i, layer in zip(at, rows, strict=True)]


@partial(jax.jit, static_argnames=("policy", "at", "cfg"))
def token(layers, given, place, word, *, policy, at, cfg):
    """([out_NH of each layer], the layers) of one token that comes at this place."""
    order, across, outs = place[None, None], None, []
    flow = Flow(jnp.zeros((1, 1, cfg.D)), order, order, order, id_BT=word[None, None])
    for n, (i, (q, k, v)) in enumerate(zip(at, given, strict=True)):
        row = (x[None, None] for x in (q, k, v))
        out, layers[n], across = policy.attend(*row, flow, flow, layers[n], None, across, Here(i, cfg))
        outs.append(out[0, 0])
    return outs, layers


def seen(cfg, S, layer, asking) -> oracle.Seen:
    """What the oracle's prefill would have seen, with the probabilities of the last `asking` queries."""
    q, k, v = (x[:S].astype(np.float64) for x in given(cfg, S + STEPS, layer))
    queries, keys = settings.turned(cfg, q), settings.turned(cfg, k)
    A = [{} for _ in range(cfg.N)]
    for n in range(cfg.N):
        for a in range(max(S - asking, 0), S):
            e = keys[: a + 1, n // (cfg.N // cfg.K)] @ queries[a, n] * cfg.scale
            e = np.exp(e - e.max())
            A[n][a] = settings.Row((e / e.sum()).astype(np.float32))
    by_order = [dict(enumerate(x)) for x in (q, k, v, keys)]
    return oracle.Seen(list(range(S)), *by_order, A)


def far(p, size=1, rows=None) -> int:
    """How many pages are chosen: what the budget leaves beside the pages of sinks and those that recent rows may lie in."""
    sure = -(-p.get("sinks", 0) // size) + -(-(p["recent"] - 1) // size) + 1
    return ((rows or p["budget"]) - sure * size) // size


def labels(cfg, s, layer, count):
    return [[reading.loudest_keys(s[i], h, count) for h in range(cfg.K)] if i == layer else [] for i in range(cfg.L)]


def split(m, s, p):
    ids = ids_of(len(s[0].orders) + STEPS).tolist()
    many = {name: p[name] for name in ("sinks", "recent", "window", "kernel", "cell", "longest")}
    return sentences.SentenceKV(m, s, ids, round(p["factor"] * p["budget"]), far(p), ends=ENDS, **many)


def start(rank):
    """What tokeff starts its power iteration from."""
    return np.asarray(jax.random.normal(jax.random.key(0), (LONG.H, rank), jnp.float32), np.float64)


ALL = 1 << 20
# name: (prompt rows, layers that are run, model, how many last queries are asked, oracle(model, seen, paper settings))
READ = {
    "Quest": (4096, (2,), ONE, 0, lambda m, s, p: reading.Quest(m, s, far(p, 16), size=16, recent=1, dense=p["dense"])),
    "TidalDecode": (2048, (2, 3), TWO, 0, lambda m, s, p: selection.TidalDecode(m, s, 255, 1, p["dense"], p["select"])),
    "DoubleSparsity": (2048, (2,), TWO, 0, lambda m, s, p: reading.DoubleSparsity(
        m, s, 127, recent=1, dense=p["dense"], channels=labels(m.cfg, s, 2, int(p["labels"] * m.cfg.H)))),
    "TokenSelect": (4096, (0,), TWO, 0, lambda m, s, p: reading.TokenSelect(m, s, 2048, sinks=128, recent=512, cosine=0.9)),
    "Kascade": (2048, (2, 3), ONE, 0, lambda m, s, p: reading.Kascade(
        m, s, far(p, rows=max(ceil(0.1 * 2048), 128)), recent=1, dense=p["dense"], select=p["select"], heads=[(0,)] * 6)),
    "InfLLM": (8192, (0,), SMALL, ALL, lambda m, s, p: reading.InfLLM(m, s, 16, size=128, count=4, sinks=128, recent=4096)),
    "SentenceKV": (4096, (0,), ONE, 32, split),
    "HiP": (8192, (4,), ONE, 0, lambda m, s, p: reading.HiP(
        m, s, 256, size=8, recent=1024, sinks=256, start=256, every=8, dense=p["dense"])),
    "LServe": (8192, (0,), ONE, 0, lambda m, s, p: reading.LServe(
        m, s, far(p, 64), size=64, recent=256, sinks=128, logical=16, every=4)),
    "RecycledAttention": (2048, (0,), TWO, 0, lambda m, s, p: reading.Recycled(m, s, 256 - 10, recent=10, every=10)),
    "ShadowKV": (4100, (0,), WIDE, 0, lambda m, s, p: selection.ShadowKV(m, s, 2048 // 8, 160, 8, 48, 4)),
    "KIVI": (600, (0,), LONG, 0, lambda m, s, p: quant.Kivi(m, s, 2, 32, 128)),
    "GEAR": (600, (0,), LONG, 0, lambda m, s, p: quant.Gear(m, s, 2, 64, 64, 4, 2, (1, 1), start)),
}  # fmt: skip


def test_every_reader_is_here():
    """Every listed policy that reads few of the rows that it holds, and the two that hold all of them in code."""
    listed = {m.name for m in settings.PUBLISHED if m.part == "kv" and m.budgeted_by == "read"}
    assert listed | {"KIVI", "GEAR"} == set(READ) | {"TopK", "TopP"} & listed


@pytest.mark.parametrize("name", tiny.sampled(READ, ("Quest", "KIVI")))
def test_paper_numbers_read_what_the_oracle_reads(name):
    S, at, cfg, asking, make = READ[name]
    paper = find(name).settings("paper") | ({"ends": ENDS} if name == "SentenceKV" else {})
    policy, ids = find(name).build(**paper), ids_of(S + STEPS)
    both = [given(cfg, S + STEPS, i) for i in at]
    rows = [prefilled(*(x[:S] for x in xs), ids[:S], needs=policy.needs(), layer=i, cfg=cfg) for i, xs in zip(at, both, strict=True)]
    layers = packed(rows, policy=policy, at=at, cfg=cfg)
    known = [seen(cfg, S, i, asking) if i in at else oracle.Seen() for i in range(max(at) + 1)]
    cache = make(settings.Bare(cfg), known, paper)
    for t in range(S, S + STEPS):
        now = [[x[t] for x in xs] for xs in both]
        outs, layers = token(layers, now, jnp.int32(t), jnp.int32(ids[t]), policy=policy, at=at, cfg=cfg)
        for i, one, out in zip(at, now, outs, strict=True):
            wanted = cache.attend(i, *(x.astype(np.float64) for x in one), t)
            np.testing.assert_allclose(out, wanted, atol=2e-4, err_msg=f"layer {i}, row {t}")


@pytest.mark.proof
def test_paper_budgets_of_layers_keep_the_oracles_rows():
    """CompressKV where its layers differ: 32 rows each and their importance of the rest, one of them cut at three times the mean."""
    cfg, S = Config("random rows", V=8, D=8, F=8, L=4, N=4, K=2, H=8, max_len=1 << 17), 2048
    given = {"judges": ((0,), (1, 2), (3,), (0, 3)), "importance": (0.85, 0.1, 0.04, 0.01)}
    paper = find("CompressKV").settings("paper") | given
    policy = find("CompressKV").build(**paper)
    policy.check(cfg, S)
    layers = pack(policy, tuple(settings.rows(4, S, policy.needs(), (), cfg)), Room(0), cfg)
    cache = scores.CompressKV(
        settings.Bare(cfg), [settings.seen(cfg, S, 8, i) for i in range(4)], 256, 8, 5, paper["judges"], paper["importance"], 32
    )
    kept = [[sorted(int(o) for o in head if o >= 0) for head in np.asarray(policy.kept(layer))[0]] for layer in layers]
    assert kept == [[cache.kept(i, head) for head in range(2)] for i in range(4)]
    assert [len(heads[0]) for heads in kept] == [768, 32 + 89, 32 + 35, 32 + 8]


def test_kvzip_tells_pieces_of_2048_again(monkeypatch):
    """Which tokens are said, behind the last 8 of the piece before, and about which rows; the second text ends inside a piece."""
    said = []

    def spy(params, cfg, tokens_BT, length_B, *, evidence, after, dtype, embeds):
        (told,) = after.layers[0].evidence_BKS.values()
        said.append((np.asarray(tokens_BT), length_B.tolist(), told.lo_B.tolist(), told.hi_B.tolist()))
        return after

    monkeypatch.setattr(retell, "prefill", spy)
    kind = find("KVzip").build(**find("KVzip").settings("paper")).rule.score.told
    tokens, length = np.random.default_rng(0).integers(0, 50, (2, 5000)).astype(np.int32), jnp.asarray([5000, 3000])
    rows = blank(ONE, 2, length, "float32")[0]
    order = jnp.broadcast_to(jnp.arange(5000), (2, 1, 5000))
    rows = rows.replace(k_BKSH=jnp.zeros((2, 1, 5000, 8)), order_BKS=order, evidence_BKS={kind: jnp.zeros((2, 1, 5000))})
    kind.revisit(None, ONE, Prompt((rows,), tokens, length, length, jnp.zeros((2, 50))), jnp.asarray(tokens), length, "float32")
    starts = [(0, 2048), (2040, 4096), (4088, 5000)]
    assert [one[1] for one in said] == [[2048, 2048], [2056, 3000 - 2040], [912, 0]]
    for (a, b), (words, _, lo, hi) in zip(starts, said, strict=True):
        np.testing.assert_array_equal(words, tokens[:, a:b])
        assert lo == [a + 8 if a else 0] * 2 and hi == [b] * 2
