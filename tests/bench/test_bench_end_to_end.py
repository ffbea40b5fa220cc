"""The benchmark of a whole model with its kernels and without, on a tiny model and a tiny shape."""

import json
import math

import jax
import jax.numpy as jnp
import pytest
from tiny import CFG, params

from tokeff.bench import common, device, end_to_end
from tokeff.kernels import decode_attention, dispatch
from tokeff.kv.methods import kivi
from tokeff.models.config import Config, Precision
from tokeff.models.load import Model
from tokeff.sparse.methods import quest

pytestmark = pytest.mark.core
PARTS = end_to_end.settings(0.5, 4) | {
    "pages": (quest(0.5, page=4, dense=()), end_to_end.Plain()),
    "int4": (kivi(4, group=8, residual=8), end_to_end.Plain()),
}


@pytest.fixture(scope="module")
def tiny():
    return Model(CFG, params(), None, Precision(), "tiny")


@pytest.mark.parametrize("setting", ["prefill", "pages", "int4", "tree"])
def test_a_setting_is_timed_with_and_without(tiny, setting):
    row = end_to_end.row(tiny, setting, (32, 64), steps=2, rounds=2, parts=PARTS, nbytes=2**20, side=64)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert (row["setting"], row["context"], row["without"]) == (setting, 32 if setting == "prefill" else 64, "reference")
    for name in ("ms", "without_ms", "speedup", "floor_ms", "of_floor"):
        assert math.isfinite(row[name]) and row[name] > 0, name
    assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])


def test_what_is_forced_runs_and_is_a_program_of_its_own(monkeypatch):
    ran = []

    def recorded(name, run):
        return lambda *arrays, **options: ran.append(name) or run(*arrays, **options)

    monkeypatch.setattr(dispatch, "_compiled", lambda op, name, options: recorded(name, lambda *a: op.run[name](*a, **dict(options))))
    x = jnp.ones((1, 1, 2, 4))
    order, at = jnp.zeros((1, 1, 2), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    attend = jax.jit(lambda x: decode_attention(x[:, :1, :1], x, x, order, at, at, scale=1.0)[0])
    attend(x)
    assert ran and "reference" not in ran
    ran.clear()
    for _ in range(2):
        with dispatch.forced("reference"):
            attend(x)
        attend(x)
    assert ran == ["reference"]  # traced once, and told apart by jit
    with pytest.raises(ValueError, match="implementation 'cuda' is unknown"):
        dispatch.forced("cuda")


def test_random_weights_have_the_shape_of_the_model():
    m = end_to_end.random_model(CFG, Precision())
    assert jax.tree.map(jnp.shape, m.params) == jax.tree.map(jnp.shape, params())
    assert 0.01 < float(jnp.std(m.params.embed_VD)) < 0.03


def test_operations_of_a_prefill_are_those_of_its_products(tiny):
    rows = 32
    weights = sum(x.size for block in tiny.params.blocks for name, x in vars(block).items() if x is not None and "norm" not in name)
    pairs = rows * (rows + 1) / 2
    assert end_to_end.flops(CFG, rows) == 2 * rows * weights + 2 * CFG.V * CFG.D + 4 * CFG.L * CFG.N * CFG.H * pairs


def test_it_is_the_last_part_of_a_device(tmp_path, monkeypatch):
    """Each setting is a case: it is done once, and its row is in the file of the device."""
    small = Config("small", V=61, D=32, F=48, L=2, N=4, K=2, H=8, max_len=4096)
    monkeypatch.setattr(end_to_end, "SHAPES", {"other": small})
    monkeypatch.setattr(end_to_end, "CONTEXTS", {"other": (32, 64)})
    monkeypatch.setattr(end_to_end, "READ_BYTES", 2**20)
    monkeypatch.setattr(end_to_end, "SIDE", {"other": 64})
    args = ["--platform", "cpu", "--rounds", "1", "--out", str(tmp_path)]
    known = device._parse([*args, "--inside", device.MODEL])
    found = device.parts(known)
    assert list(found)[-1] == device.MODEL and tuple(found[device.MODEL]) == device.SETTINGS == tuple(end_to_end.settings())
    monkeypatch.setattr(device, "SETTINGS", ("dense",))
    for _ in range(2):
        assert device._inside(known, [*args, "--inside", device.MODEL]) == 0
    (row,) = json.loads(common.path_of(tmp_path).read_text())["end-to-end"]["rows"]
    assert row["setting"] == "dense" and row["model"] == "small" and row["ms"] > 0
    monkeypatch.setattr(device, "NEEDED", ("a_package_that_is_not_there",))
    assert device.MODEL not in device.parts(known)


@pytest.mark.parametrize(("args", "words"), [(["--settings", "tre"], "did you mean 'tree'"), (["--contexts", "0", "64"], "at least 1")])
def test_mistakes_are_refused_before_anything_is_measured(args, words, tmp_path):
    with pytest.raises(end_to_end.UserError, match=words):
        end_to_end.main([*args, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
