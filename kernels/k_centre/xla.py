"""k_centre in jax.numpy that XLA compiles on any platform: a loop that keeps each row's distance to the nearest chosen one."""

import jax
import jax.numpy as jnp

NONE = -1e30  # nearness of a row that is no row: below every distance, above what is chosen


def run(distance_BPP, *, most, clean=False):
    """Same contract as the public op. clean: nothing to do, places have no gradient."""

    def one(d_PP, first, near_P):
        def step(i, state):
            near_P, index_M = state
            # The first place of the maximum; `argmax` goes through the numbers one at a time on CPU.
            at = jnp.where(near_P == near_P.max(), jnp.arange(len(near_P)), len(near_P) - 1).min()
            return jnp.minimum(near_P, d_PP[at]).at[at].set(-jnp.inf), index_M.at[i].set(at)

        return jax.lax.fori_loop(1, most, step, (near_P, jnp.zeros(most, jnp.int32).at[0].set(first)))[1]

    return jax.vmap(one)(*begin(distance_BPP))


def begin(distance_BPP):
    """Return (distances without NaN, infinite on the diagonal, the first choice, each row's distance to it)."""

    def one(d_PP):
        bad_P, self_PP = jnp.isnan(jnp.diagonal(d_PP)), jnp.eye(len(d_PP), dtype=bool)
        d_PP = jnp.where(self_PP | jnp.isnan(d_PP), jnp.inf, d_PP)
        first = jnp.argmax(jnp.where(bad_P, -jnp.inf, d_PP.min(axis=1))).astype(jnp.int32)
        return d_PP, first, jnp.where(bad_P, NONE, d_PP[first]).at[first].set(-jnp.inf)

    return jax.vmap(one)(distance_BPP)
