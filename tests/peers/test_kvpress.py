"""kvpress beside tokeff: the same weights and prompt, the same rule on both sides, and then the same scores and kept rows.

kvpress' ratio is the share removed, and its number of rows is rounded down; ours are given as numbers of rows. Where the two rules
differ by intention, the settings here make them one; docs/peers.md says what they are and what cannot be made equal.
"""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tokeff.bench.peer import peers_python
from tokeff.kv import methods as kv
from tokeff.kv.budget import Spread
from tokeff.kv.cache import Room
from tokeff.kv.evidence import QueryMoments, QuerySquares
from tokeff.kv.extend import pack
from tokeff.kv.heads import far_reach
from tokeff.kv.pool import KeepByHead
from tokeff.kv.prefill import prefill
from tokeff.kv.score import Shared
from tokeff.models.config import Precision
from tokeff.models.flow import Here
from tokeff.models.load import load

pytestmark = [pytest.mark.peers, pytest.mark.xdist_group("kvpress")]
SCRIPT = Path(__file__).with_name("presses.py")
MODELS = ("llama", "qwen3")
S, KEPT, W, SINKS, GROUP = 120, 60, 8, 4, 2
ASK, PLACES = (3, 5), 64
HEADS = ((0,), (), (1,))
RATIO = {"compression_ratio": 1 - (KEPT + 0.5) / S}  # rounded down, KEPT rows
WINDOW = {**RATIO, "window_size": W, "kernel_size": 5}
SNAP = ["SnapKVPress", WINDOW]
UNPOOLED = ["SnapKVPress", {"compression_ratio": 0.5, "window_size": 20, "kernel_size": 1}]
NEXT = {**RATIO, "n_future_positions": 64}
EXPECTED, FLOOR = ["ExpectedAttentionPress", NEXT], ["ExpectedAttentionPress", {**NEXT, "epsilon": 0.01}]


@dataclass(frozen=True)
class Case:
    """Our policy and their press. theirs = factor * ours from the first row of `scored` to before the last (None: no scores to compare)."""

    policy: Any
    press: list
    scored: tuple[int, int] | None = (0, S)
    factor: Callable[[np.ndarray], np.ndarray] | float = 1.0
    rows: bool = True


def alike(policy):
    """The policy with one score for all heads of a layer."""
    return replace(policy, score=Shared(policy.score))


def per_query(order):
    """One over how many queries saw a row."""
    return 1 / (S - order)


BEFORE, MEAN = (0, S - W), 1 / (W * GROUP)
CASES = {
    "Knorm": Case(kv.knorm(KEPT), ["KnormPress", RATIO]),
    "KeyDiff": Case(kv.keydiff(KEPT), ["KeyDiffPress", RATIO]),
    # Ties between partitions fall otherwise: a budget of whole ranks, 4 rows of each of 13 partitions, has none.
    "LagKV": Case(
        kv.lagkv(68, 8), ["LagKVPress", {"compression_ratio": 1 - 68.5 / S, "n_sink": SINKS, "lag_size": 8}], (SINKS, 108)
    ),
    "SnapKV": Case(kv.snapkv(KEPT, W, 5), SNAP, BEFORE, MEAN),
    # Their pyramid counts the window in every layer's share, ours adds it: this beta gives 99, 60 and 21 rows to both.
    "PyramidKV": Case(
        kv.pyramidkv(KEPT, W, 5, beta=4), ["PyramidKVPress", {**WINDOW, "compression_ratio": 0.5, "beta": 60 / 21}], BEFORE, MEAN
    ),
    "TOVA": Case(replace(kv.tova(KEPT), recent=1), ["TOVAPress", RATIO], (0, S - 1), 1 / GROUP),
    "H2O": Case(kv.h2o(KEPT), ["ObservedAttentionPress", RATIO], (0, S), lambda order: per_query(order) / GROUP, rows=False),
    "ExpectedAttention": Case(kv.expected_attention(KEPT, 64), EXPECTED, (SINKS, S)),
    "ExpectedAttention, floor": Case(kv.expected_attention(KEPT, 64, floor=0.01), FLOOR, (SINKS, S)),
    "StreamingLLM": Case(kv.streaming_llm(KEPT), ["StreamingLLMPress", RATIO], None),
    # Chunks that the window fills, and the sum over heads, as kvpress takes chunks.
    "ChunkKV": Case(alike(kv.chunkkv(KEPT, 20, 10)), ["ChunkKVPress", {"press": UNPOOLED, "chunk_length": 10}], None),
    # Their floor is of all rows, the window's among them; ours of what the window leaves: 8 + ceil(0.25 * 52) = 21 of 60.
    "AdaKV": Case(
        kv.adakv(KEPT, W, 5, "avg", 0.25), ["AdaKVPress", {"press": SNAP, "alpha_safeguard": 21.5 / KEPT}], BEFORE, MEAN
    ),
    "AdaKV, expected": Case(
        KeepByHead(kv.expected_attention(KEPT, 64, floor=0.01), Spread(0.25)),
        ["AdaKVPress", {"press": FLOOR, "alpha_safeguard": 18.5 / KEPT}], (SINKS, S),
    ),
    "DuoAttention": Case(kv.duo_attention(HEADS, 16), ["Duo", {"heads": HEADS, "sinks": SINKS, "recent": 12}], None),
    "KVzip": Case(
        kv.kvzip(KEPT, SINKS, 40, ASK), ["KVzip", {"compression_ratio": 0.5, "n_sink": SINKS, "chunk_size": 40}], (SINKS, S)
    ),
}  # fmt: skip
OTHERS = {
    "ThinK": ["ThinKPress", {"key_channel_compression_ratio": 0.4, "window_size": W}],
    "StreamingLLM, rotated": ["KeyRerotationPress", {"press": ["StreamingLLMPress", RATIO]}],
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(folder of the models, what kvpress found, by model)."""
    if (python := peers_python()) is None:
        pytest.skip("no peers environment: make peers, or set TOKEFF_PEERS_PYTHON")
    folder = tmp_path_factory.mktemp("kvpress")
    presses = {name: case.press for name, case in CASES.items()} | OTHERS
    (folder / "cases.json").write_text(json.dumps({"rows": S, "models": MODELS, "ask": ASK, "places": PLACES, "cases": presses}))
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(python), str(SCRIPT), str(folder)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, {name: np.load(folder / f"{name}.npz") for name in MODELS}


@pytest.fixture(scope="module")
def ours(theirs):
    """(cfg, the prefill with all evidence), by model."""

    def read(name):
        m, tokens = load(theirs[0] / name, Precision()), jnp.asarray(np.load(theirs[0] / "tokens.npy"), jnp.int32)
        asked = (QueryMoments(0), QuerySquares(W), *(kind for case in CASES.values() for kind in case.policy.needs()))
        return m.cfg, prefill(m.params, m.cfg, tokens, jnp.array([S]), evidence=tuple(dict.fromkeys(asked)), dtype="float32").layers

    return {name: read(name) for name in MODELS}


def rule(policy):
    """The `Keep` whose scores and protection a policy has."""
    return getattr(policy, "rule", policy)


def kept(policy, layers, cfg):
    """kept_LKS after the prompt."""
    found = np.zeros((cfg.L, cfg.K, S), bool)
    for i, layer in enumerate(pack(policy, layers, Room(0), cfg)):
        for head, orders in enumerate(np.asarray(policy.kept(layer))[0]):
            found[i, head, orders[orders >= 0]] = True
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.scored])
def test_scores_agree(theirs, ours, name, model):
    case, (cfg, layers) = CASES[name], ours[model]
    score = rule(case.policy).score
    mine = np.stack([np.asarray(score.first(rows, Here(i, cfg)))[0] for i, rows in enumerate(layers)])
    order = np.arange(S)
    factor = case.factor(order) if callable(case.factor) else case.factor
    wanted = theirs[1][model][f"{name}/score"]
    np.testing.assert_allclose((mine * factor)[..., slice(*case.scored)], wanted[..., slice(*case.scored)], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.rows])
def test_kept_rows_agree(theirs, ours, name, model):
    wanted = theirs[1][model][f"{name}/kept"]
    mine = kept(CASES[name].policy, ours[model][1], ours[model][0])
    assert not wanted.all() and mine.sum() == wanted.sum()
    np.testing.assert_array_equal(mine, wanted)


def test_rows_differ_between_methods(theirs):
    """The comparison means something: presses with different rules keep different rows."""
    found = theirs[1]["llama"]
    rows = {name: found[f"{name}/kept"].tobytes() for name in CASES}
    assert len(set(rows.values())) == len(rows)


@pytest.mark.parametrize("model", MODELS)
def test_attention_per_query_keeps_their_rows(theirs, ours, model):
    """H2O's column sums, divided by how many queries saw a row as theirs are, rank rows as theirs do."""
    cfg, layers = ours[model]
    score = CASES["H2O"].policy.score
    mine = np.stack([np.asarray(score.first(rows, Here(i, cfg)))[0] for i, rows in enumerate(layers)]) * per_query(np.arange(S))
    rank = (-mine).argsort(axis=-1).argsort(axis=-1)
    np.testing.assert_array_equal(rank < KEPT, theirs[1][model]["H2O/kept"])


@pytest.mark.parametrize("model", MODELS)
def test_channels_by_all_keys_agree(theirs, ours, model):
    """Their ThinK weighs channels by the keys of all rows and thins all; ours spares the window's. The queries' part is the same."""
    cfg, layers = ours[model]
    for i, rows in enumerate(layers):
        worth = np.asarray(rows.evidence_BKS[QuerySquares(W)])[0] * np.square(np.asarray(rows.k_BKSH)[0]).sum(axis=1)
        stay = worth >= np.sort(worth, axis=-1)[:, [int(0.4 * cfg.H)]]
        np.testing.assert_array_equal(stay, theirs[1][model]["ThinK/channel"][i])


@pytest.mark.parametrize("model", MODELS)
def test_keys_turned_to_their_place_in_the_cache_agree(theirs, ours, model):
    """StreamingLLM's positions: with kvpress' KeyRerotationPress, and as ours are read when the next row comes."""
    (cfg, layers), policy = ours[model], CASES["StreamingLLM"].policy
    for i, layer in enumerate(pack(policy, layers, Room(0), cfg)):
        view = policy.rotated(layer, jnp.array([S]), Here(i, cfg))
        keys, order = np.asarray(view.k_BKCH)[0], np.asarray(layer.order_BKC)[0]
        mine = np.stack([k[o >= 0][np.argsort(o[o >= 0])] for k, o in zip(keys, order)])
        np.testing.assert_allclose(mine, theirs[1][model]["StreamingLLM, rotated/key"][i], atol=2e-5)


@pytest.mark.parametrize("model", MODELS)
def test_reach_of_heads_agrees(theirs, ours, model):
    """DuoAttention's score on the fly, with no row left out of the means."""
    cfg, layers = ours[model]
    reach = partial(far_reach, ask=QueryMoments(0), places=PLACES)
    mine = np.stack([reach(rows, here=Here(i, cfg)) for i, rows in enumerate(layers)])
    np.testing.assert_allclose(mine, theirs[1][model]["reach"], rtol=1e-4)
