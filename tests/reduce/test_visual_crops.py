"""Crops and frames in a prompt: what is left of them stands where it stood, and is read by the decoder under every other part."""

import jax
import jax.numpy as jnp
import numpy as np
import pictures
import pytest
import tiny

from tokeff.errors import UserError
from tokeff.generation import Setup, go, new_tokens, start
from tokeff.kv import methods as kv
from tokeff.models.flow import EMPTY
from tokeff.models.llava import Pixels, direction, mixed, picture_rows, read
from tokeff.models.llava_rows import canvas_of, least_rows, reduced, settled, standing
from tokeff.reduce.listing import find
from tokeff.reduce.video import DyCoke, FramePairs, HoliTom, StillRuns
from tokeff.reduce.visual import FasterVLM, Reduced
from tokeff.reduce.visual_baselines import PooledPatches, SmallerImage
from tokeff.reduce.visual_crops import GlobalCom2, HiRED
from tokeff.reduce.visual_diverse import CATP, ToDRE, VisPruner
from tokeff.reduce.visual_flow import VFlowOpt
from tokeff.reduce.visual_merge import AIM, VisionZip
from tokeff.reduce.visual_tower import FlowCut

NEXT = ((24, 48), (48, 24), (48, 48))
P = pictures.TOWER.patches
pytestmark = pytest.mark.core


def next_model():
    """Like LLaVA-NeXT: CLIP and crops."""
    return pictures.llava(NEXT)


def one_vision():
    """Like OneVision: SigLIP, crops and frames."""
    return pictures.llava(NEXT, 2, False)


def crops(n, size=None, video=False, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, 24, 24, 3)).astype(np.float32)
    return Pixels(x, size, video)


WIDE = crops(3, (24, 40))  # side by side on 24 x 48 pixels, a bar of one patch at either end
FILM = crops(6, video=True)


def prompt(mark):
    """A prompt with one image token."""
    row = [t % 58 for t in tiny.prompts()[0][:20]]
    return [*row[:4], mark, *row[4:]]


def written(v, ids, pixels, new=8, **options):
    """The tokens of one generation under SnapKV."""
    setup = Setup(kv.snapkv(0.5, 6))
    got = read(v, [ids], [[pixels]], setup, new, **options)
    return new_tokens(go(v.text, start(v.text, got, setup, new), setup, new, ()))[0]


def test_everything_is_the_untouched_model(subtests):
    """At the settings that are listed for it, a method leaves the rows of crops, of a single crop and of frames as they are, newlines
    too; but for those that give all newlines up. One method of each kind, and of each way with newlines; the listing has all."""
    v, film = next_model(), one_vision()
    cases = [(v, WIDE, name) for name in ("FasterVLM", "FlowCut", "HiRED", "GlobalCom2", "VisPruner", "CATP", "SmallerImage")]
    cases += [(v, crops(1), name) for name in ("FasterVLM", "GlobalCom2")]
    cases += [(film, FILM, name) for name in ("FasterVLM", "HoliTom", "DyCoke")]
    for v, pixels, name in cases:
        with subtests.test(name, crops=len(pixels.crops_BYXC), video=pixels.video):
            method, known = find(name).whole(v.cfg.tower), picture_rows(v, pixels)
            got, at = picture_rows(v, pixels, method), np.arange(known.whole)
            if method.newlines() == "none":
                at = np.setdiff1d(at, standing(v, pixels, canvas_of(v, pixels)).line_Y2[:, 1])
            assert got.whole == known.whole
            np.testing.assert_array_equal(got.place_M, at)
            np.testing.assert_allclose(got.x_MD, known.x_MD[at], atol=1e-5)


def test_what_is_left_stands_where_it_stood(subtests):
    """Rows that are dropped leave the others at their places in the laid-out picture, in order; lines end as each method says."""
    v = next_model()
    known = picture_rows(v, WIDE)
    lines = standing(v, WIDE, canvas_of(v, WIDE)).line_Y2
    for method in (FasterVLM(9), ToDRE(5), FlowCut(9), HiRED(0.2), HiRED(0.2, lines="used"), GlobalCom2(), VisPruner(8)):
        with subtests.test(repr(method)):
            got = picture_rows(v, WIDE, method)
            at = np.asarray(got.place_M)
            assert (np.diff(at) > 0).all() and got.whole == known.whole and len(at) < known.whole
            if not isinstance(method, FlowCut):  # which changes the rows
                np.testing.assert_allclose(got.x_MD, known.x_MD[at], atol=1e-5)
            ends = np.intersect1d(at, lines[:, 1])
            used = [end for first, end in lines if ((at >= first) & (at < end)).any()]
            assert ends.tolist() == {"none": [], "used": used, "all": lines[:, 1].tolist()}[method.newlines()]


def test_pictures_of_other_sizes_compile_nothing():
    """What does not look across crops is compiled for their number alone, HiRED for how they lie, GlobalCom2 once for each canvas."""
    v, many = next_model(), reduced._cache_size
    for method, more in ((ToDRE(5), 0), (GlobalCom2(0.3), 1), (HiRED(0.3), 0)):
        picture_rows(v, WIDE, method)
        before = many()
        picture_rows(v, crops(3, (24, 40), seed=5), method)
        assert many() == before
        picture_rows(v, crops(3, (24, 30)), method)
        assert many() == before + more


def test_other_numbers_of_rows_compile_nothing():
    """Of pictures of one size a method leaves 20 to 23 rows: what enters the decoder is made by the same programs."""
    v, rng, compiled = next_model(), np.random.default_rng(0), []
    stand = standing(v, WIDE, canvas_of(v, WIDE))
    x = jnp.asarray(rng.normal(size=(3, P, tiny.CFG.D)), jnp.float32)
    place = np.broadcast_to(np.arange(P), (3, P))

    def listen(name, *_, **__):
        if "backend_compile" in name:
            compiled.append(name)

    def entered(n):
        real = np.zeros(3 * P, bool)
        real[rng.choice(P, n, replace=False)] = True
        rows = settled(Reduced(x, place, real.reshape(3, P)), stand, v.params.newline_D, HiRED())
        _, _, length, embeds = mixed(v, [prompt(pictures.IMAGE)], [[rows]])
        assert length.tolist() == [20 + n]
        np.testing.assert_array_equal(np.asarray(embeds.x_BMD)[0, 4 : 4 + n], np.asarray(x)[0, rows.place_M])

    entered(20)
    jax.monitoring.register_event_duration_secs_listener(listen)
    for n in (21, 22, 23):
        entered(n)
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_budgets_of_crops():
    """HiRED and GlobalCom2 count rows over thumbnail and crops; bars cost HiRED's budget and not GlobalCom2's."""
    v, square = next_model(), crops(5, (48, 48))
    for share in (0.1, 0.3):
        got = picture_rows(v, square, HiRED(share))
        assert 0.8 * share * 5 * P <= len(got.x_MD) <= np.ceil(share * 5 * P)
        assert (np.asarray(got.place_M) < P).sum() == min(int(np.ceil(share * 5 * P) * 0.5), P)
    got = picture_rows(v, square, GlobalCom2(0.25))
    inside = len(got.x_MD) - 12  # a newline for each of its lines
    assert abs(inside - 0.25 * 5 * P) <= 5


def test_rows_without_places_stand_crop_by_crop():
    v = next_model()
    method = VisionZip(6, 4)
    got = picture_rows(v, WIDE, method)
    assert len(got.x_MD) == 3 * method.rows(v.cfg.tower) + 1 and np.asarray(got.place_M)[0] == EMPTY
    np.testing.assert_allclose(got.x_MD[-1], v.params.newline_D, atol=1e-6)


def test_frames_are_reduced_behind_their_pooling():
    """Rows of frames are 3 x 3 of 6 x 6 patches; a budget is of these, and a method sees its scores pooled as the rows are."""
    v = one_vision()
    few = ((FasterVLM(4), 24), (FasterVLM(0.5), 30), (PooledPatches((2, 2)), 24), (AIM(1), 30), (DyCoke(0.7), 45))
    for method, many in few:
        got = picture_rows(v, FILM, method)
        if not isinstance(method, DyCoke):
            assert len(got.x_MD) == many + 1
        assert got.whole == 6 * 9 + 1 and np.asarray(got.place_M)[-1] == 54 and len(got.x_MD) <= many + 1
    whole = picture_rows(v, FILM)
    got = picture_rows(v, FILM, FasterVLM(4))
    np.testing.assert_allclose(got.x_MD, whole.x_MD[np.asarray(got.place_M)], atol=1e-5)


@pytest.mark.parametrize("positions", ["kept", "renumbered"])
def test_hired_and_holitom_generate_under_snapkv(positions):
    """LLaVA-NeXT's crops and OneVision's video, fewer rows of them, SnapKV's rows of the prompt."""
    v, ids = next_model(), prompt(pictures.IMAGE)
    few = written(v, ids, WIDE, reduce=HiRED(0.2), positions=positions)
    assert len(few) == 8 and written(v, ids, WIDE, reduce=HiRED(1.0, lines="used"), positions=positions) == written(v, ids, WIDE)
    v, ids = one_vision(), prompt(pictures.VIDEO)
    assert len(written(v, ids, FILM, reduce=HoliTom(0.3, 0.2), positions=positions)) == 8
    assert written(v, ids, FILM, reduce=HoliTom(1.0, 1.0), positions=positions) == written(v, ids, FILM)


def test_pictures_of_all_kinds_in_one_batch():
    """A prompt of crops, one of a single crop and one of two pictures; each reads what it reads alone."""
    v, method = next_model(), GlobalCom2(0.3)
    seen = [picture_rows(v, p, method) for p in (WIDE, crops(1, seed=3), crops(5, (48, 48), seed=4))]
    one, two = prompt(pictures.IMAGE), [*prompt(pictures.IMAGE), pictures.IMAGE, 3]
    texts, _, _, embeds = mixed(v, [one, one, two], [[seen[0]], [seen[1]], [seen[0], seen[2]]], "kept")
    assert [len(t) for t in texts] == [20 + seen[0].whole, 20 + seen[1].whole, 21 + seen[0].whole + seen[2].whole]
    alone = mixed(v, [one], [[seen[1]]], "kept")[3]
    n = 20 + len(seen[1].x_MD)
    np.testing.assert_array_equal(embeds.place_BM[1, :n], alone.place_BM[0, :n])
    np.testing.assert_allclose(embeds.x_BMD[1, :n], alone.x_BMD[0, :n], atol=1e-6)


def test_the_text_has_a_say():
    """CATP leaves other patches for another text, and for none; its direction is that of words alone."""
    v, ids = next_model(), prompt(pictures.IMAGE)
    rows = np.asarray(v.text.params.embed_VD)[[t for t in ids if t != pictures.IMAGE]]
    about = direction(v, ids)
    np.testing.assert_allclose(about, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(axis=0), atol=1e-6)
    found = [np.asarray(picture_rows(v, WIDE, CATP(8), a).place_M).tolist() for a in (about, -about, None)]
    assert found[0] != found[1] and found[0] != found[2]
    assert len(written(v, ids, WIDE, reduce=CATP(8))) == 8


def test_how_many_rows_is_known_before():
    """Of a picture as it is exactly, of crops and frames that a method leaves fewer of at least: the bars of a canvas may cost it some."""
    v, film, shrunk = next_model(), one_vision(), pictures.llava(NEXT, 1, False)
    for model, pixels in ((v, WIDE), (v, crops(1)), (film, FILM), (shrunk, crops(5, (48, 48)))):
        assert least_rows(model, pixels) == picture_rows(model, pixels).whole
    for model, pixels, method in (
        (v, WIDE, FasterVLM(9)), (v, WIDE, HiRED(0.2)), (v, WIDE, GlobalCom2(0.25)), (v, WIDE, VisionZip(6, 4)),
        (v, crops(1), GlobalCom2(0.3)), (film, FILM, HoliTom(0.2)), (film, FILM, DyCoke(0.7)),
    ):  # fmt: skip
        whole, least = (least_rows(model, pixels, method, kept) for kept in (True, False))
        assert least <= len(picture_rows(model, pixels, method).place_M) <= whole == least_rows(model, pixels)
    assert least_rows(v, WIDE, FasterVLM(9)) == 3 * 9 - 12 and least_rows(v, crops(1), GlobalCom2(0.3)) == 10 + 1
    assert least_rows(film, FILM, HoliTom(0.2)) == 1 and least_rows(film, FILM, FasterVLM(4)) == 6 * 4


def test_more_frames_than_positions_are_refused_before_a_tower_runs(monkeypatch):
    """With rows at their places all count, else the fewest that a method can leave."""
    film, ids = one_vision(), prompt(pictures.VIDEO)
    monkeypatch.setattr("tokeff.models.llava_rows.features", None)
    for n, method, positions, word in (
        (40, None, "renumbered", "has 381 rows and 4 more are wanted"), (40, HoliTom(0.2), "kept", "give positions='renumbered'"),
        (40, DyCoke(0.1), "renumbered", "at least 351 rows"), (60, FramePairs(), "renumbered", "give fewer pictures or frames"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=word) as error:
            read(film, [ids], [[crops(n, video=True)]], Setup(), 4, reduce=method, positions=positions)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="at least 331 rows under DyCoke"):
        picture_rows(film, crops(40, video=True), DyCoke(0.1))
    with pytest.raises(UserError, match="frames of a video"):  # of the second picture, before the first is looked at
        read(film, [[*ids, pictures.VIDEO]], [[FILM, crops(1)]], Setup(), 4, reduce=StillRuns())


def test_what_cannot_work_is_refused_in_one_line():
    v, film = next_model(), one_vision()
    for model, pixels, method, word in (
        (v, WIDE, HoliTom(), "frames of a video"), (film, FILM, FlowCut(), "pooled"), (film, FILM, HiRED(), "pooled"),
        (film, FILM, SmallerImage((2, 2)), "pooled"), (film, FILM, FasterVLM(10), "budget"),
        (film, WIDE, HiRED(), "class row"), (v, crops(3), FasterVLM(4), "size"),
        (v, crops(3), None, "size"), (v, crops(4, (24, 40)), FasterVLM(4), "crops"),
        (pictures.llava(NEXT, 1, False), crops(5, (48, 48)), FasterVLM(4), "shrinks"), (v, crops(1), FasterVLM(0), "budget"),
        (film, crops(40, video=True), None, "reads"), (film, FILM, VFlowOpt(4, cell=2.0, entropy=1.0), "entropy"),
        (pictures.llava(), crops(2), FasterVLM(4), "one crop"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=word) as error:
            picture_rows(model, pixels, method)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="class row"):
        read(film, [prompt(pictures.IMAGE)], [[crops(1)]], Setup(), 4, reduce=HiRED())
    assert jnp.isfinite(picture_rows(film, crops(20, video=True), HoliTom(0.2)).x_MD).all()
