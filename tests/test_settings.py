"""Both named settings of every method: they are there, `paper` fits the models it was published for, and keeps the rows the paper keeps."""

from math import ceil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles import classes, merging, retelling, scores
from oracles import model as oracle
from oracles import policies as rules

from tokeff.context import from_json, to_json
from tokeff.errors import UserError
from tokeff.evals.comparison import line
from tokeff.kv import methods as kv
from tokeff.kv.budget import AtLeast, most_rows, rows_of
from tokeff.kv.cache import Room
from tokeff.kv.extend import pack
from tokeff.kv.keep import Keep
from tokeff.kv.prefill import Gather, blank
from tokeff.kv.score import Recency
from tokeff.listing import METHODS, SETTINGS, find
from tokeff.models.config import Config, Params, Precision
from tokeff.models.flow import Flow, Here
from tokeff.models.load import Model

pytestmark = pytest.mark.core
LLAMA = Config("like Llama-3.1-8B", V=128_256, D=4096, F=14_336, L=32, N=32, K=8, H=128, max_len=131_072, tied=False)
PUBLISHED = [method for method in METHODS if method.family != "baseline" and method.bare]
NAMES = [method.name for method in PUBLISHED]


@pytest.mark.parametrize("name", NAMES)
def test_both_settings_are_complete(name):
    """`scaled` are the defaults; `paper` has the same parameters, with the published numbers in place of some."""
    method = find(name)
    assert method.published is not None, "tell tokeff/published.py what the paper's numbers are"
    scaled, paper = (method.settings(setting) for setting in SETTINGS)
    assert method.build(**scaled) == method.make()
    assert list(paper) == list(scaled) and {k: paper[k] for k in method.published} == method.published


def test_baselines_have_no_paper_and_other_names_are_refused():
    for method in METHODS:
        if method.family == "baseline":
            with pytest.raises(UserError, match="scaled"):
                method.settings("paper")
    with pytest.raises(UserError, match="did you mean 'paper'"):
        find("SnapKV").settings("papers")


def check(method, part, length):
    llama = Model(LLAMA, Params(None, (), None), None, Precision(), LLAMA.name)
    part.check(llama) if method.part == "decode" else part.check(LLAMA, length)


def numbered(budget) -> int:
    """How many rows a prompt must have for a budget that is a number."""
    return budget.rows if isinstance(budget, AtLeast) else budget if isinstance(budget, int) else 0


@pytest.mark.parametrize("name", NAMES)
def test_paper_settings_fit_long_prompts_and_are_refused_on_short_ones(name):
    method = find(name)
    paper = method.settings("paper")
    part = method.build(**paper)
    check(method, part, 32_768)
    if numbered(paper.get("budget")) <= 2048:
        return check(method, part, 2048)
    with pytest.raises(UserError, match="budget") as refused:
        check(method, part, 2048)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_saved_choices_are_found_again(name):
    part = find(name).build(**find(name).settings("paper"))
    assert from_json(to_json(part)) == part


def test_lines_take_a_setting():
    assert line("SnapKV").kv == kv.snapkv()
    assert line("SnapKV", "paper").kv == kv.snapkv(1024, 32, 7, "max")
    assert line("SnapKV", "paper", budget=0.25).kv == kv.snapkv(0.25, 32, 7, "max")
    with pytest.raises(UserError, match="no settings named"):
        line("SnapKV", "published")


@pytest.mark.parametrize(("share", "rows", "length", "most"), [(0.2, 4000, 32_768, 6554), (0.2, 4000, 8000, 4000), (0.5, 3, 5, 3)])
def test_the_larger_of_a_share_and_a_number(share, rows, length, most):
    budget = AtLeast(share, rows)
    assert most_rows(budget, length) == most == int(rows_of(budget, jnp.array([length]))[0])


@pytest.mark.parametrize("share", [0.1, 0.125, 0.3, 1 / 3, 0.5, 0.9])
def test_shares_are_rounded_up(share):
    for n in (1, 7, 10, 63, 64, 1000):
        assert most_rows(share, n) == max(1, ceil(round(share * n, 9))) == int(rows_of(share, jnp.array([n]))[0])


def test_sinks_as_a_share_of_the_budget():
    """Rounded down: 3 of 7."""
    policy = Keep(7, Recency(), sinks=0.5)
    policy.check(LLAMA, 20)
    layer = pack(policy, tuple(rows(1, 20, (), ())), Room(0), TINY[1])[0]
    assert sorted(np.asarray(policy.kept(layer))[0, 0].tolist()) == [-1, 0, 1, 2, 16, 17, 18, 19]
    with pytest.raises(UserError, match="exceed"):
        Keep(7, Recency(), sinks=0.6, recent=4).check(LLAMA, 20)


# -- what the published numbers keep of thousands of random rows

TINY = {L: Config("random rows", V=8, D=8, F=8, L=L, N=2, K=1, H=8, max_len=1 << 17) for L in (1, 2, 3)}
TWO = Config("random rows", V=8, D=8, F=8, L=1, N=4, K=2, H=8, max_len=1 << 17)


class Bare(oracle.Model):
    """The oracle's formulas of attention, without weights."""

    def __init__(self, cfg):
        self.cfg, self.G = cfg, cfg.N // cfg.K


class Row:
    """Probabilities of one query over the rows up to its own."""

    def __init__(self, p):
        self.p = p

    def get(self, order, default):
        return float(self.p[order]) if order < len(self.p) else default


def given(cfg, S, seed=0):
    """Random (q_SNH, k_SKH, v_SKH) before rotation. Keys of unequal lengths: attention is neither flat nor one row's."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((S, heads, cfg.H)) for heads in (cfg.N, cfg.K, cfg.K))
    return q.astype(np.float32), (k * rng.uniform(0.5, 2, (S, cfg.K, 1))).astype(np.float32), v.astype(np.float32)


def turned(cfg, x_SxH):
    """Rows at their places: pairs (x_i, x_{i + H/2}) turned by place * base**(-2i/H)."""
    half = cfg.H // 2
    angle = np.arange(len(x_SxH))[:, None] * cfg.rope.base ** (-2 * np.arange(half) / cfg.H)
    cos, sin, a, b = np.cos(angle)[:, None], np.sin(angle)[:, None], x_SxH[..., :half], x_SxH[..., half:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def seen(cfg, S, asking, seed):
    """What the oracle's prefill would have seen, with the probabilities of the last `asking` queries."""
    q, k, v = (x.astype(np.float64) for x in given(cfg, S, seed))
    queries, keys, by_order = turned(cfg, q), turned(cfg, k), lambda x: dict(enumerate(x))
    A = []
    for n in range(cfg.N):
        logits = {a: keys[: a + 1, n // (cfg.N // cfg.K)] @ queries[a, n] * cfg.scale for a in range(max(S - asking, 0), S)}
        weights = {a: np.exp(x - x.max()) for a, x in logits.items()}
        A.append({a: Row(w / w.sum()) for a, w in weights.items()})
    return oracle.Seen(list(range(S)), by_order(q), by_order(k), by_order(v), by_order(keys), A)


def rows(L, S, needs, told, cfg=None):
    """tokeff's prefill of the same rows, with the evidence that is needed; told: {evidence: what a second pass found}."""
    cfg = cfg or TINY[L]
    order = jnp.arange(S, dtype=jnp.int32)[None]
    flow = Flow(jnp.zeros((1, S, cfg.D)), order, order, order)
    for i, layer in enumerate(blank(cfg, 1, jnp.array([S]), "float32")):
        (q, k, v), here = (jnp.asarray(x)[None] for x in given(cfg, S, i)), Here(i, cfg)
        if needs:
            layer = Gather(tuple(needs)).attend(q, k, v, flow, flow, layer, None, None, here)[1]
        else:  # no query is asked
            k = here.rotate(k, order[..., None])
            layer = layer.replace(k_BKSH=k.swapaxes(1, 2), v_BKSH=v.swapaxes(1, 2), order_BKS=order[:, None])
        yield layer.replace(evidence_BKS=layer.evidence_BKS | {kind: x[i] for kind, x in dict(told).items()})


class Whole(rules.Given):
    """Layers that are spared keep everything."""

    def __init__(self, model, seen, rows, score, spared):
        self.spared = spared
        super().__init__(model, seen, rows, score)

    def first(self, layer, head, s):
        return s.orders if layer in self.spared else super().first(layer, head, s)


class Kept(rules.Cache):
    """The rows that a function names."""

    def __init__(self, model, seen, keep):
        self.keep = keep
        super().__init__(model, seen)

    def first(self, layer, head, s):
        return self.keep(layer, head, s)


def short_keys(seen):
    return lambda layer, head, order: -np.linalg.norm(seen[layer].k[order][head])


def snap(m, s, n, p):
    return rules.SnapKV(m, s, n, p["window"], p["kernel"], p["pool"])


def first_head(layer):
    return (0,)


FADE = 1024  # queries before these weigh less than 1e-20
ALL = 1 << 20
# name: (oracle(model, seen, rows, paper settings), how many last queries it asks, model)
KEPT = {
    "StreamingLLM": (lambda m, s, n, p: rules.StreamingLLM(m, s, n, p["sinks"]), 0, TINY[1]),
    "H2O": (lambda m, s, n, p: rules.H2O(m, s, n, int(p["recent"] * n)), ALL, TINY[1]),
    "LM-Infinite": (lambda m, s, n, p: rules.LMInfinite(m, s, n, p["sinks"], cap=p["cap"]), 0, TINY[1]),
    "TOVA": (lambda m, s, n, p: scores.TOVA(m, s, n), 1, TWO),
    "A2SF": (lambda m, s, n, p: scores.Faded(m, s, n, p["factor"], p["recent"]), FADE, TINY[1]),
    "ALISA": (lambda m, s, n, p: scores.Faded(m, s, n, 1 - 1 / p["steps"], int(p["recent"] * n)), FADE, TINY[1]),
    "Knorm": (lambda m, s, n, p: Whole(m, s, n, short_keys(s), p["spared"]), 0, TINY[3]),
    "KeyDiff": (lambda m, s, n, p: scores.KeyDiff(m, s, n, block=1), 0, TINY[1]),
    "LagKV": (lambda m, s, n, p: scores.LagKV(m, s, n, p["lag"], p["sinks"]), 0, TWO),
    "ExpectedAttention": (lambda m, s, n, p: scores.Expected(m, s, n, p["future"], p["sinks"], p["floor"]), 0, TINY[1]),
    "ChunkKV": (lambda m, s, n, p: scores.ChunkKV(m, s, n, p["window"], p["chunk"]), 16, TWO),
    "R-KV": (lambda m, s, n, p: scores.RKV(m, s, n, p["window"], p["weight"], p["evict"]), 256, TINY[1]),
    "SnapKV": (snap, 32, TWO),
    "PyramidKV": (lambda m, s, n, p: rules.PyramidKV(m, s, n, p["window"], p["kernel"], p["pool"], p["beta"]), 8, TINY[3]),
    "RazorAttention": (lambda m, s, n, p: classes.Razor(m, s, n, p["sinks"], first_head, lambda n: n), 0, TWO),
    "DuoAttention": (lambda m, s, n, p: classes.Classes(m, s, n, p["sinks"], first_head), 0, TWO),
    "CompressKV": (lambda m, s, n, p: scores.CompressKV(m, s, n, p["window"], p["kernel"], p["judges"], p["importance"]), 8, TWO),
    "KVzip": (lambda m, s, n, p: retelling.KVzip(m, s, n, p["sinks"], again(m.cfg, len(s[0].orders))), 0, TINY[2]),
    "AdaKV": (lambda m, s, n, p: rules.AdaKV(m, s, n, p["window"], p["kernel"], p["pool"], p["floor"]), 32, TWO),
    "CaM": (lambda m, s, n, p: rules.StreamingLLM(m, s, n, int(p["sinks"] * n)), 0, TINY[1]),
    "LOOK-M": (lambda m, s, n, p: rules.H2O(m, s, n, int(p["recent"] * n)), ALL, TINY[1]),
    "EMS": (lambda m, s, n, p: Kept(m, s, lambda layer, head, x: merging.ems_keep(m, x, head, n, p["window"], 5)), ALL, TINY[1]),
    "ThinK": (lambda m, s, n, p: snap(m, s, n, find("SnapKV").settings("paper")), 32, TWO),
}


def again(cfg, S):
    """(L, K, S): attention to each row when the text was told again, made up: that pass has oracles of its own."""
    return np.random.default_rng(7).random((cfg.L, cfg.K, S)).astype(np.float32)


def test_every_keeping_method_is_here():
    """Every listed policy that keeps some of the prompt's rows, by its budget in `held`."""
    kept = {m.name for m in PUBLISHED if m.part == "kv" and m.budgeted_by == "held"}
    assert kept <= set(KEPT)


QUICK = ("SnapKV", "KVzip", "CompressKV", "StreamingLLM", "Knorm", "DuoAttention", "ThinK")  # oracles of seconds


@pytest.mark.parametrize("name", tiny.sampled(KEPT, QUICK))
def test_paper_numbers_keep_the_oracles_rows(name):
    make, asking, cfg = KEPT[name]
    paper = find(name).settings("paper")
    policy, budget = find(name).build(**paper), paper.get("budget", 1024)
    S = max(1024 if asking == ALL else 4096, 2 * numbered(budget))  # every query over every row, by a naive oracle
    n = max(ceil(budget.share * S), budget.rows) if isinstance(budget, AtLeast) else ceil(budget * S) if budget < 1 else budget
    told = {kind: jnp.asarray(again(cfg, S))[:, None] for kind in policy.needs() if name == "KVzip"}
    layers = tuple(rows(cfg.L, S, policy.needs(), told.items(), cfg))
    policy.check(cfg, S)
    packed = pack(policy, layers, Room(0), cfg)
    cache = make(Bare(cfg), [seen(cfg, S, asking, i) for i in range(cfg.L)], n, paper)
    for i, layer in enumerate(packed):
        for head, orders in enumerate(np.asarray(policy.kept(layer))[0]):
            assert sorted(orders[orders >= 0].tolist()) == cache.kept(i, head), f"layer {i}, head {head}"
