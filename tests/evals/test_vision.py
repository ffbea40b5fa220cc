"""Accuracy on pictures: a batch's one program says what the model says, picture by picture; and what is released is as good as told."""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from tokeff.data import digits
from tokeff.data.canvases import SIDE, WORDS, make
from tokeff.data.digits import Material
from tokeff.data.drawing import photographs
from tokeff.errors import UserError
from tokeff.evals import vision
from tokeff.evals.stats import proportion
from tokeff.evals.vision import (
    answer_logits,
    asked,
    close,
    directions,
    labels,
    normal,
    picture_vectors,
    right,
    rows_of,
    score_llava,
    score_vit,
)
from tokeff.generation import Setup
from tokeff.models.config import Config, Precision
from tokeff.models.fetch import cache_dir
from tokeff.models.fresh import fresh_decoder, fresh_projector, fresh_vit
from tokeff.models.llava import generate, read
from tokeff.models.llava_hf import load_llava
from tokeff.models.llava_rows import Llava, LlavaConfig, Pixels
from tokeff.models.load import Model
from tokeff.models.pixels import HALF, Preprocessing
from tokeff.models.presets import IMAGES
from tokeff.models.tokenizer import Tokenizer
from tokeff.models.vision_save import save_llava, save_vit
from tokeff.models.vit import classify, encode, finish, pool
from tokeff.models.vit_config import ViTConfig
from tokeff.models.vit_hf import ImageModel, load_vit
from tokeff.reduce.merge import ToMe
from tokeff.reduce.video import DyCoke
from tokeff.reduce.visual import DivPrune, FasterVLM
from tokeff.reduce.visual_baselines import PooledPatches, RandomPatches
from tokeff.reduce.visual_diverse import CDPruner
from tokeff.reduce.visual_merge import VisionZip

pytestmark = pytest.mark.core
ROOT = Path(__file__).parents[2]
TOWER = ViTConfig("tower", D=16, F=24, L=3, N=2, image=(SIDE, SIDE), patch=12, V=10, act="gelu_tanh", eps=1e-6)


@pytest.fixture(scope="module")
def stuff() -> Material:
    rng = np.random.default_rng(0)
    glyph = np.zeros((40, 28, 28), np.uint8)
    glyph[:, 5:23, 9:19] = rng.integers(150, 256, (40, 18, 10))
    return Material("test", glyph, np.arange(40) % 10, photographs([rng.integers(0, 256, (100, 100, 3), dtype=np.uint8)]))


@pytest.fixture(scope="module")
def tower() -> ImageModel:
    params = fresh_vit(TOWER, 0)
    head = jnp.asarray(np.random.default_rng(1).normal(size=(10, 16)), jnp.float32)
    return ImageModel(TOWER, params.replace(head_VD=head), Preprocessing(exact=TOWER.image, mean=HALF[0], std=HALF[1]), "tower")


@pytest.fixture(scope="module")
def llava(tower) -> Llava:
    words = ("<pad>", "<eos>", "<image>", "<video>", *WORDS)
    raw = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(list(words[:4]))
    text = Config("tiny", V=len(words), D=16, F=24, L=2, N=2, K=1, H=8, max_len=512, eos=(1,))
    canvases = ((SIDE, 2 * SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE))
    cfg = LlavaConfig(TOWER, 2, (1,), canvases=canvases, most=9, video=3)
    front = fresh_projector(cfg, tower.params.replace(head_VD=None, head_bias_V=None), 16, 3)
    tok = Tokenizer(raw, len(words), special={"pad_token": "<pad>"})
    return Llava(cfg, front, Model(text, fresh_decoder(text, 2), tok, Precision(), "tiny"), tower.preprocessing, "tiny")


def test_a_tower_labels_a_batch_as_it_labels_pictures_alone(tower, stuff):
    given = make("name", stuff, 7, 0)
    for reduce, drop in ((None, ()), (ToMe(), (9, 9, 9))):
        alone = [int(labels(tower.params, TOWER, given.pictures_BTYXC[b, :1], reduce, drop)[0]) for b in range(7)]
        got = score_vit(tower, given, reduce=reduce, drop=drop, batch=3)
        assert got.hits == tuple(a == int(b) for a, b in zip(alone, given.answers)) and got.rows == 50 - sum(drop)
        assert got.accuracy == proportion(got.hits) and got.seconds > 0
    assert tower.preprocessing is not None
    x = tower.preprocessing(list(given.pictures_BTYXC[:, 0]))
    np.testing.assert_allclose(x, normal(given.pictures_BTYXC[:, 0]), atol=1e-6)
    with pytest.raises(UserError, match="'count'"):
        score_vit(tower, make("count", stuff, 2, 0))


def logits(v, a, reduce=None, kept=False):
    about = directions(v, jnp.asarray(a.tokens_BS), jnp.asarray(a.answer_B))
    pictured = picture_vectors(v, a.task, jnp.asarray(a.crops_BTYXC), reduce, about)
    return answer_logits(v.text.params, v.text.cfg, pictured, a.tokens_BS, a.length_B, a.answer_B, a.marks, kept)


def pixels_of(task, a, b) -> list[Pixels]:
    """The pictures of one example, as `generate` gets them."""
    crops = np.asarray(normal(a.crops_BTYXC[b]))
    if task == "scan":
        return [Pixels(crops, (2 * SIDE, 2 * SIDE))]
    return [Pixels(crops, video=True)] if task == "motion" else [Pixels(x[None]) for x in crops]


@pytest.mark.parametrize(
    ("task", "reduce"),
    [
        *(("row", None), ("pair", CDPruner(7)), ("scan", RandomPatches(9)), ("motion", DyCoke())),
        *(pytest.param(*given, marks=pytest.mark.proof) for given in (
            ("scan", None), ("motion", None), ("pair", FasterVLM(9)), ("scan", VisionZip(6, 3)),
        )),
    ],
)  # fmt: skip
def test_what_stands_before_an_answer_is_what_generate_reads(llava, stuff, task, reduce):
    """Pictures, pairs, crops and frames: the same rows, so the same logits, as by the model's own way from a picture to a prompt."""
    given = make(task, stuff, 2, 1)
    a = asked(llava, given)
    got, ids, there = logits(llava, a, reduce)
    for b in range(2):
        text = a.tokens_BS[b, : a.answer_B[b]].tolist()
        assert llava.text.tok.encode(llava.text.tok.decode(text, special=True)) == text
        prompt = read(llava, [text], [pixels_of(task, a, b)], Setup(), 1, reduce=reduce)
        np.testing.assert_allclose(prompt.logits_BV[0], got[b, 0], atol=1e-4)
        assert llava.text.tok.decode(ids[b][there[b]]) == given.answers[b]
    if reduce is not None and reduce.placed:
        kept = logits(llava, a, reduce, kept=True)[0]
        for b in range(2):
            text = a.tokens_BS[b, : a.answer_B[b]].tolist()
            prompt = read(llava, [text], [pixels_of(task, a, b)], Setup(), 1, reduce=reduce, positions="kept")
            np.testing.assert_allclose(prompt.logits_BV[0], kept[b, 0], atol=1e-4)
        assert np.abs(kept - got).max() > 1e-3
    vectors = picture_vectors(llava, task, jnp.asarray(a.crops_BTYXC), reduce)
    assert rows_of(llava, task, a.crops_BTYXC.shape[1], reduce) == sum(x.x_BMD.shape[1] for x in vectors)


def test_an_answer_is_right_where_generate_writes_it(llava, stuff):
    given = make("row", stuff, 3, 5)
    a = asked(llava, given)
    prompts = [row[:n].tolist() for row, n in zip(a.tokens_BS, a.answer_B)]
    said = generate(llava, prompts, [pixels_of("row", a, b) for b in range(3)], max_new=6)
    tokens, length = a.tokens_BS.copy(), a.length_B.copy()
    for b, ids in enumerate(said.tokens):  # what the model itself writes is right, and anything else is not
        ids = list(ids)[:5]
        tokens[b, a.answer_B[b] : a.answer_B[b] + len(ids)] = ids
        length[b] = a.answer_B[b] + len(ids)
    tokens[2, a.answer_B[2]] += 1
    got = right(
        llava.params, llava.text.params, a.crops_BTYXC, tokens, length, a.answer_B,
        cfg=llava.cfg, text_cfg=llava.text.cfg, task="row", marks=a.marks, reduce=None,
    )  # fmt: skip
    hits, left = got
    assert hits.tolist() == [True, True, False] and left.tolist() == [50] * 3


def test_rows_that_are_gone_need_no_space(llava, stuff):
    """What a method leaves of a clip is the clip's own; side by side in less space it is the same prompt."""
    a = asked(llava, make("motion", stuff, 3, 1))
    (some,) = picture_vectors(llava, "motion", jnp.asarray(a.crops_BTYXC), DyCoke())
    given = a.tokens_BS, a.length_B, a.answer_B, a.marks
    most = int(some.real_BM.sum(axis=1).max())
    assert most < some.x_BMD.shape[1] * 0.7
    got = [answer_logits(llava.text.params, llava.text.cfg, [rows], *given)[0] for rows in (some, close(some, most))]
    np.testing.assert_allclose(*got, atol=1e-5)


def test_tasks_whose_pictures_are_alike_share_a_program(llava, stuff):
    before = vision._right._cache_size()
    for task in ("where", "count", "row"):
        score_llava(llava, make(task, stuff, 3, 2), reduce=FasterVLM(5), batch=3)
    assert vision._right._cache_size() == before + 1


def test_reduced_pictures(llava, stuff):
    """A full budget changes nothing; a batch is its examples; rows are counted."""
    for task in ("where", "pair"):
        given = make(task, stuff, 5, 2)
        a = asked(llava, given)
        np.testing.assert_allclose(logits(llava, a, RandomPatches(1.0))[0], logits(llava, a)[0], atol=1e-5)
        np.testing.assert_allclose(logits(llava, a, PooledPatches((7, 7)))[0], logits(llava, a)[0], atol=1e-5)
    for reduce, rows in ((FasterVLM(16), 16), (DivPrune(16), 16), (VisionZip(10, 6), 16), (PooledPatches((4, 4)), 16)):
        got = score_llava(llava, given, reduce=reduce, batch=2)
        assert got.rows == 2 * (rows + 1) and len(got.hits) == 5 and got.left == (got.rows,) * 5
        assert set(got.facts()) == {"accuracy", "low", "high", "n", "rows", "left", "seconds"}
    with pytest.raises(UserError, match="have no places of their own"):
        score_llava(llava, given, reduce=VisionZip(10, 6), positions="kept")
    with pytest.raises(UserError, match="budget"):
        score_llava(llava, given, reduce=FasterVLM(0))


def test_saved_folders_load_as_they_were(llava, tower, stuff, tmp_path):
    """Up to the rounding of their weights to float16."""
    m = load_vit(save_vit(tmp_path / "vit", tower, {"seed": 0}))
    assert m.cfg == replace(TOWER, name="vit") and m.preprocessing == tower.preprocessing
    x = normal(make("name", stuff, 2, 0).pictures_BTYXC[:, 0])
    rows = [finish(t.params, t.cfg, encode(t.params, t.cfg, x).x_BSD) for t in (tower, m)]
    ours, theirs = (classify(t.params, pool(t.params, t.cfg, x)) for t, x in zip((tower, m), rows))
    np.testing.assert_allclose(ours, theirs, atol=0.02)
    v = load_llava(save_llava(tmp_path / "llava", llava, {}))
    assert v.cfg == LlavaConfig(replace(TOWER, name="llava", V=0), 2, (1,), canvases=llava.cfg.canvases, most=9, video=3)
    assert v.text.cfg == replace(llava.text.cfg, name="llava", bos=v.text.cfg.bos)
    a = asked(llava, make("scan", stuff, 2, 0))
    np.testing.assert_allclose(logits(v, a)[0], logits(llava, a)[0], atol=0.05)


RELEASED = {"canvas-vit": "train_vit", "canvas-llava": "train_vlm"}


@pytest.mark.parametrize("name", RELEASED)
def test_what_is_released_scores_as_its_results_say(name):
    folder, results = ROOT / "checkpoints" / name, ROOT / "experiments" / "results" / f"{RELEASED[name]}.json"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; make it with experiments/{RELEASED[name]}.py")
    told = json.loads(results.read_text())["seeds"]["0"]
    assert all(told["held"].values()) and sum(f.stat().st_size for f in folder.iterdir()) < 5e6
    assert json.loads((folder / "config.json").read_text())["about"]["recipe"]["seed"] == 0
    if not all((cache_dir() / preset.folder / preset.member).exists() for preset in IMAGES.values()):
        pytest.skip("MNIST and the photographs are not in the cache; run `tokeff fetch mnist` and `tokeff fetch photographs`")
    test = digits.material("test")
    if name == "canvas-vit":
        got, said = score_vit(load_vit(folder), make("name", test, 80, 777), batch=40), told["test"]["full"]
    else:
        got, said = score_llava(load_llava(folder), make("where", test, 40, 777), batch=40), told["test"]["where"]["full"]
    wide = proportion(got.hits, 0.999)
    assert wide.low <= said["accuracy"] <= wide.high
