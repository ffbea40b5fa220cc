"""Compact files: the coder returns what it was given, bins keep their bound, bytes fall, and no file makes the reader do harm."""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_api
import tiny
from oracles import coding
from safetensors.numpy import load_file, save_file

import tokeff
from tokeff.context import Compressed
from tokeff.errors import UserError
from tokeff.kv import compact, entropy
from tokeff.kv.compact import Compact

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("compact")]
FINE = Compact((0.5, 1.0, 1.5), 4, 20)


# -- the coder


def coded(seed: int, lanes: int, longest: int, A: int):
    """Symbols of skewed statistics, lanes of unequal length, one of them empty."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, longest + 1, lanes)
    length[lanes // 2] = 0
    symbol = np.minimum(rng.geometric(rng.uniform(0.2, 0.9, (lanes, 1)), (lanes, longest)) - 1, A - 1)
    count = np.stack([np.bincount(row[:n], minlength=A) for row, n in zip(symbol, length, strict=True)])
    return symbol, length, count, entropy.frequencies(count)


@pytest.mark.parametrize(("lanes", "longest", "A"), [(1, 1, 1), (7, 50, 4), (64, 300, 255)])
def test_the_coder_returns_what_it_was_given(lanes, longest, A):
    symbol, length, count, frequency = coded(lanes, lanes, longest, A)
    assert (frequency.sum(axis=1) == entropy.TOTAL).all() and (frequency[count > 0] > 0).all()
    words, states = entropy.encode(symbol, length, frequency)
    out = entropy.decode(words, states, length, frequency)
    for row, given, n in zip(out, symbol, length, strict=True):
        assert row[:n].tolist() == given[:n].tolist() and not row[n:].any()


def test_the_stream_is_as_long_as_its_entropy():
    symbol, length, count, frequency = coded(0, 64, 4000, 12)
    words, states = entropy.encode(symbol, length, frequency)
    p = count / np.maximum(count.sum(axis=1, keepdims=True), 1)
    bits = -(count * np.log2(np.where(p > 0, p, 1))).sum()
    assert bits <= 8 * (words.nbytes + states.nbytes) <= 1.01 * bits + 32 * len(states)


def test_damaged_streams_are_refused():
    symbol, length, _, frequency = coded(3, 16, 200, 9)
    words, states = entropy.encode(symbol, length, frequency)
    turned = words.copy()
    turned[5] ^= 1 << 9
    wrong = frequency.copy()
    wrong[0, 0] += 1
    longer = np.append(words, words[:1])
    damaged = [(given, states, frequency) for given in (words[:-1], longer, turned)]
    for given, state, f in (*damaged, (words, np.zeros_like(states), frequency), (words, states, wrong)):
        with pytest.raises(ValueError):
            entropy.decode(given, state, length, f)


# -- arrays


def rows(seed=0, shape=(1, 3, 47, 8)):
    """Correlated rows with channels of unequal width, some slots empty and one channel that never changes."""
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.normal(size=shape), axis=2) + 5 * rng.normal(size=(*shape[:2], 1, shape[3]))
    x *= np.exp(rng.normal(size=(*shape[:2], 1, shape[3])))
    x[..., 3] = 2.5
    x[:, 1, 30:] = 0
    x[:, 2, ::7] = 0
    return x.astype(np.float32)


def through(x, how, name="k_BKCH", third=0):
    """(the array after writing and reading, bytes of the file)."""
    made = compact.write([(name, third, x)], how)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    (out,) = compact.read([(name, third, like)], how, made.__getitem__)
    return out, sum(part.nbytes for part in made.values())


@pytest.mark.parametrize("how", [FINE, Compact((0.5, 1, 1.5), 0, 13), Compact((0.02, 1, 1), 4, 20)], ids=["anchors", "means", "fine"])
@pytest.mark.parametrize("third", [0, 2])
def test_bins_equal_their_oracle_and_bound(how, third):
    """Every number where the oracle puts it, and within half a bin of the original (float32)."""
    x = rows()
    out, _ = through(x, how, third=third)
    for head in range(3):
        wanted, bound = coding.decoded(x[0, head], how.sizes[third], how.group)
        assert (np.abs(out[0, head] - x[0, head]) <= bound * 1.001 + 1e-4).all()
        near = np.abs(out[0, head] - wanted) < 1e-3  # a number on the border between two bins may fall to either side
        assert near.mean() > 0.99 and not out[0, head][(x[0, head] == 0).all(axis=1)].any()


def test_symbols_beyond_the_alphabet_are_written_in_full():
    x = np.cumsum(np.random.default_rng(1).normal(size=(1, 1, 400, 4)), axis=2).astype(np.float32)
    x[0, 0, 17] += 3000
    out, _ = through(x, Compact((0.001, 1, 1), 20, 100))
    assert np.abs(out - x)[0, 0, 1:].max() < 1.0 and np.abs(out[0, 0, 17] - x[0, 0, 17]).max() < 1.0


def test_bytes_against_raw_and_8_bits():
    """Half a standard deviation a bin takes about 3 bits a number: less than half of 8-bit codes, a tenth of float32."""
    x = np.random.default_rng(0).normal(size=(1, 4, 2000, 64)).astype(np.float32)
    _, size = through(x, Compact((0.5, 0.5, 0.5), 0))
    assert size < 0.11 * x.nbytes and size < 0.5 * x.size


def test_correlated_rows_gain_by_anchors_and_others_lose():
    walk = np.cumsum(np.random.default_rng(0).normal(size=(1, 1, 1000, 64)), axis=2).astype(np.float32)
    apart = np.random.default_rng(0).normal(size=walk.shape).astype(np.float32)
    for x, better in ((walk, True), (apart, False)):
        (_, anchored), (_, plain) = (through(x, Compact((0.5, 1, 1), group)) for group in (10, 0))
        assert (anchored < plain) == better


EXACTLY = {
    "rows": rows(),
    "bfloat16": np.asarray(jnp.asarray(rows(), jnp.bfloat16)),
    "strange numbers": np.array([np.nan, -np.inf, -0.0, 1e-42, 3.4e38], np.float32),
    "orders": np.arange(-1, 200, dtype=np.int32).reshape(3, -1),
    "codes": np.random.default_rng(0).integers(0, 256, (2, 3, 5), np.uint8),
    "nothing": np.zeros((1, 2, 0, 8), np.float32),
    "a number": np.asarray(7, np.int32),
}


@pytest.mark.parametrize("name", EXACTLY)
def test_exact_is_exact(name):
    x = EXACTLY[name]
    out, _ = through(x, "exact")
    assert out.dtype == x.dtype and out.shape == x.shape and out.tobytes() == x.tobytes()


def test_only_rows_are_written_in_bins():
    """Orders, drafts, landmarks, low ranks and statistics come back to the bit under any choice."""
    x = rows()
    for name in ("k_BKWH", "landmark_BKPH", "low_BKSY", "mass", "v_BKSG"):
        assert through(x, FINE, name)[0].tobytes() == x.tobytes()
    for name in ("k_BKCH", "v_BPRH", "v_BKSH", "k_JKCH"):
        assert through(x, FINE, name)[0].tobytes() != x.tobytes()


# -- contexts

POLICIES = test_api.POLICIES | {
    "Hydragen": lambda: tokeff.kv.hydragen(tokeff.kv.snapkv(0.5, window=6)),
    "KIVI": lambda: tokeff.kv.kivi(4, 8, 8),
}


@pytest.mark.parametrize("name", POLICIES)
def test_exact_contexts_are_equal_to_the_bit_and_smaller(name, tmp_path):
    context = tokeff.compress(test_api.model(), test_api.text(64), POLICIES[name](), room=24)
    context.save(tmp_path / "plain")
    context.save(tmp_path / "exact", compact="exact")
    again = Compressed.load(test_api.model(), tmp_path / "exact")
    for mine, theirs in zip(jax.tree.leaves(context.layers), jax.tree.leaves(again.layers), strict=True):
        assert mine.dtype == theirs.dtype and np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()
    size = {p.name: (p / "cache.safetensors").stat().st_size for p in tmp_path.iterdir()}
    assert size["exact"] < size["plain"] and again.lossy is None


CODES_AND_PAGES = ("KIVI", "AdaKV")  # test_api.py sends the others from one process to another as they are
OTHERS = tuple(name for name in POLICIES if name not in CODES_AND_PAGES)


@pytest.mark.parametrize("names", tiny.sampled([CODES_AND_PAGES, OTHERS], [CODES_AND_PAGES]), ids=["codes and pages", "others"])
def test_compact_contexts_answer_the_same_in_another_process(names, tmp_path):
    """Read in this process and in another: the same text, and the context says that it is lossy, also when it is saved again."""
    m, question, here = test_api.model(), [test_api.text(5, 2), test_api.text(3, 3)], {}
    for name in names:
        tokeff.compress(m, test_api.text(64), POLICIES[name](), room=24).save(tmp_path / name, compact=FINE)
        again = Compressed.load(m, tmp_path / name)
        here[name] = tokeff.generate(m, question, cache=again, max_new=12).tokens
        assert again.lossy == FINE
    again.save(tmp_path / "again")
    assert Compressed.load(m, tmp_path / "again").lossy == FINE
    code = (
        "import sys, json, pathlib, test_api, tokeff; from tokeff.context import Compressed; m = test_api.model();"
        "questions = [test_api.text(5, 2), test_api.text(3, 3)];"
        "contexts = {n: Compressed.load(m, pathlib.Path(sys.argv[1]) / n) for n in sys.argv[2:]};"
        "print(json.dumps({n: tokeff.generate(m, questions, cache=c, max_new=12).tokens for n, c in contexts.items()}))"
    )
    assert json.loads(test_api.python(code, str(tmp_path), *here)) == here


def test_fine_bins_give_the_text_of_the_context(tmp_path):
    m, question = test_api.model(), [test_api.text(5, 2)]
    context = tokeff.compress(m, test_api.text(64), room=24)
    context.save(tmp_path / "c", compact=Compact((0.01, 0.01, 0.01)))
    again = Compressed.load(m, tmp_path / "c")
    made = [tokeff.generate(m, question, cache=c, max_new=16).tokens for c in (context, again)]
    assert made[0] == made[1]


TWO: Any = (1, 1)
BAD = ["Exact", 3, Compact(TWO), Compact((0, 1, 1)), Compact(group=1), Compact(group=-1), Compact(piece=0), Compact(piece=15)]


@pytest.mark.parametrize("how", BAD, ids=str)
def test_bad_choices_are_refused_before_anything_is_written(how, tmp_path):
    with pytest.raises(UserError) as e:
        test_api.saved().save(tmp_path / "c", compact=how)
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


# -- hostile files


def arrays(edit):
    def damage(folder):
        found = load_file(folder / "cache.safetensors")
        edit(found)
        save_file(found, folder / "cache.safetensors")

    return damage


def replaced(key, value):
    return arrays(lambda found: found.update({key: np.asarray(value)}))


def without(key):
    return arrays(lambda found: found.pop(key))


def cut(key):
    return arrays(lambda found: found.update({key: found[key][:-1].copy()}))


def bomb(key):
    return replaced(key, np.frombuffer(zlib.compress(bytes(1 << 24)), np.uint8))


def about(**fields):
    return test_api.change(**fields)


DAMAGE = {
    "truncated file": test_api.cut_short,
    "no words": without("0.words1"),
    "fewer words": cut("0.words0"),
    "words of another type": replaced("0.words0", np.zeros(9, np.int64)),
    "fewer states": cut("0.states0"),
    "states of 0": replaced("0.states0", np.zeros(16, np.uint32)),
    "no steps": without("0.step"),
    "truncated steps": cut("0.step"),
    "not deflated": replaced("0.step", np.arange(40, dtype=np.uint8)),
    "a bomb for steps": bomb("0.step"),
    "a bomb for live rows": bomb("0.live"),
    "a bomb for orders": bomb("2.planes"),
    "a huge alphabet": replaced("0.shape", np.array([0, 1 << 40])),
    "an alphabet of none": replaced("0.shape", np.array([0, 0])),
    "a shape of three": replaced("0.shape", np.array([0, 1, 2])),
    "a symbol outside": arrays(lambda found: found.update({"0.far_at": np.array([1 << 40]), "0.far": np.array([1])})),
    "more symbols than numbers": arrays(lambda found: found.update({"0.far_at": np.zeros(9999, int), "0.far": np.zeros(9999, int)})),
    "symbols without a place": replaced("0.far", np.array([1, 2, 3])),
    "a huge group": about(compact={"type": "Compact", "sizes": {"tuple": [0.5, 1.0, 1.5]}, "group": 10**9, "piece": 10**9}),
    "a group that is a word": about(compact={"type": "Compact", "sizes": {"tuple": [0.5, 1.0, 1.5]}, "group": "ten", "piece": 10}),
    "another way of writing": about(compact="exact"),
    "no way of writing": about(compact=None),
    "an unknown way": about(compact="zip"),
    "a way that is a list": about(compact=[1, 2]),
    "rows without end": about(rows=[[10**12, 0]] * tiny.CFG.L),
    "layers without end": about(rows=[[64, 0]] * 10**5),
    "room without end": about(room=10**12),
    "negative rows": about(rows=[[-1, 0]] * tiny.CFG.L),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_in_one_line(name, tmp_path):
    test_api.saved().save(tmp_path / "c", compact=FINE)
    DAMAGE[name](tmp_path / "c")
    test_api.seal(tmp_path / "c")
    with pytest.raises(UserError) as e:
        Compressed.load(test_api.model(), tmp_path / "c")
    assert "\n" not in str(e.value)
