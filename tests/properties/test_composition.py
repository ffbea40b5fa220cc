"""Policy x pass x drafter: every combination runs or is refused with its reason, and what runs with drafts equals what runs without."""

import itertools

import numpy as np
import pytest
import runs
import tiny
from runs import listed, part, prompt

from tokeff.decode.sample import Sampling
from tokeff.generation import Setup
from tokeff.kv.some_heads import SomeHeads

pytestmark = pytest.mark.core
NAMES = {kind: [m.name for m in runs.METHODS if m.part == kind] for kind in ("kv", "cut", "decode")}
SAMPLING = Sampling(0.9, top_k=20, top_p=0.95)


def refusal(kv, cut, decode, kind) -> str | None:
    """Why a combination is refused, or None."""
    return runs.refusal(Setup(**part(kv, kind), **(part(cut) if cut else {}), **(part(decode) if decode else {})))


@pytest.mark.parametrize("kv", listed("kv"))
def test_every_combination_is_possible_or_refused_at_once(kv):
    programs = runs.programs()
    for cut, decode, kind in itertools.product([None, *NAMES["cut"]], [None, *NAMES["decode"]], ["small", "fast"]):
        reason = refusal(kv, cut, decode, kind)
        assert reason is None or ("\n" not in reason and len(reason) < 250)
        if cut is None and (decode is None or kind == "fast"):
            own = decode and part(decode)["decode"].fits(part(kv, kind)["kv"], tiny.CFG)
            assert reason is None or own, "settings at which a method is exact under drafts fit every drafter that runs no layers alone"
    assert runs.programs() == programs, "a refusal comes before anything is compiled"


# One pass of each kind: rows dropped half-way up, for every policy; a prompt that begins anew, for a few.
@pytest.mark.parametrize(
    ("kv", "cut"),
    [pytest.param(*p.values, runs.UNDER_ALL, marks=p.marks) for p in tiny.sampled(listed("kv"), runs.attending())]
    + [
        pytest.param(kv, cut, marks=pytest.mark.xdist_group(cut))
        for kv in ("Full", "H2O", "Quest") for cut in NAMES["cut"] if cut != runs.UNDER_ALL
    ],
)
def test_policy_over_a_pass_decodes(kv, cut):
    """Every policy packs what a pass let through and decodes from it: finite logits, no row twice, the newest row read."""
    if refusal(kv, cut, None, "small"):
        return
    policy, p = runs.over(cut, part(kv)["kv"]), prompt(cut)
    packed = tiny.packed(policy, p)
    for t, (logits, layers) in enumerate(tiny.forced(policy, packed, p, runs.GIVEN[:, :2])):
        assert np.isfinite(logits).all()
        for layer in layers:
            for b, heads in enumerate(tiny.kept(policy, layer)):
                for orders in filter(None, heads) if isinstance(policy, SomeHeads) else heads:
                    assert len(set(orders)) == len(orders) and orders[-1] == int(p.next_B[b]) + t


@pytest.mark.parametrize("name", tiny.sampled(listed("kv"), runs.attending()))
def test_drafts_under_a_policy_equal_one_token_decoding_under_it(name):
    """Tree drafts, ragged batch; evicting policies in blocks, compared with one-token decoding that evicts at the same boundaries."""
    s = runs.decoded(kv=name, decode="TokenRecycling", kind="fast")
    assert tiny.text(s) == tiny.text(runs.decoded(kv=name, kind="fast"))
    assert int(s.passes_B.min()) < tiny.NEW - 1, "no draft was ever accepted, so nothing was tested"


SAMPLE = [
    ("Full", "GemFilter", "TokenRecycling"),
    ("Full", "PromptDistill", "TokenRecycling"),
    ("H2O", "PromptDistill", "TokenRecycling"),
    ("TidalDecode", "GemFilter", "PromptLookup"),
    ("H2O", None, "PromptLookup"),
    ("AdaKV", None, "PromptLookup"),
]


@pytest.mark.parametrize(
    ("kv", "cut", "decode"), [pytest.param(*parts, marks=pytest.mark.xdist_group(parts[1] or parts[0])) for parts in SAMPLE]
)
def test_sampled_combinations_equal_plain(kv, cut, decode):
    s = runs.decoded(kv=kv, cut=cut, decode=decode, kind="fast")
    assert tiny.text(s) == tiny.text(runs.decoded(kv=kv, cut=cut, kind="fast"))


@pytest.mark.xdist_group("Full")
def test_sampled_text_depends_on_seed_and_row_alone():
    """The same tokens whatever the batch mates, the padding, the chunks and the drafts; another seed gives others."""
    text = tiny.text(runs.generate(how=SAMPLING))
    assert tiny.text(runs.generate(how=SAMPLING, decode="TokenRecycling")) == text
    assert tiny.text(runs.generate(how=SAMPLING, form="chunked")) == text
    assert tiny.text(runs.generate(how=SAMPLING, form="swapped", rows=(1, 0))) == text[::-1]
    assert tiny.text(runs.generate(how=SAMPLING, form="single", rows=(1,))) == text[1:], "without the padding of a longer mate"
    assert tiny.text(runs.generate(how=SAMPLING, seed=1)) != text
    assert text != tiny.text(runs.decoded())
