"""Drafts longer than the sliding windows of the model: what they push out of sight changes no token."""

import dataclasses
from math import ceil

import pytest
import tiny
from adversaries import Bush, Replay
from driven import SMALL, decode, lower, model, plain
from oracles.float64 import float64_model

from tokeff.decode.methods import draft_model, early_exit, equal_growth, token_recycling
from tokeff.kv import methods as kv

pytestmark = [pytest.mark.core, pytest.mark.xdist_group("windows")]
FULL, H2O = kv.full(), kv.h2o(0.5, evict=8)
CFG = dataclasses.replace(tiny.CFG, name="windowed", windows=(4, None, 4))
NEAR = dataclasses.replace(SMALL, name="small windowed", windows=(4, None))
LENGTH = 6  # the root and six drafts: the last ones do not see the first


@pytest.fixture(autouse=True, scope="module")
def double():
    with float64_model():
        yield


def answers() -> tuple[tuple[int, ...], ...]:
    """Prompt and greedy continuation of each row."""
    return tuple((*row, *new) for row, new in zip(tiny.prompts(), plain(FULL, cfg=CFG), strict=True))


def test_the_windows_matter():
    assert plain(FULL, cfg=CFG) != plain(FULL)


@pytest.mark.parametrize("drafter", [Replay, Bush], ids=["chain", "tree"])
def test_right_drafts_are_all_accepted(drafter):
    """Accepted paths are longer than the window, so a pass needs rows of its own that its first rows hide, and the next one their slots. In
    the tree the rows of a path do not stand side by side."""
    s = decode(FULL, drafter(answers(), LENGTH), model(CFG))
    assert tiny.text(s) == plain(FULL, cfg=CFG)
    assert s.passes_B.tolist() == [ceil((tiny.NEW - 1) / (LENGTH + 1))] * 2


def deep() -> tuple[tuple[int, ...], ...]:
    """One long path, and a second child of each of its nodes."""
    return tuple(path for n in range(LENGTH) for path in ((0,) * n + (0,), (0,) * n + (1,)))


DRAFTERS = {
    "recycling": token_recycling(deep()),
    "exit": early_exit(2, LENGTH),
    "model": draft_model(NEAR, LENGTH),
    "growth": equal_growth(NEAR, LENGTH, 2, 2),
}


@pytest.mark.proof
@pytest.mark.parametrize("policy", [FULL, H2O], ids=["full", "h2o"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_text_is_that_of_plain_decoding(name, policy):
    """Of drafts that are sometimes right, made by layers with windows too."""
    s = decode(policy, DRAFTERS[name], model(CFG, draft=lower(NEAR.L, CFG)))
    assert tiny.text(s) == plain(policy, cfg=CFG)
    assert int(s.passes_B.min()) < tiny.NEW - 1, "no draft was ever accepted, so nothing was tested"
