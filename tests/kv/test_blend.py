"""Reused chunks and reused prompts against a float64 model that recomputes row by row; what is not chosen is not computed."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles import blending
from oracles import model as oracle

from tokeff.errors import UserError
from tokeff.generation import Setup, read
from tokeff.kv import blend as module
from tokeff.kv import methods as kv
from tokeff.kv.blend import Blend, blend, choose
from tokeff.kv.similar import Similar, align, reuse
from tokeff.models.config import Precision, Rope
from tokeff.models.flow import EMPTY
from tokeff.models.load import Model
from tokeff.reduce.methods import promptdistill

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("blend")]
ATOL = 5e-4
WINDOWED = dataclasses.replace(tiny.CFG, name="windowed", windows=(16, None, 16), local_rope=Rope(100.0))
YARN = dataclasses.replace(tiny.CFG, name="yarn", rope=Rope(100.0, "yarn", factor=4.0, original_len=32, attention_factor=1.2))


def model(cfg=tiny.CFG) -> Model:
    return Model(cfg, tiny.params(cfg), None, Precision(), "tiny")


def same(prompt, b: int, rows, logits) -> None:
    """Assert that sequence b holds these rows in every layer, and ends in these logits."""
    for i, layer in enumerate(prompt.layers):
        n = len(rows[i])
        assert np.asarray(layer.order_BKS)[b, 0].tolist()[:n] == list(range(n))
        for got, part in ((layer.k_BKSH, 0), (layer.v_BKSH, 1)):
            wanted = np.stack([rows[i][t][part] for t in range(n)], axis=1)
            np.testing.assert_allclose(np.asarray(got)[b, :, :n], wanted, atol=ATOL, err_msg=f"layer {i}")
    np.testing.assert_allclose(np.asarray(prompt.logits_BV)[b], logits, atol=ATOL)


def last(n: int, rows: int) -> set[int]:
    return set(range(n - rows, n))


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("cfg", [tiny.CFG, WINDOWED], ids=lambda cfg: cfg.name)
def test_blend_equals_its_oracle(cfg, layer):
    """Two prompts of unequal length in chunks of 16, the last of them not whole."""
    how, m = Blend(16, 4, 0.2, layer), oracle.Model(tiny.params(cfg), cfg)
    prompt = tiny.read(tiny.FULL, cfg=cfg, pattern=how)
    for b, tokens in enumerate(tiny.prompts()):
        sizes = [min(16, len(tokens) - a) for a in range(0, len(tokens), 16)]
        rows, logits, _ = blending.blend(m, tokens, blending.chunked(m, tokens, sizes), 0.2, layer, last(len(tokens), 4))
        same(prompt, b, rows, logits)


def test_given_chunks_equal_the_oracle():
    """Caches of three texts of unequal length, blended behind each other in two orders, with a question behind them."""
    m, o = model(), oracle.Model(tiny.params(), tiny.CFG)
    texts, question = (tiny.prompts()[0][:21], tiny.prompts()[1][:16], tiny.prompts()[0][40:49]), (5, 9, 2)
    caches = [read(m, [list(text)], Setup()) for text in texts]
    for at in ((0, 1, 2), (2, 0, 1)):
        prompt = blend(m, [caches[i] for i in at], question, Blend(dense=1, share=0.3))
        tokens = [t for i in at for t in texts[i]] + list(question)
        loaded = blending.chunked(o, tokens, [len(texts[i]) for i in at])
        rows, logits, _ = blending.blend(o, tokens, loaded, 0.3, 1, last(len(tokens), 3))
        same(prompt, 0, rows, logits)
        assert prompt.tokens_BT[0, : len(tokens)].tolist() == tokens and int(prompt.next_B[0]) == len(tokens)


def test_a_similar_prompt_equals_the_oracle():
    m, o, earlier = model(), oracle.Model(tiny.params(), tiny.CFG), tiny.EARLIER
    cache = read(m, [list(earlier)], Setup())
    for tokens in tiny.prompts():
        source = align(earlier, tokens, 4)
        sure = last(len(tokens), 4) | {t for t, a in enumerate(source) if a < 0}
        rows, logits, chosen = blending.blend(o, tokens, blending.taken(o, earlier, source), 0.2, 1, sure)
        assert len(chosen) < len(tokens)
        same(reuse(m, cache, tokens, Similar(4, 4, 0.2)), 0, rows, logits)


def test_alignment():
    """Equal tokens in ascending order, runs of at least the least length; the same as the text itself where nothing changed."""
    earlier, ids = [1, 2, 3, 4, 9, 9, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    assert align(earlier, ids, 1).tolist() == [0, 1, 2, 3, 6, 7, 8, 9, EMPTY, EMPTY]
    assert align(earlier, ids, 5).tolist() == [EMPTY] * 10
    assert align(ids, ids, 8).tolist() == list(range(10)) and align((), ids, 1).tolist() == [EMPTY] * 10
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 4, 40).tolist(), rng.integers(0, 4, 50).tolist()
        source = align(a, b, 3)
        taken = [t for t in range(50) if source[t] != EMPTY]
        assert all(a[source[t]] == b[t] for t in taken) and (np.diff(source[taken]) > 0).all()
        pairs = {(t, source[t]) for t in taken}
        starts = [(t, s) for t, s in pairs if (t - 1, s - 1) not in pairs]
        assert all({(t + i, s + i) for i in range(3)} <= pairs for t, s in starts)


@pytest.mark.parametrize("cfg", [tiny.CFG, WINDOWED, YARN], ids=lambda cfg: cfg.name)
def test_everything_recomputed_is_the_dense_prefill(cfg):
    dense = tiny.read(tiny.FULL, cfg=cfg)
    for how in (Blend(16, 1, 1.0), Similar(4, 1, 1.0, 1, tiny.EARLIER), Similar(4, 1, 0.0, 1, ())):
        prompt = tiny.read(tiny.FULL, cfg=cfg, pattern=how)
        np.testing.assert_allclose(prompt.logits_BV, dense.logits_BV, atol=1e-4)


@pytest.mark.parametrize("cfg", [tiny.CFG, YARN], ids=lambda cfg: cfg.name)
def test_a_single_chunk_needs_no_recomputation(cfg):
    """Where a chunk is the whole prompt, what is loaded is right, whatever is computed anew."""
    dense, prompt = tiny.read(tiny.FULL, cfg=cfg), tiny.read(tiny.FULL, cfg=cfg, pattern=Blend(64, 1, 0.0))
    np.testing.assert_allclose(prompt.logits_BV, dense.logits_BV, atol=1e-4)
    for got, want in zip(prompt.layers, dense.layers, strict=True):
        for b, n in enumerate(tiny.LENGTHS):
            np.testing.assert_allclose(got.k_BKSH[b, :, :n], want.k_BKSH[b, :, :n], atol=1e-4)


def test_a_shorter_share_computes_fewer_rows(monkeypatch):
    """Above the check layer every layer gets the chosen rows and no others."""
    sizes, layer = [], module.one_layer

    def counted(w, flow, *given, **named):
        sizes.append(flow.x_BTD.shape[1])
        return layer(w, flow, *given, **named)

    monkeypatch.setattr(module, "one_layer", counted)
    tiny.read(tiny.FULL, pattern=Blend(16, 4, 0.25))
    assert sizes == [4 + 16] * (tiny.CFG.L - 2)


def test_choice_counts_each_sequence_by_itself():
    d = jnp.asarray([[9.0, 1, 8, 2, 7, 0], [1.0, 9, 2, 0, 0, 0]])
    order = jnp.asarray([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, EMPTY, EMPTY]])
    sure = jnp.asarray([[False] * 5 + [True], [False, False, False, True, False, False]])
    assert choose(d, order, sure, 0.5, 4).tolist() == [[0, 2, 4, 5], [1, 2, 3, EMPTY]]
    assert choose(d, order, sure, 0.0, 4).tolist() == [[5, EMPTY, EMPTY, EMPTY], [3, EMPTY, EMPTY, EMPTY]]


def test_policies_pack_what_was_blended():
    """SnapKV asks the last 6 rows, which are always computed: where everything is, it keeps what it keeps of a dense prefill."""
    policy = kv.snapkv(0.5, 6)
    dense = tiny.text(tiny.go(tiny.start(tiny.read(policy), policy), policy))
    for share, same in ((1.0, True), (0.1, False)):
        prompt = tiny.read(policy, pattern=kv.cacheblend(16, share, dense=6))
        made = tiny.text(tiny.go(tiny.start(prompt, policy), policy))
        assert (made == dense) == same and all(len(row) == tiny.NEW for row in made)


BAD = {
    "every row's attention": dict(kv=kv.h2o(0.5), prefill=kv.cacheblend(16)),
    "a longer window": dict(kv=kv.snapkv(0.5, 6), prefill=kv.cacheblend(16, dense=5)),
    "a pass": dict(cut=promptdistill(0.5, 1), prefill=kv.cacheblend(16)),
    "share above 1": dict(prefill=kv.cacheblend(16, 1.5)),
    "layer 0": dict(prefill=kv.cacheblend(16, layer=0)),
    "no such layer": dict(prefill=kv.cacheblend(16, layer=9)),
    "no last row": dict(prefill=kv.cacheblend(16, dense=0)),
    "chunks of nothing": dict(prefill=kv.cacheblend(0)),
    "no such token": dict(prefill=kv.kvshare((1, 900))),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_are_refused_in_one_line(name):
    with pytest.raises(UserError) as error:
        Setup(**BAD[name]).check(model(), [64], 4)
    assert "\n" not in str(error.value)


def test_bad_arguments_of_the_functions():
    m = model()
    two, one = tiny.read(tiny.FULL), read(m, [[1, 2, 3]], Setup())
    for call in (lambda: blend(m, [one], ()), lambda: blend(m, [two], (1,)), lambda: reuse(m, one, ()), lambda: reuse(m, two, (1, 2))):
        with pytest.raises(UserError):
            call()
