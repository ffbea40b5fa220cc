"""Pictures in a prompt: rows that enter as vectors, rows left out, and methods before, in and behind the decoder in one generation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pictures
import pytest
import tiny
import tokenizers
from dense import Causal
from oracles import tower

from tokeff import sharding
from tokeff.decode.methods import token_recycling
from tokeff.generation import Setup, go, new_tokens, start
from tokeff.kv import methods as kv
from tokeff.kv.evidence import Ask
from tokeff.kv.prefill import Embeds, prefill
from tokeff.kv.retell import Retold
from tokeff.models.flow import EMPTY
from tokeff.models.llava import Llava, LlavaParams, Pixels, generate, mixed, picture_rows, prepare, read, see
from tokeff.models.pixels import Preprocessing
from tokeff.models.tokenizer import Tokenizer
from tokeff.models.transformer import embed, orders, stack, unembed
from tokeff.models.vit import encode
from tokeff.models.vit_config import AttentionPool, ViTBlock, ViTParams
from tokeff.reduce.merge import ToMe, schedule
from tokeff.reduce.methods import fastv, promptdistill, pyramiddrop, sparsevlm
from tokeff.reduce.visual import DivPrune, FasterVLM
from tokeff.reduce.visual_baselines import PooledPatches
from tokeff.reduce.visual_merge import VisionZip
from tokeff.sharding import letters
from tokeff.sparse.methods import quest, tri_shape

pytestmark = pytest.mark.core
IMAGE, TOWER = pictures.IMAGE, pictures.TOWER


def model() -> Llava:
    """The tests' tiny decoder behind a tiny CLIP tower."""
    return pictures.llava()


def asked():
    """(prompts with one image token each, their pictures)."""
    rng = np.random.default_rng(2)
    ids = [[t % 60 for t in tiny.prompts()[b][:n]] for b, n in ((0, 20), (1, 15))]
    pictures = [[Pixels(rng.normal(size=(1, 24, 24, 3)).astype(np.float32))] for _ in ids]
    return [[*row[:4], IMAGE, *row[4:]] for row in ids], pictures


def written(setup, new=12, v=None, **options) -> list[list[int]]:
    """The tokens of one generation."""
    v, (ids, pictures) = v or model(), asked()
    prompt = read(v, ids, pictures, setup, new, **options)
    return new_tokens(go(v.text, start(v.text, prompt, setup, new), setup, new, ()))


def test_vectors_of_tokens_are_tokens():
    """Rows given as the tokens' own embeddings, with or without their places, leave what the tokens leave."""
    tokens, length = tiny.padded(tiny.prompts())
    wanted = (Ask(last=6), Retold(piece=40, ask=(3, 5)))
    known = prefill(tiny.params(), tiny.CFG, tokens, length, evidence=wanted)
    order = orders(length, tokens.shape[1])
    x = embed(tiny.params(), tiny.CFG, tokens, order).x_BTD
    for embeds, some in ((Embeds(x), wanted), (Embeds(x, order), wanted[:1])):
        got = prefill(tiny.params(), tiny.CFG, tokens, length, evidence=some, embeds=embeds)
        same = known.replace(layers=tuple(rows.replace(evidence_BKS={a: rows.evidence_BKS[a] for a in some}) for rows in known.layers))
        assert jax.tree.structure(got) == jax.tree.structure(same)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(same), strict=True):
            np.testing.assert_array_equal(a, b)


def test_rows_left_out_are_rows_not_seen():
    """Rows that keep their places read what they would read if the others were masked; renumbered they do not."""
    v, (ids, pictures) = model(), asked()
    left = [[picture_rows(v, p, FasterVLM(9)) for p in some] for some in pictures]
    texts, tokens, length, embeds = mixed(v, ids, left, "kept")
    assert [len(t) for t in texts] == [20 + 36, 15 + 36] and embeds.place_BM is not None
    order = np.full(tokens.shape, EMPTY, np.int32)
    x = np.array(embed(v.text.params, v.text.cfg, tokens, orders(length, tokens.shape[1])).x_BTD)
    for b, places in enumerate(np.asarray(embeds.place_BM)):
        real = places[places != EMPTY]
        order[b, real], x[b, real] = real, np.asarray(embeds.x_BMD)[b, : len(real)]
        assert len(real) == len(ids[b]) - 1 + 9
    flow = embed(v.text.params, v.text.cfg, tokens, jnp.asarray(order)).replace(x_BTD=jnp.asarray(x))
    flow, *_ = stack(v.text.params, v.text.cfg, flow, (None,) * v.text.cfg.L, policy=Causal())
    known = np.asarray(unembed(v.text.params, v.text.cfg, flow.x_BTD))[np.arange(2), np.asarray(length) - 1]
    kept, renumbered = (
        read(v, ids, pictures, Setup(), 1, reduce=FasterVLM(9), positions=positions) for positions in ("kept", "renumbered")
    )
    np.testing.assert_allclose(kept.logits_BV, known, atol=1e-4)
    assert np.abs(np.asarray(renumbered.logits_BV) - known).max() > 1e-2
    assert kept.next_B.tolist() == [56, 51] and renumbered.next_B.tolist() == [29, 24]


def test_policies_hold_rows_with_gaps():
    """What enters is what can be kept: no row that was left out, none twice, and the newest one always."""
    v, (ids, pictures) = model(), asked()
    prompt = read(v, ids, pictures, Setup(kv.h2o(0.5)), 2, reduce=FasterVLM(9), positions="kept")
    there = [set(heads[0]) for heads in tiny.kept(tiny.FULL, tiny.packed(tiny.FULL, prompt)[0])]
    assert [len(rows) for rows in there] == [29, 24]
    for policy in (kv.h2o(0.5), kv.streaming_llm(0.5), quest(0.5, 4, (0,), 8)):
        for t, (logits, layers) in enumerate(tiny.forced(policy, tiny.packed(policy, prompt), prompt, [[3, 5], [7, 9]])):
            assert np.isfinite(logits).all()
            for rows, heads in zip(there, tiny.kept(policy, layers[-1]), strict=True):
                last = max(rows) + 1 + t
                for held in heads:
                    assert held[-1] == last and len(set(held)) == len(held) and set(held) <= rows | set(range(last - t, last + 1))


@pytest.mark.parametrize(("reduce", "positions"), [(FasterVLM(12), "kept"), (VisionZip(8, 4), "renumbered"), (None, "renumbered")])
def test_reduction_eviction_and_drafts_in_one_generation(reduce, positions):
    """Fewer rows of a picture, SnapKV's rows of the prompt, and Token Recycling's drafts: the text of the same without drafts."""
    few = kv.snapkv(0.5, 6)
    plain = written(Setup(few), reduce=reduce, positions=positions)
    assert written(Setup(few, decode=token_recycling(tree=tiny.TREE)), reduce=reduce, positions=positions) == plain
    assert [len(row) for row in plain] == [12, 12]


@pytest.mark.parametrize(
    ("cut", "left"), [(fastv(0.3, layer=1), (11, 11)), (pyramiddrop(at=(1, 2)), (18, 9)), (sparsevlm((0.3,), (1,)), (12, 12))],
    ids=["FastV", "PyramidDrop", "SparseVLM"],
)  # fmt: skip
def test_picture_rows_that_go_on_the_way_up(cut, left):
    """Fewer rows of a picture in the layers above, SnapKV's rows of what each layer holds, and Token Recycling's drafts: the text of the
    same without drafts, in one batch of two pictures."""
    few, (v, (ids, pictures)) = kv.snapkv(0.5, 6), (model(), asked())
    plain = written(Setup(few, cut))
    assert written(Setup(few, cut, decode=token_recycling(tree=tiny.TREE))) == plain != written(Setup(few))
    prompt = read(v, ids, pictures, Setup(few, cut), 12)
    rows = [layer.here_B.tolist() for layer in prompt.layers]
    assert rows == [[56, 51], [20 + left[0], 15 + left[0]], [20 + left[1], 15 + left[1]]]
    held = [tiny.kept(few, layer)[0][0] for layer in tiny.packed(few, prompt)]
    assert [len(orders) for orders in held] == [-(-layer[0] // 2) for layer in rows]


def test_a_pass_above_reduction():
    """PromptDistill ranks what is left of the picture and the text; DivPrune works behind the projector."""
    assert [len(row) for row in written(Setup(kv.snapkv(0.5, 6), promptdistill(0.5, 1)), reduce=DivPrune(12), positions="kept")] == [12, 12]


def test_reduction_compiles():
    v, pixels = model(), asked()[1][0][0].crops_BYXC
    for reduce in (FasterVLM(9), PooledPatches((3, 3))):
        got = jax.jit(lambda x, reduce=reduce: see(v, x, reduce))(pixels)
        known = see(v, jnp.asarray(pixels), reduce)
        np.testing.assert_array_equal(got.place_BM, known.place_BM)
        np.testing.assert_allclose(got.x_BMD, known.x_BMD, atol=1e-5)


def test_merging_inside_the_tower():
    """ToMe takes rows away layer by layer, and a row draws attention for all that it stands for; none taken is the tower itself, and sizes
    always add up to the rows there were."""
    v, pixels = model(), asked()[1][0][0].crops_BYXC
    whole = encode(v.params.tower, TOWER, pixels)
    nothing = encode(v.params.tower, TOWER, pixels, reduce=ToMe(), drop=(0, 0, 0))
    np.testing.assert_allclose(nothing.x_BSD, whole.x_BSD, atol=1e-5)
    drop = schedule(TOWER.S, TOWER.L, 5, 1)
    got = encode(v.params.tower, TOWER, pixels, reduce=ToMe(), drop=drop)
    assert got.x_BSD.shape[1] == TOWER.S - 15 and float(got.size_BS.sum()) == TOWER.S and float(got.size_BS[0, 0]) == 1
    assert np.bincount(np.asarray(got.source_BS[0]), minlength=TOWER.S - 15).tolist() == np.asarray(got.size_BS[0]).astype(int).tolist()
    rows, sizes = tower.merged(v.params.tower, TOWER, pixels[0], drop)
    np.testing.assert_allclose(got.x_BSD[0], rows, atol=1e-4)
    assert got.size_BS[0].tolist() == sizes
    once, _ = tower.merged(v.params.tower, TOWER, pixels[0], drop, sized=False)
    assert np.abs(once - rows).max() > 1e-2  # what sizes are worth in the layers above a merge


def test_what_cannot_work_is_refused_in_one_line(one_line):
    v, (ids, pictures) = model(), asked()
    for setup, options, word in (
        (Setup(bounded=8), {}, "bounded"), (Setup(), {"reduce": VisionZip(8, 4), "positions": "kept"}, "renumbered"),
        (Setup(), {"positions": "new"}, "positions"), (Setup(), {"reduce": FasterVLM(99)}, "budget"),
        (Setup(kv.kvzip(0.5)), {"reduce": FasterVLM(9), "positions": "kept"}, "renumber"),
        (Setup(prefill=kv.cacheblend(16, dense=4)), {}, "every token"),
        (Setup(prefill=tri_shape()), {"reduce": FasterVLM(9), "positions": "kept"}, "renumber"),
    ):  # fmt: skip
        with one_line(word):
            read(v, ids, pictures, setup, 4, **options)
    with one_line("image tokens"):
        read(v, [ids[0][5:], ids[1]], pictures, Setup(), 4)
    with one_line("one crop"):
        picture_rows(v, Pixels(np.zeros((2, 24, 24, 3), np.float32)))
    with one_line("images of"):
        picture_rows(v, Pixels(np.zeros((1, 20, 24, 3), np.float32)))


def test_mistakes_are_told_before_a_tower_runs(one_line, monkeypatch):
    v, (ids, pictures) = model(), asked()
    monkeypatch.setattr("tokeff.models.llava.picture_rows", None)
    for setup, options, word in (
        (Setup(cut="fastv"), {}, "pass"), (Setup(kv="h2o"), {}, "Policy"), (Setup(cut=fastv), {}, "pass"),
        (Setup(cut=fastv(layer=9)), {}, "layers"), (Setup(cut=promptdistill(0.5, 30)), {}, "layers"),
        (None, {"reduce": "FasterVLM"}, "reduce"), (None, {"reduce": FasterVLM}, "reduce"), (None, {"max_new": 0}, "max_new"),
        ("fastv", {}, "Setup"), (Setup(cut=fastv(0)), {}, "budget 0 rows"), (Setup(cut=fastv(-3)), {}, "budget -3 rows"),
        (Setup(cut=pyramiddrop(0.0)), {}, "share"), (Setup(cut=promptdistill(-0.5, 1)), {}, "share"),
        (Setup(), {"max_new": 300}, "reads 256"),
    ):  # fmt: skip
        with one_line(word):
            generate(v, ids, pictures, setup=setup, **options)
        if isinstance(setup, Setup) and not options:
            with one_line(word):
                read(v, ids, pictures, setup, 4)
    bad = Pixels(np.zeros((2, 24, 24, 3), np.float32))
    for some, word in (([pictures[0], [bad]], "one crop"), ([pictures[0], []], "image tokens")):
        with one_line(word):
            read(v, ids, some, Setup(), 4, reduce=FasterVLM(9))
    many = [[*[IMAGE] * 9, *ids[0][:4]], ids[1]]
    for options, word in (
        ({}, "or reduce them"), ({"reduce": FasterVLM(9), "positions": "kept"}, "positions='renumbered'"),
        ({"reduce": FasterVLM(30)}, "at least 274 rows"),
    ):  # fmt: skip
        with one_line("prompt 0 has", word):
            read(v, many, [pictures[0] * 9, pictures[1]], Setup(), 4, **options)


def test_every_array_is_named_by_its_letters():
    """So that the sharding table lays towers out too."""
    for kind in (ViTBlock, AttentionPool, ViTParams, LlavaParams):
        for f in dataclasses.fields(kind):
            assert letters(f.name) or f.name in ("blocks", "pool", "tower", "side"), f.name


def test_two_pictures_and_none():
    """Prompts of a batch may have different numbers of pictures; one without any reads what its tokens read."""
    v, (ids, pictures) = model(), asked()
    two, none = [*ids[0][:9], IMAGE, *ids[0][9:]], [t for t in ids[1] if t != IMAGE]
    seen = [[picture_rows(v, p, FasterVLM(9)) for p in (pictures[0][0], pictures[1][0])], []]
    texts, tokens, length, embeds = mixed(v, [two, none], seen)
    assert [len(text) for text in texts] == [20 + 18, 15] and texts[1] == none and embeds.place_BM is None
    np.testing.assert_array_equal(embeds.x_BMD[0, 4:13], seen[0][0].x_MD)
    np.testing.assert_array_equal(embeds.x_BMD[0, 17:26], seen[0][1].x_MD)
    got = prefill(tiny.params(), tiny.CFG, tokens, length, embeds=embeds)
    known = prefill(tiny.params(), tiny.CFG, tokens, length)
    np.testing.assert_array_equal(got.logits_BV[1], known.logits_BV[1])


def test_a_picture_is_prepared_as_its_model_says(one_line):
    """One crop, or a thumbnail and the crops of its canvas with the picture's own size."""
    v, given = model(), np.zeros((30, 47, 3), np.uint8)
    with one_line("preprocessor_config.json"):
        prepare(v, given)
    v = dataclasses.replace(v, preprocessing=Preprocessing(exact=(24, 24)))
    assert prepare(v, given).crops_BYXC.shape == (1, 24, 24, 3)
    large = dataclasses.replace(v, cfg=dataclasses.replace(v.cfg, canvases=((24, 48), (48, 48))))
    pixels = prepare(large, given)
    assert pixels.crops_BYXC.shape == (5, 24, 24, 3) and pixels.size == (30, 47)


BEFORE, INSIDE = {"reduce": FasterVLM(12), "positions": "kept"}, fastv(0.3, layer=1)
PLACED = {"before the decoder": (None, BEFORE), "inside it": (INSIDE, {}), "both": (INSIDE, BEFORE)}


@pytest.mark.parametrize("where", tiny.sampled(PLACED, ["before the decoder", "inside it"]))
def test_pictures_on_a_mesh(where):
    """Fewer rows of a picture, SnapKV and Token Recycling on four devices: rows of pictures lie where the tokens beside them lie, what is
    read is the same, and so is every token that is written."""
    v, (ids, pictures), (cut, options) = model(), asked(), PLACED[where]
    setup = Setup(kv.snapkv(0.5, 6), cut, token_recycling(tree=tiny.TREE))
    there = dataclasses.replace(v, text=sharding.place(v.text, sharding.mesh(2, 2)))
    got, known = (read(m, ids, pictures, setup, 12, **options) for m in (there, v))
    assert "data" in got.layers[-1].k_BKSH.sharding.spec and "model" in got.layers[-1].k_BKSH.sharding.spec
    np.testing.assert_allclose(got.logits_BV, known.logits_BV, atol=1e-4)
    assert written(setup, v=there, **options) == written(setup, **options)


def test_generate_takes_text_and_pictures(one_line):
    """Words in, words out: the tokens of `read` and the loop."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(tiny.CFG.V)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    v, (ids, pictures) = model(), asked()
    v = dataclasses.replace(v, text=dataclasses.replace(v.text, tokenizer=Tokenizer(words, tiny.CFG.V)))
    texts, setup = [" ".join(f"w{t}" for t in row) for row in ids], Setup(kv.snapkv(0.5, 6))
    out = generate(v, texts, pictures, setup=setup, reduce=FasterVLM(12), positions="kept", max_new=12, stop=False)
    assert out.tokens == written(setup, reduce=FasterVLM(12), positions="kept")
    assert out.texts[0] == " ".join(f"w{t}" for t in out.tokens[0])
    with one_line("one list for each prompt"):
        generate(v, texts, pictures[:1])
