"""The table: a field's name gives its layout."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import sharded
from jax.sharding import PartitionSpec as P

from tokeff import sharding
from tokeff.errors import UserError
from tokeff.kv.policy import Ask, Prefilled

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("k_BKCH", (8, 4, 10, 8), P("data", "model", None, None)),
        ("embed_VD", (64, 32), P("model", None)),
        ("o_DNH", (32, 8, 4), P(None, "model", None)),
        ("owner_BP", (2, 12), P("data", "model")),
        ("landmark_BKPH", (2, 4, 8, 8), P("data", "model", None, None)),  # the axis goes to K, its first letter
        ("order_BS", (3, 8), P(None, None)),  # 3 rows stay whole on data=2
        ("index", (), P()),
    ],
)
def test_spec(name, shape, expected):
    assert sharding.spec(name, shape, sharding.mesh(2, 4)) == expected


@pytest.mark.parametrize(("name", "shape"), [("index", (4,)), ("k_BKCH", (8, 4, 10)), ("drafter", (2, 3))])
def test_a_field_must_name_its_dimensions(name, shape):
    with pytest.raises(ValueError, match=f"field '{name}' names"):
        sharding.spec(name, shape, sharding.mesh(2, 4))


def test_query_heads_follow_their_kv_heads():
    """6 query heads divide over model=2 but their 3 kv heads do not: both stay whole."""
    specs = sharding.shardings(sharded.model(3).params, sharding.mesh(2, 2))
    assert specs.blocks[0].q_NHD.spec == P(None, None, None)
    assert specs.blocks[0].down_DF.spec == P(None, "model")


def test_a_dict_inherits_the_letters_of_its_field():
    k = jnp.zeros((2, 4, 6, 8))
    rows = Prefilled(k, k, jnp.zeros((2, 1, 6), int), jnp.zeros(2, int), jnp.int32(0), {Ask(): k[..., 0]})
    assert sharding.shardings(rows, sharding.mesh(2, 4)).evidence_BKS[Ask()].spec == P("data", "model", None)


@pytest.mark.parametrize(("data", "model", "match"), [(4, 4, "needs 16 devices, 8 are here"), (0, 2, "at least 1 x 1")])
def test_bad_meshes(data, model, match):
    with pytest.raises(UserError, match=match):
        sharding.mesh(data, model)


def test_nothing_moves_for_a_model_on_one_device():
    m = sharded.model(4)
    assert sharding.mesh_of(m.params) is None
    assert sharding.follow(m.params, m.params) is m.params


def test_weights_shared_out():
    """Every split axis cuts bytes: a device holds an eighth of the large weights on model=8."""
    m = sharded.placed(8, 1, 8)
    for x in (m.params.embed_VD, m.params.blocks[0].q_NHD, m.params.blocks[0].down_DF):
        assert x.addressable_shards[0].data.nbytes * 8 == x.nbytes


def test_shardings_take_shapes():
    """An abstract tree gives what the arrays give: ahead-of-time compiles place nothing."""
    params = sharded.model(4).params
    on = sharding.mesh(2, 4)
    assert sharding.shardings(jax.eval_shape(lambda: params), on) == sharding.shardings(params, on)


@pytest.mark.parametrize("dims", ["BKS", "BWV"])
@pytest.mark.parametrize("k", [3, 20])
def test_top_k(dims, k):
    """Equal to jax's, ties included, split over rows and heads (K) or over the ranked axis itself (V)."""
    x = jax.random.randint(jax.random.key(0), (4, 8, 64), 0, 9).astype(jnp.float32)
    want = jax.lax.top_k(x, k)
    with jax.set_mesh(sharding.mesh(2, 4)):
        got = jax.jit(lambda x: sharding.top_k(x, k, dims))(x)
    assert all((a == b).all() for a, b in zip(got, want))


def test_place_changes_only_the_weights():
    m, there = sharded.model(4), sharded.placed(4, 2, 4)
    assert dataclasses.replace(there, params=m.params).cfg == m.cfg
    assert sharding.mesh_of(there.params) == sharding.mesh(2, 4)
