"""TransMLA's conversion against its oracle, with bases of the prompt and of another text; what it loses, and the bytes of its rows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from oracles import latent as oracle
from oracles import model as plain
from oracles.against import ATOL, GIVEN, STEPS, agree, dense, read

from tokeff.decode.loop import run
from tokeff.decode.methods import token_recycling
from tokeff.decode.sample import GREEDY
from tokeff.errors import UserError
from tokeff.kv import methods as kv
from tokeff.kv.cache import Room
from tokeff.kv.convert import convert
from tokeff.kv.extend import extend, pack
from tokeff.kv.policy import tree_bytes
from tokeff.kv.prefill import prefill
from tokeff.listing import find
from tokeff.models.config import Precision, Rope
from tokeff.models.flow import Here
from tokeff.models.load import Model

pytestmark = pytest.mark.core
K, H = tiny.CFG.K, tiny.CFG.H
TINY = Model(tiny.CFG, tiny.params(), None, Precision(), "tiny")
OTHER = tuple(np.random.default_rng(5).integers(0, tiny.CFG.V, 80).tolist())


@pytest.mark.parametrize(
    ("rope", "rank", "heads", "directions"),
    [
        (0.5, 0.5, 1, 12), (0.5, 1.0, 1, 24), (1.0, 0.5, 2, 8), (1.0, 1.0, 2, 16), (0.5, 7, 1, 7), (0.125, 99, 1, 24),
        (4, 9, 0.5, 9), (12, 0.5, 1.5, 10), (8, 12, 1, 12),
    ],
)  # fmt: skip
def test_transmla_equals_its_oracle(rope, rank, heads, directions):
    agree(kv.transmla(rank, rope), [oracle.TransMLA(*dense(b)[:2], oracle.of_text(dense(b)[1], heads, directions)) for b in range(2)])


@pytest.mark.parametrize(("rope", "rank", "heads", "directions"), [(0.5, 0.5, 1, 12), (1.0, 1.0, 2, 16), (4, 12, 0.5, 12)])
def test_a_converted_model_equals_its_oracle(rope, rank, heads, directions):
    """Bases of another text, the same for every prompt, beside the weights and not in the cache."""
    model, _, _ = dense(0)
    found = oracle.of_text(plain.prefill(model, OTHER)[0], heads, directions)
    caches = [oracle.TransMLA(*dense(b)[:2], found) for b in range(2)]
    policy, params = kv.transmla(rank, rope, converted=True), convert(TINY, OTHER, rope).params
    tokens, length = tiny.padded(tiny.prompts())
    prompt = prefill(params, tiny.CFG, tokens, length, evidence=policy.needs())
    layers, one = pack(policy, prompt.layers, Room(STEPS), tiny.CFG), jnp.ones(2, jnp.int32)
    assert all(layer.bases is None for layer in layers)
    steps = [plain.decode(model, c, GIVEN[b], int(prompt.next_B[b])) for b, c in enumerate(caches)]
    for t in range(STEPS):
        token = jnp.asarray(GIVEN[:, t : t + 1], jnp.int32)
        logits, layers = extend(params, tiny.CFG, layers, token, prompt.next_B + t, one, policy)
        np.testing.assert_allclose(logits[:, 0], np.stack([next(step)[0] for step in steps]), atol=ATOL)


def error(rank: float, rope: float, cfg=tiny.CFG) -> float:
    """Root mean square of what the logits lose."""
    prompt, logits = read((), cfg=cfg), []
    for policy in (kv.full(), kv.transmla(rank, rope)):
        packed = pack(policy, prompt.layers, Room(STEPS), cfg)
        logits.append(np.stack([out for out, _ in tiny.forced(policy, packed, prompt, GIVEN[:, :4], cfg=cfg)]))
    return float(np.sqrt(np.square(logits[0] - logits[1]).mean()))


def test_what_is_lost_is_rank_and_rotation():
    """At full rank only the heads without rotation stand between the conversion and dense: the loss that the paper trains away."""
    assert error(1.0, 1.0) < 1e-4
    by_rank = [error(rank, 1.0) for rank in (0.25, 0.5, 1.0)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert error(1.0, 0.5) > 100 * error(1.0, 1.0)


@pytest.mark.parametrize(
    "changes",
    [{"softcap": 3.0}, {"windows": (None, 20, None)}, {"rope": Rope(kind="yarn", factor=4.0, original_len=64, attention_factor=1.3)}],
    ids=["softcap", "windows", "yarn"],
)
def test_full_rank_is_the_model_itself_whatever_its_attention(changes):
    assert error(1.0, 1.0, dataclasses.replace(tiny.CFG, **changes)) < 1e-4


@pytest.mark.parametrize("K", [8, 32], ids=["like Llama-3.1-8B", "like Llama-2-7B"])
def test_paper_rows_are_512_directions_and_64_rotated_numbers(K):
    policy, cfg = find("TransMLA").build(**find("TransMLA").settings("paper")), dataclasses.replace(tiny.CFG, N=32, K=K, H=128)
    assert (policy.near(cfg), policy.low(cfg)) == (64, 512)


def test_rows_hold_what_the_shares_say():
    """A row of a layer is 1 of 2 heads * 8, and half of 8 + 16 directions, for all heads, where dense holds 2 * 2 * 8."""
    for policy, params in ((kv.transmla(0.5, 0.5), tiny.params()), (kv.transmla(0.5, 0.5, True), convert(TINY, OTHER, 0.5).params)):
        tokens, length = tiny.padded(tiny.prompts())
        prompt = prefill(params, tiny.CFG, tokens, length, evidence=policy.needs())
        layer = pack(policy, prompt.layers, Room(STEPS), tiny.CFG)[0]
        assert layer.low_BCY.shape == (2, 80, 8 + 12)
        own = 0 if policy.converted else 2 * K * 2 * H * 20 + 2
        assert policy.bytes_read(layer, Here(0, tiny.CFG)) == tree_bytes(layer) == 4 * (2 * 80 * 20 + 2 * 80 + 2 + own)


def test_drafts_equal_one_token_decoding_with_bases_beside_the_weights():
    policy, params, drafter = kv.transmla(0.5, 0.5, True), convert(TINY, OTHER, 0.5).params, token_recycling(tiny.TREE)
    tokens, length = tiny.padded(tiny.prompts())
    prompt = prefill(params, tiny.CFG, tokens, length, evidence=policy.needs())
    found = []
    drafters: tuple[Any, ...] = (tiny.PLAIN, drafter)
    for how in drafters:
        s = run(params, tiny.CFG, tiny.start(prompt, policy, how), jnp.int32(99), policy=policy, drafter=how, how=GREEDY, eos=())
        found.append((tiny.text(s), int(s.passes_B.min())))
    (one, _), (many, passes) = found
    assert one == many and passes < tiny.NEW - 1


def test_gradients_reach_the_bases():
    """They are learned parts like any other: training them is what the paper does next."""
    policy, m = kv.transmla(0.5, 0.5, True), convert(TINY, OTHER, 0.5)
    tokens, length = tiny.padded(tiny.prompts())
    prompt = prefill(m.params, tiny.CFG, tokens, length, evidence=policy.needs())
    layers = pack(policy, prompt.layers, Room(4), tiny.CFG)

    def loss(params):
        logits, _ = extend(params, tiny.CFG, layers, jnp.asarray(GIVEN[:, :3], jnp.int32), prompt.next_B, jnp.full(2, 3), policy)
        return -jax.nn.log_softmax(logits)[..., 7].mean()

    slopes = [block.side["latent8_KHY"] for block in jax.grad(loss)(m.params).blocks]
    assert all(float(jnp.abs(slope[..., : 8 + 12]).max()) > 1e-6 for slope in slopes)
    assert all(float(jnp.abs(slope[..., 8 + 12 :]).max()) == 0 for slope in slopes)


BAD = [{"rank": 0.0}, {"rank": 1.5}, {"rank": 0}, {"rope": 0.0}, {"rope": 2.0}, {"rope": 3}, {"rope": 18}]


@pytest.mark.parametrize("given", BAD, ids=str)
def test_bad_settings(given):
    with pytest.raises(UserError, match=next(iter(given))) as e:
        kv.transmla(**given).check(tiny.CFG, 64)
    assert "\n" not in str(e.value)


def test_a_rank_that_the_prompt_does_not_determine_is_refused():
    with pytest.raises(UserError, match="rank=11 or less"):
        kv.transmla(0.5, 0.5).check(tiny.CFG, 11)
    kv.transmla(0.5, 0.5).check(tiny.CFG, 12)
    kv.transmla(1.0, 0.5).check(tiny.CFG, 3)  # all directions are all directions
    kv.transmla(0.5, 0.5, True).check(tiny.CFG, 3)
    with pytest.raises(UserError, match="longer text"):
        convert(TINY, OTHER[:23], 0.5)


def test_a_model_that_was_not_converted_is_refused():
    for m in (TINY, convert(TINY, OTHER, 1.0)):
        with pytest.raises(UserError, match="convert"):
            kv.transmla(0.5, 0.5, True).fit(m)
    assert kv.transmla(0.5, 0.5, True).fit(convert(TINY, OTHER, 0.5)) == kv.transmla(0.5, 0.5, True)
