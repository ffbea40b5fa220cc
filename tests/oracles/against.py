"""tokeff beside an oracle: the same given tokens, one at a time, compared after every one."""

from functools import cache

import numpy as np
import runs
import tiny
from oracles import model as oracle

from tokeff.kv.cache import Room

STEPS = 10
ATOL = 5e-4  # float32 against float64, logits up to 12
GIVEN = np.random.default_rng(2).integers(0, tiny.CFG.V, (len(tiny.LENGTHS), STEPS))


@cache
def dense(b: int, cfg=tiny.CFG):
    """(model, Seen of each layer, logits) of the oracle's prefill of prompt b."""
    model = oracle.Model(tiny.params(cfg), cfg)
    return model, *oracle.prefill(model, tiny.prompts()[b])


@cache
def read(evidence, cut=None, cfg=tiny.CFG):
    """tokeff's prefill of both prompts with this evidence: the one that all tests share, where it has it."""
    if cut is None and cfg is tiny.CFG and set(evidence) <= set(runs.evidence()):
        return runs.prompt()
    return tiny.read(tiny.FULL, evidence=evidence, cut=cut, cfg=cfg)


def agree(policy, caches, cut=None, cfg=tiny.CFG, compare_kept=True):
    """Assert equal logits and kept rows. caches: one oracle cache per prompt; their first row follows the prompt's last."""
    prompt = read(policy.needs(), cut, cfg)
    packed = tiny.packed(policy, prompt, Room(STEPS), cfg=cfg)
    if compare_kept:
        same_rows(policy, packed, caches, "after the prompt")
    steps = [oracle.decode(c.m, c, GIVEN[b], int(prompt.next_B[b])) for b, c in enumerate(caches)]
    for t, (logits, layers) in enumerate(tiny.forced(policy, packed, prompt, GIVEN, cfg=cfg)):
        wanted = np.stack([next(step)[0] for step in steps])
        np.testing.assert_allclose(logits, wanted, atol=ATOL, err_msg=f"logits after token {t}")
        if compare_kept:
            same_rows(policy, layers, caches, f"after token {t}")


def same_rows(policy, layers, caches, when: str):
    """Assert that every layer and head of every sequence holds the oracle's rows."""
    for i, layer in enumerate(layers):
        for b, heads in enumerate(tiny.kept(policy, layer)):
            for h, orders in enumerate(heads):
                assert orders == caches[b].kept(i, h), f"{when}: layer {i}, sequence {b}, head {h}"
