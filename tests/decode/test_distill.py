"""A draft model of our own: its loss against numpy, what the target tells it, one step, and the one that is released."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tokeff.data import openings, sources
from tokeff.decode import distill
from tokeff.decode.draft_model import DraftModel
from tokeff.decode.sample import Sampling
from tokeff.errors import UserError
from tokeff.models.borrow import load_layers, save_layers
from tokeff.models.config import Config, Precision
from tokeff.models.load import Model, load
from tokeff.models.presets import PRESETS

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("distill")]
V, RANK, NEW = tiny.CFG.V, 5, 12
RELEASED = Path(__file__).parents[2] / "checkpoints" / "smollm2-135m-draft"
M = Model(tiny.CFG, tiny.params(), None, Precision(), "tiny")


@pytest.fixture(scope="module")
def told() -> distill.Lessons:
    return distill.lessons(M, *tiny.padded(tiny.prompts()), NEW, Sampling((0.0, 1.0)), seed=3, rank=RANK)


@pytest.fixture(scope="module")
def learner() -> Model:
    return distill.student(M, (0, 2), "small")


# -- the loss


def oracle(logits: np.ndarray, p: np.ndarray, ids: np.ndarray) -> float:
    """KL of two laws over the ids and all the rest as one, from the definition."""
    q = np.exp(logits - logits.max())
    q /= q.sum()
    rest = np.setdiff1d(np.arange(len(q)), ids)
    mine, its = np.append(q[ids], q[rest].sum()), np.append(p[ids], p[rest].sum())
    return float((its * np.log(its / mine)).sum())


def test_the_loss_is_the_divergence_that_numpy_has():
    rng = np.random.default_rng(0)
    x, head = rng.normal(size=(2, 3, 8)), rng.normal(size=(V, 8))
    p = rng.dirichlet(np.full(V, 0.1), (2, 3))
    ids = np.argsort(-p, axis=-1)[..., :RANK]
    logp = np.log(np.take_along_axis(p, ids, axis=-1))
    top, rest = distill.logits_of(jnp.asarray(x), jnp.asarray(head), jnp.asarray(ids), V, jnp.arange(V))
    found = np.asarray(distill.divergence(top, rest, jnp.asarray(logp)))
    wanted = [[oracle(head @ x[b, t], p[b, t], ids[b, t]) for t in range(3)] for b in range(2)]
    np.testing.assert_allclose(found, wanted, rtol=2e-4)


def test_a_part_of_the_vocabulary_stands_for_all_of_it():
    """Over many draws the mean of the estimated sum is the sum; asked ids are counted once, common or drawn or neither."""
    rng = np.random.default_rng(1)
    x, head = rng.normal(size=(1, 2, 8)), rng.normal(size=(V, 8))
    ids = np.array([[[3, 40, 50], [7, 8, 9]]])
    common = np.array([3, 7, 11, 12])
    estimate = jax.jit(lambda id_U: distill.logits_of(jnp.asarray(x), jnp.asarray(head), jnp.asarray(ids), len(common), id_U)[1])
    drawn = [np.exp(estimate(jnp.asarray(distill.drawn_ids(common, V, 20, rng)))) for _ in range(600)]
    exact = [sum(np.exp(head[v] @ x[0, t]) for v in range(V) if v not in ids[0, t]) for t in range(2)]
    error = np.std(drawn, axis=0)[0] / len(drawn) ** 0.5
    assert (np.abs(np.mean(drawn, axis=0)[0] - exact) < 4 * error).all()


# -- the teacher


def test_the_target_tells_what_it_expects_behind_every_place(told):
    """Against one dense pass over the finished text: prompts and what was generated alike."""
    tokens, known = np.asarray(told.tokens_BS), np.asarray(told.known_B)
    assert known.tolist() == [length + NEW - 1 for length in tiny.LENGTHS]
    x = distill.rows(M.params, M.cfg, told.tokens_BS, told.known_B)
    truth = np.asarray(jax.nn.log_softmax(x @ M.params.head_VD.T))
    for b, n in enumerate(known):
        best = np.sort(truth[b, :n], axis=-1)[:, : -RANK - 1 : -1]
        np.testing.assert_allclose(np.asarray(told.logp_BSY[b, :n], np.float32), best, atol=0.02)
        np.testing.assert_allclose(np.take_along_axis(truth[b, :n], np.asarray(told.id_BSY[b, :n]), axis=-1), best, atol=1e-3)
    n = tiny.LENGTHS[0]
    assert tokens[0, n : n + NEW].tolist() == np.asarray(told.id_BSY)[0, n - 1 : n - 1 + NEW, 0].tolist()  # the greedy row


# -- the student


def test_steps_lower_the_loss_and_leave_the_target_alone(told, learner):
    optimiser = distill.schedule(3e-3, 8, warm=1, decay=2)
    before = jax.tree.map(np.asarray, M.params)
    state, seen = distill.begin_learning(learner, optimiser), []
    for _ in range(8):
        state, (loss, _) = distill.step(
            state, learner.params, told, jnp.arange(V), cfg=learner.cfg, optimiser=optimiser, common=V
        )
        seen.append(float(loss))
    assert seen[1] < seen[0] and seen[-1] < 0.8 * seen[0] and int(state.step) == 8
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(M.params), strict=True))
    assert jax.tree.structure(state.weights["blocks"]) == jax.tree.structure(learner.params.blocks)


def test_layers_it_does_not_have_are_refused():
    with pytest.raises(UserError, match="layers 0 to 2"):
        distill.student(M, (0, 3), "small")


# -- the folder


def test_a_saved_draft_comes_back_under_the_target_s_own_embedding(tmp_path, learner):
    d = load_layers(save_layers(tmp_path / "draft", learner, (0, 2), M, {}), M)
    assert d.params.embed_VD is M.params.embed_VD and d.params.head_VD is M.params.head_VD and d.cfg == learner.cfg
    for a, b in zip(jax.tree.leaves(d.params.blocks), jax.tree.leaves(learner.params.blocks), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-8)
    DraftModel(d.cfg, 4).check(M.attach(draft=d.params))


def test_folders_that_do_not_fit_are_refused_with_the_fix(tmp_path, learner):
    folder = save_layers(tmp_path / "draft", learner, (0, 2), M, {})
    wide = dataclasses.replace(tiny.CFG, D=64)
    with pytest.raises(UserError, match=r"D 32 and not 64"):
        load_layers(folder, dataclasses.replace(M, cfg=wide))
    with pytest.raises(UserError, match="other weights"):
        load_layers(folder, dataclasses.replace(M, params=jax.tree.map(lambda x: 2 * x, M.params)))
    with pytest.raises(UserError, match="no preset"):
        load(folder)
    with pytest.raises(UserError, match="exists"):
        save_layers(folder, learner, (0, 2), M, {})
    with pytest.raises(UserError, match="not made of layers"):
        save_layers(tmp_path / "other", learner, (0,), M, {})
    (folder / "layers.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="sha256"):
        load_layers(folder, M)


# -- what is released, and what it was trained on


def test_the_released_draft_is_small_and_says_what_it_is():
    head, data = json.loads((RELEASED / "config.json").read_text()), (RELEASED / "layers.safetensors").read_bytes()
    assert sum(file.stat().st_size for file in RELEASED.iterdir()) < 20_000_000
    assert hashlib.sha256(data).hexdigest() == head["sha256"] and head["target"]["name"] in PRESETS
    assert {"recipe", "seed", "tokens", "acceptance"} <= head["about"].keys()
    assert len(head["about"]["acceptance"]["held out"]["right"]) == 4


def test_the_released_draft_loads_under_a_model_of_its_target_s_shape():
    """Not under the target itself, which not every machine has; in bfloat16, at which the target's fingerprint is not asked for."""
    cfg = Config("smollm2-135m", V=49152, D=576, F=1536, L=30, N=9, K=3, H=64, max_len=8192)
    target = Model(cfg, tiny.params(), None, Precision("bfloat16"), cfg.name)
    d = load_layers(RELEASED, target)
    assert d.cfg.L == len(d.params.blocks) == 2 and d.params.embed_VD is target.params.embed_VD
    for block in d.params.blocks:
        assert block.q_NHD.shape == (9, 64, 576) and block.down_DF.shape == (576, 1536) and block.q_NHD.dtype == "bfloat16"
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(block))


def test_wordings_of_the_training_share_no_eight_words_with_the_evaluation():
    asked = [wording.format(subject) for wording in openings.CHATS for subject in openings.SUBJECTS]
    said = "\n".join((*asked, *openings.REQUESTS))
    read = (sources.text(sources.PROSE), sources.text(sources.CODE), *(prompt.text for prompt in sources.prompts()))
    assert not openings.runs(said, openings.RUN) & set().union(*(openings.runs(text, openings.RUN) for text in read))
    assert not set(sources.STDLIB_FILES) & set(sources.TRAINING_FILES)
