"""Pictures with digits: what they show, what is asked of them, and what they are made of."""

import contextlib

import numpy as np
import pytest

from tokeff.data import canvases, digits, drawing
from tokeff.data.canvases import PLACES, SIDE, TASKS, WAYS, WORDS, Look, make, patch_digits, prompt
from tokeff.data.digits import Material, mnist, read_idx
from tokeff.data.drawing import BOX, photographs
from tokeff.errors import UserError
from tokeff.models.fetch import cache_dir
from tokeff.models.presets import IMAGES

pytestmark = pytest.mark.core


@contextlib.contextmanager
def one_line(*words):
    """The body raises a UserError of one line that has these words."""
    with pytest.raises(UserError) as caught:
        yield
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words), said


@pytest.fixture(scope="module")
def stuff() -> Material:
    """Fifty blots that stand for digits, and two backgrounds, one smaller than a picture."""
    rng = np.random.default_rng(0)
    glyph = np.zeros((50, BOX, BOX), np.uint8)
    glyph[:, 5:23, 9:19] = rng.integers(150, 256, (50, 18, 10))
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((120, 200), (60, 300))]
    return Material("train", glyph, np.arange(50) % 10, photographs(pictures))


@pytest.fixture(scope="module")
def made(stuff):
    return {task: make(task, stuff, 12, 3) for task in TASKS}


def test_the_same_seed_draws_the_same_and_another_one_does_not(stuff, made):
    for task, c in made.items():
        again, other = make(task, stuff, 12, 3), make(task, stuff, 12, 4)
        assert (again.pictures_BTYXC == c.pictures_BTYXC).all() and again.answers == c.answers and again.questions == c.questions
        assert (other.pictures_BTYXC != c.pictures_BTYXC).mean() > 0.5
        assert c.pictures_BTYXC.dtype == np.uint8 and c.pictures_BTYXC.shape == (12, TASKS[task].pictures, *[TASKS[task].side] * 2, 3)


def places(ink_YX):
    """[(digit, y, x)] of what is ink of one digit in one cell: connected within a distance no two digits have."""
    found, left = [], {(y, x) for y, x in zip(*np.nonzero(ink_YX >= 0))}
    while left:
        first = left.pop()
        group, edge = [first], [first]
        while edge:
            y, x = edge.pop()
            near = [p for p in left if abs(p[0] - y) <= 1 and abs(p[1] - x) <= 1 and ink_YX[p] == ink_YX[first]]
            left.difference_update(near)
            group += near
            edge += near
        if len(group) > 9:
            found.append((int(ink_YX[first]), np.mean([p[0] for p in group]), np.mean([p[1] for p in group])))
    return found


def test_answers_are_what_the_ink_shows(made):
    """Asked again of the pictures alone, in loops: nothing of the scene but the pixels of each digit is used."""
    for task in ("name", "scan"):
        for ink, said in zip(made[task].ink_BTYX, made[task].answers):
            assert [d for d, _, _ in places(ink[0])] == [int(said)]
    for ink, said in zip(made["count"].ink_BTYX, made["count"].answers):
        assert len(places(ink[0])) == int(said)
    for ink, said in zip(made["row"].ink_BTYX, made["row"].answers):
        found = sorted(places(ink[0]), key=lambda p: p[2])
        assert " ".join(str(d) for d, _, _ in found) == said and np.ptp([y for _, y, _ in found]) < SIDE / 3
    for ink, asked, said in zip(made["where"].ink_BTYX, made["where"].questions, made["where"].answers):
        at = {PLACES[int(y // 28) * 3 + int(x // 28)]: d for d, y, x in places(ink[0])}
        assert at[asked.removeprefix("which digit is at the ").removesuffix(" ?")] == int(said) and 3 <= len(at) <= 6
    for ink, asked, said in zip(made["pair"].ink_BTYX, made["pair"].questions, made["pair"].answers):
        assert [d for d, _, _ in places(ink[int("second" in asked)])] == [int(said)]


def test_clips_show_what_is_asked(made):
    for ink, asked, said in zip(made["order"].ink_BTYX, made["order"].questions, made["order"].answers):
        since = {}
        for t, frame in enumerate(ink):
            for d, y, x in places(frame):
                since.setdefault((d, int(y // 28), int(x // 28)), t)
        assert len(since) == 3 == len(set(since.values()))
        wanted = max(since, key=since.get) if "last" in asked else min(since, key=since.get)
        assert str(wanted[0]) == said
    for ink, said in zip(made["motion"].ink_BTYX, made["motion"].answers):
        seen = [places(frame)[0][1:] for frame in ink]
        step = np.diff(seen, axis=0)
        assert (np.sign(np.round(step / 4)) == WAYS[said]).all()


def test_pictures_of_one_clip_differ_only_where_something_happens(made):
    still = made["order"].pictures_BTYXC.astype(int)
    assert np.abs(still[:, 0] - still[:, 1]).mean() < 15


def test_cells_and_patches(made):
    for c in made.values():
        for digit, ink in zip(c.digit_BTM.reshape(-1, c.digit_BTM.shape[2]), c.ink_BTYX.reshape(-1, *c.ink_BTYX.shape[2:])):
            assert set(digit[digit >= 0]) == set(ink[ink >= 0])
    ink = made["count"].ink_BTYX
    got = patch_digits(ink, 6)
    for b in range(3):
        for s in range(196):
            part = ink[b, 0, s // 14 * 6 : s // 14 * 6 + 6, s % 14 * 6 : s % 14 * 6 + 6]
            assert got[b, 0, s] == (part.max() if (part >= 0).sum() >= 4 else -1)


def test_text(made):
    for task, c in made.items():
        for question, answer in zip(c.questions, c.answers):
            text = prompt(task, question)
            assert set(text.split()) - {"<image>", "<video>"} | set(answer.split()) <= set(WORDS)
            assert text.count("<image>") + 8 * text.count("<video>") == c.pictures_BTYXC.shape[1]
    assert len(set(WORDS)) == len(WORDS)


def test_a_glyph_keeps_its_ink_when_it_shrinks():
    rng = np.random.default_rng(1)
    glyph = rng.integers(0, 256, (3, BOX, BOX), dtype=np.uint8)
    got = drawing.scaled(glyph, np.array([14, 28, 21]))
    half = glyph[0].reshape(14, 2, 14, 2).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(got[0, 7:21, 7:21], half, atol=1e-5)
    np.testing.assert_allclose(got[1], glyph[1] / 255, atol=1e-5)
    np.testing.assert_allclose(got[2].sum(), glyph[2].sum() / 255 * (21 / 28) ** 2, rtol=1e-5)


def test_distractors_and_crops(stuff):
    rng = np.random.default_rng(2)
    letters, cut = drawing.letters(), drawing.pieces(rng, stuff.glyph_NYX)
    assert letters.dtype == np.uint8 and (letters.max(axis=(1, 2)) > 200).all() and (letters > 100).mean() < 0.4
    to = (BOX - drawing.PIECE) // 2
    cut[:, to : to + drawing.PIECE, to : to + drawing.PIECE] = 0
    assert not cut.any()
    assert stuff.photographs.crops(rng, 40, SIDE).shape == (40, SIDE, SIDE, 3)


def test_pixels_of_crops_are_those_of_one_photograph():
    flat = [np.full((100, 90, 3), value, np.uint8) for value in (10, 20, 30)]
    got = photographs(flat).crops(np.random.default_rng(0), 60, SIDE)
    assert set(np.unique(got)) == {10, 20, 30} and (np.ptp(got, axis=(1, 2, 3)) == 0).all()


def test_refusals(stuff):
    with one_line("'wher'", "did you mean 'where'"):
        make("wher", stuff, 1, 0)
    with one_line("0 pictures"):
        make("name", stuff, 0, 0)
    with one_line("(20, 99)"):
        make("name", stuff, 1, 0, Look(size=(20, 99)))
    with one_line("'dev'", "train, test"):
        digits.material("dev")


# -- files


def idx(shape, data=None, magic=None) -> bytes:
    head = magic or bytes((0, 0, 8, len(shape)))
    return head + b"".join(n.to_bytes(4, "big") for n in shape) + (bytes(int(np.prod(shape))) if data is None else data)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "no idx file"),
        (b"\0\0\x08\x03\0\0", "no idx file"),
        (idx((2, 28, 28), magic=b"\0\0\x0d\x03"), "no idx file"),
        (idx((7,)), "no idx file"),
        (idx((2, 28, 28))[:-1], "shorter"),
        (idx((2, 28, 28)) + b"x", "longer"),
        (idx((0xFFFFFFFF, 28, 28), b""), "more than there can be"),
        (idx((2, 0xFFFF, 0xFFFF), b""), "more than there can be"),
        (idx((100_000, 28, 28), b"12"), "shorter"),
    ],
)
def test_hostile_idx_files_are_refused_in_one_line(tmp_path, body, said):
    path = tmp_path / "x"
    path.write_bytes(body)
    with one_line(str(path), said, "fetch it again"):
        read_idx(path, 3)
    with one_line("cannot read"):
        read_idx(tmp_path / "none", 3)


def test_mnist_is_checked(tmp_path):
    glyph, label = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    data = bytes(range(256)) * 7
    glyph.write_bytes(idx((2, 28, 28), data[: 2 * 784]))
    label.write_bytes(idx((2,), bytes((3, 9))))
    got = mnist(tmp_path, "train")
    assert got[0].shape == (2, 28, 28) and got[0][0, 0, 5] == 5 and list(got[1]) == [3, 9]
    label.write_bytes(idx((2,), bytes((3, 10))))
    with one_line("label 10"):
        mnist(tmp_path, "train")
    label.write_bytes(idx((3,)))
    with one_line("no labelled digits"):
        mnist(tmp_path, "train")
    glyph.write_bytes(idx((2, 20, 28)))
    with one_line("no labelled digits"):
        mnist(tmp_path, "train")


def test_no_photograph_is_behind_pictures_of_both_splits():
    names = {m.name for m in IMAGES["photographs"].members}
    assert set(digits.TEST_PHOTOGRAPHS) < names and len(digits.TEST_PHOTOGRAPHS) >= 5
    if not all((cache_dir() / preset.folder / preset.member).exists() for preset in IMAGES.values()):
        pytest.skip("MNIST and the photographs are not in the cache; run `tokeff fetch mnist` and `tokeff fetch photographs`")
    train, test = digits.material("train"), digits.material("test")
    assert (len(train.label_N), len(test.label_N)) == (60_000, 10_000)
    assert len(train.photographs.start) + len(test.photographs.start) == len(names)
    assert not {x.tobytes() for x in train.glyph_NYX} & {x.tobytes() for x in test.glyph_NYX[:2000]}
    for m in (train, test):
        assert {canvases.make(task, m, 2, 0).task for task in TASKS} == set(TASKS)
