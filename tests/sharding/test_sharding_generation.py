"""Generation on a mesh equals generation on one device: text, kept rows, caches and what drafters keep, for every listed method."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded

from tokeff.context import Compressed
from tokeff.decode.ngrams import NGrams
from tokeff.decode.sample import GREEDY
from tokeff.decode.superposed import Superposed, suggest
from tokeff.generation import ask, new_tokens, read
from tokeff.kv.extend import pack
from tokeff.kv.shadow import Shadow
from tokeff.models.load import fingerprint

pytestmark = pytest.mark.core

EVICTING = "H2O+PromptLookup"  # drafts under eviction, with attention mass
CROSSING = "AdaKV+TokenRecycling"  # pages that cross heads, tree drafts, a table per sequence
TOLERANCE = {"TransMLA": 5e-3, "ShadowKV": 2e-3}  # rounding tilts what is cut off where two eigenvalues are close
MESHES = [(4, 8, 1), (8, 8, 1), (8, 4, 2), (4, 4, 2), (4, 2, 4), (4, 1, 8), (8, 1, 8)]  # kv heads, data, model; 8, 2, 4 has all methods
FIRST = ("StreamingLLM", "H2O", "SnapKV", "TidalDecode", "ShadowKV", "AdaKV", "GemFilter", "PromptDistill")
DAILY = (("SnapKV", 8, 4, 2), ("GemFilter", 4, 2, 4), ("TidalDecode", 4, 1, 8))
PROOF = (pytest.mark.proof,)


def fixed(tree):
    """The same tree with each low-rank pair as its product: eigenvectors are free to turn, the keys they stand for are not."""

    def product(x):
        return (x.low_BSY @ x.basis_BYKH.reshape(*x.basis_BYKH.shape[:2], -1), *jax.tree.leaves(x)[2:])

    return jax.tree.map(lambda x: product(x) if isinstance(x, Shadow) else x, tree, is_leaf=lambda x: isinstance(x, Shadow))


def check_equal(K: int, name: str, m) -> None:
    """Whole numbers (tokens, orders, counts, owners) are equal; logits and caches agree within 1e-4. Of packed codes one byte in a thousand
    may differ, because a number on the border between two codes falls to either side; what follows from it then agrees within 0.05."""
    for got, want in zip(sharded.generated(m, name), sharded.unsharded(K, name), strict=True):
        got, want = fixed(got), fixed(want)
        pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
        others = sum(int((np.asarray(x) != np.asarray(y)).sum()) for x, y in pairs if x.dtype == np.uint8)
        assert others <= 1e-3 * sum(x.size for x, _ in pairs if x.dtype == np.uint8)
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                continue
            x, y = np.asarray(x), np.asarray(y)
            where = f"{name} {jax.tree_util.keystr(path)}"
            if np.issubdtype(x.dtype, np.floating):
                np.testing.assert_allclose(x, y, atol=0.05 if others else TOLERANCE.get(name, 1e-4), rtol=1e-5, err_msg=where)
            elif x.dtype != np.uint8:
                np.testing.assert_array_equal(x, y, err_msg=where)


@pytest.mark.parametrize("name", sharded.named(*sharded.METHODS, EVICTING, CROSSING))
def test_every_method(name):
    """Of a drafter, some drafts are right: rows that were accepted move on both sides. ADED's trigrams find nothing in so few tokens."""
    check_equal(8, name, sharded.placed(8, 2, 4))
    drafts = sharded.setup(name).decode.nodes > 1 and name != "ADED"
    assert not drafts or int(sharded.unsharded(8, name)[1].passes_B.min()) < sharded.NEW - 1


def on_every_mesh() -> list:
    """Each of FIRST on each of MESHES: a few every day, all in `make proofs`."""
    return [
        pytest.param(
            name, *mesh, marks=(pytest.mark.xdist_group(f"sharded {sharded.going_on(name)}"), *(() if (name, *mesh) in DAILY else PROOF))
        )
        for name in FIRST for mesh in MESHES
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "K", "data", "model"), on_every_mesh())
def test_the_first_methods_on_every_mesh(name, K, data, model):
    """With 4 and 8 kv heads; on 2 x 4 with 8 they are in `test_every_method`."""
    check_equal(K, name, sharded.placed(K, data, model))


@pytest.mark.xdist_group(f"sharded {CROSSING}")
@pytest.mark.parametrize(("K", "data", "model"), [*MESHES[::2], *(pytest.param(*m, marks=pytest.mark.proof) for m in MESHES[1::2])])
def test_every_mesh(K, data, model):
    check_equal(K, CROSSING, sharded.placed(K, data, model))


@pytest.mark.xdist_group(f"sharded {EVICTING}")
@pytest.mark.parametrize(("K", "data", "model"), MESHES[::3])
def test_eviction_on_other_meshes(K, data, model):
    check_equal(K, EVICTING, sharded.placed(K, data, model))


@pytest.mark.parametrize("name", sharded.named(EVICTING, CROSSING, "KIVI", "Quest"))
def test_heads_that_do_not_divide(name):
    """3 kv heads on model=2: heads are whole on every device, feed-forward and vocabulary are split."""
    m = sharded.placed(3, 2, 2)
    block = m.params.blocks[0]
    assert block.q_NHD.sharding.is_fully_replicated and block.k_KHD.sharding.is_fully_replicated
    assert block.gate_FD.sharding.spec[0] == "model"
    check_equal(3, name, m)


def test_questions_on_one_context():
    """A compressed context serves a batch on a mesh as it does on one device; its own batch of 1 stays whole."""
    texts = []
    for m in (sharded.model(8), sharded.placed(8, 2, 4)):
        parts, rows = sharded.setup("AdaKV"), sharded.prompts()
        prompt = read(m, rows[:1], parts)
        layers = pack(parts.kv, prompt.layers, parts.room(32), m.cfg)
        context = Compressed(parts, layers, rows[0], len(rows[0]), prompt.logits_BV, 32, (), fingerprint(m))
        texts.append(new_tokens(ask(m, context, [[1, 2, 3], [4, 5]] * 2, GREEDY, 0, 8, ())))
    assert texts[0] == texts[1]


class Numbers:
    """A tokenizer whose texts are its tokens."""

    def decode(self, ids, special=False) -> str:
        return " ".join(map(str, ids))


def test_suggestions():
    """Superposed drafts on a mesh, where their one sequence stays whole."""
    found, rows = [], sharded.prompts()
    for m in (sharded.model(8), sharded.placed(8, 2, 4)):
        m = dataclasses.replace(m, tokenizer=Numbers())
        found.append(suggest(m, rows[0], Superposed(2), new=6, ngrams=NGrams.of(rows)))
    assert [s.text for s in found[0]] == [s.text for s in found[1]] and len(found[0]) == 2
    np.testing.assert_allclose(*([s.score for s in some] for some in found), atol=1e-3)


def test_batch_that_does_not_divide():
    """3 prompts on data=2 run whole on every device."""
    rows = sharded.prompts()[:3]
    _, s = sharded.generated(sharded.placed(4, 2, 4), "Full", rows)
    _, alone = sharded.generated(sharded.model(4), "Full", rows)
    np.testing.assert_array_equal(s.tokens_BS, alone.tokens_BS)
