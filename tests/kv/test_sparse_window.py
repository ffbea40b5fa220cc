"""ALISA with all rows held: what it reads, against its oracle; rows that were left out come back; what it refuses."""

from math import ceil

import pytest
import tiny
from oracles import policies as oracle
from oracles.against import agree, dense

from tokeff.errors import UserError
from tokeff.kv import methods as kv
from tokeff.kv.cache import Room
from tokeff.kv.extend import pack
from tokeff.kv.sparse_window import SparseWindow
from tokeff.models.flow import Here

pytestmark = pytest.mark.core


def caches(share: float, steps: int, recent: float | int):
    """One oracle cache per prompt."""
    rows = [ceil(share * n) for n in tiny.LENGTHS]
    return [oracle.ALISA(*dense(b)[:2], n, steps, recent if isinstance(recent, int) else int(recent * n)) for b, n in enumerate(rows)]


@pytest.mark.parametrize(("share", "steps", "recent"), [(0.3, 3, 0.5), (0.5, 16, 9)])
def test_equals_its_oracle(share, steps, recent):
    found = caches(share, steps, recent)
    agree(SparseWindow(share, steps, recent, host=False), found)
    if steps == 3:
        assert returned(found[0]), "no row came back, so this tests less than it says"


def returned(cache) -> bool:
    """Whether a head read a row again that it had left out before."""
    reads, gone = {}, {}
    for layer, head, _, rows in cache.read:
        at, before = (layer, head), reads.get((layer, head), set())
        if gone.get(at, set()) & set(rows):
            return True
        gone[at] = gone.get(at, set()) | (before - set(rows))
        reads[at] = set(rows)
    return False


def test_bytes_read_by_hand():
    """32 rows of keys and values, and everything small whole."""
    policy = SparseWindow(0.5, 4, host=False)
    layer = pack(policy, tiny.read(policy).layers, Room(4), tiny.CFG)[0]
    B, K, T, C = layer.mass_BKTC.shape
    assert policy.bytes_read(layer, Here(0, tiny.CFG)) == 4 * (B * K * (T * C + C + 2 * tiny.CFG.H * 32) + 4 * B)


@pytest.mark.parametrize(("make", "word"), [
    (lambda: kv.alisa(0.5, 4, evict=2, host=True), "evict"),
    (lambda: kv.alisa(1, host=True).check(tiny.CFG, 64), "recent"),
    (lambda: kv.alisa(0.5, recent=1.0, host=True).check(tiny.CFG, 64), "recent"),
    (lambda: kv.alisa(0.5, 0, host=True), "steps"),
])  # fmt: skip
def test_refused(make, word):
    with pytest.raises(UserError, match=word):
        make()


def test_drafts_are_refused():
    assert "before it" in str(kv.alisa(0.5, host=True).drafts(2))
