"""What one would write without an op: the way beside which `bench` times it. One function an op, with the op's arguments and options."""

import jax
import jax.numpy as jnp

from tokeff.kernels.bipartite_match import reference as bipartite_reference
from tokeff.kernels.lowrank_scores.rotation import turn
from tokeff.kernels.quant_decode.codes import dequantise


def scores(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT, scale, softcap):
    """Return masked scores (B, K, T, G, C) as a textbook writes them: every slot, no care for NaN."""
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, k_BKCH.shape[1], -1, H)
    score = jnp.einsum("btkgh,bkch->bktgc", q_BTKGH, k_BKCH, preferred_element_type=jnp.float32) * scale
    score = softcap * jnp.tanh(score / softcap) if softcap else score
    order, lo, hi = order_BKC[:, :, None, None], lo_BT[:, None, :, None, None], hi_BT[:, None, :, None, None]
    return jnp.where((order >= lo) & (order <= hi), score, -jnp.inf)


def attention(q_BTNH, k_BKCH, v_BKCH, order_BKC, lo_BT, hi_BT, *, scale, softcap, page_BKM=None):
    """Textbook attention over the whole cache, whichever pages are chosen."""
    p = jax.nn.softmax(scores(q_BTNH, k_BKCH, order_BKC, lo_BT, hi_BT, scale, softcap))
    return jnp.einsum("bktgc,bkch->btkgh", p.astype(v_BKCH.dtype), v_BKCH).reshape(q_BTNH.shape)


def quant_decode(q_BTNH, k_code, k_zero, k_step, v_code, v_zero, v_step, order_BKPR, lo_BT, hi_BT, *, scale, softcap):
    """Textbook attention over rows that are written out first."""
    H, flat = q_BTNH.shape[3], (*order_BKPR.shape[:2], -1)
    bits = k_code.shape[-1] * 8 // H
    k, v = (dequantise(*coded, bits=bits).reshape(*flat, H) for coded in ((k_code, k_zero, k_step), (v_code, v_zero, v_step)))
    k, v = jax.lax.optimization_barrier((k, v))
    return attention(q_BTNH, k, v, order_BKPR.reshape(flat), lo_BT, hi_BT, scale=scale, softcap=softcap)


def page_scores(q_BTNH, low_BKPH, high_BKPH, open_BKTP, *, most, chunks, scale):
    """The definition of the bound, channel by channel, and `top_k`."""
    q_BKTG1H = q_BTNH.reshape(*q_BTNH.shape[:2], low_BKPH.shape[1], -1, 1, q_BTNH.shape[3]).swapaxes(1, 2)
    low, high = (x[:, :, None, None] for x in (low_BKPH, low_BKPH if high_BKPH is None else high_BKPH))
    worth = jnp.maximum(q_BKTG1H * low, q_BKTG1H * high).sum((3, 5), dtype=jnp.float32) * scale
    worth = worth.reshape(*open_BKTP.shape, chunks).max(-1)
    worth, page = jax.lax.top_k(jnp.where(open_BKTP, worth, -jnp.inf), most)
    return worth, page


def compact_rows(k_BKCH, v_BKCH, from_BKM, to_BKM, k_BKWH=None, v_BKWH=None):
    """One indexed read and one indexed write of each."""
    (B, K, C, _), gone = k_BKCH.shape, (from_BKM < 0) | (to_BKM < 0)
    b, k = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
    to_BKM = jnp.where(gone, C, to_BKM)  # past the end: dropped
    sources = (k_BKCH, v_BKCH) if k_BKWH is None else (k_BKWH, v_BKWH)
    return tuple(x.at[b, k, to_BKM].set(source[b, k, from_BKM], mode="drop") for x, source in zip((k_BKCH, v_BKCH), sources))


def lowrank_scores(q_BTNH, low_BSY, basis_BYKH, angle_BS, page_BKTM, freq_h, *, gain, page_size, scale):
    """All keys rebuilt, rotated and scored, then those of the pages."""
    (B, T, N, H), K = q_BTNH.shape, basis_BYKH.shape[2]
    k_BKSH = jnp.einsum("bsy,bykh->bksh", low_BSY, basis_BYKH)
    k_BKSH = turn(k_BKSH, angle_BS[:, None, :, None] * freq_h, gain)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    score = jnp.einsum("btkgh,bksh->bktgs", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32) * scale
    row = (page_BKTM[..., None] * page_size + jnp.arange(page_size)).reshape(B, K, T, 1, -1)
    return jnp.take_along_axis(score, row, -1)


def shared_prefix(q_BTNH, k_JKCH, v_JKCH, order_JKC, lo_BT, hi_BT, *, scale, softcap):
    """Textbook attention of each sequence to a copy of its group's rows, which the benchmark brings: whoever decodes so has them."""
    k, v, order = (jnp.repeat(x, q_BTNH.shape[0] // x.shape[0], axis=0) for x in (k_JKCH, v_JKCH, order_JKC))
    return attention(q_BTNH, k, v, order, lo_BT, hi_BT, scale=scale, softcap=softcap)


def bipartite_match(metric_BSH, *, protected):
    """All cosines, written out and searched."""
    return bipartite_reference.run(metric_BSH, protected=protected)


def k_centre(distance_BPP, *, most):
    """The loop that keeps each row's distance to the nearest chosen one, with no care for NaN."""

    def one(d_PP):
        d_PP = jnp.where(jnp.eye(len(d_PP), dtype=bool), jnp.inf, d_PP)
        first = jnp.argmax(d_PP.min(axis=1))

        def step(i, state):
            near_P, index_M = state
            at = jnp.argmax(near_P)
            return jnp.minimum(near_P, d_PP[at]).at[at].set(-jnp.inf), index_M.at[i].set(at)

        start = d_PP[first].at[first].set(-jnp.inf), jnp.full(most, first, jnp.int32)
        return jax.lax.fori_loop(1, most, step, start)[1]

    return jax.vmap(one)(distance_BPP)
