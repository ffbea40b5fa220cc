"""An encoder over the rows of one picture, in numpy float64, layer by layer: rows can be taken out between layers, or merged inside."""

import numpy as np
from oracles import joining


def norm(x, weight, bias, eps):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight + bias


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def quick_gelu(y):
    return y / (1 + np.exp(-1.702 * y))


def double(tree):
    """Weights of one layer as float64 arrays, by name."""
    return {k: np.float64(v) for k, v in vars(tree).items() if v is not None}


def embed(params, cfg, pixels_YXC):
    """Patches with their positions, the class row first."""
    (lines, columns), p = cfg.grid, cfg.patch
    rows = [np.float64(params.cls_D)] if cfg.cls else []
    for y in range(lines):
        for x in range(columns):
            patch = np.float64(pixels_YXC[y * p : (y + 1) * p, x * p : (x + 1) * p]).transpose(2, 0, 1).ravel()
            rows.append(np.float64(params.patch_DI) @ patch)
    rows = np.array(rows) + np.float64(params.place_SD)
    if cfg.pre_norm:
        rows = norm(rows, np.float64(params.pre_norm_D), np.float64(params.pre_norm_bias_D), cfg.eps)
    return rows


def heads(w, name, y_SD):
    """Queries, keys or values of normed rows, head by head."""
    x = np.einsum("nhd,sd->nsh", w[f"{name}_NHD"], y_SD)
    return x + w[f"{name}_bias_NH"][:, None] if f"{name}_bias_NH" in w else x


def over(q_NTH, k_NSH, v_NSH, sizes=None):
    """(out_NTH, p) of attention in which every row stands there as often as its size says (ToMe, eq. 1)."""
    rows = np.repeat(np.arange(k_NSH.shape[1]), 1 if sizes is None else sizes)
    p = softmax(np.einsum("nth,nsh->nts", q_NTH, k_NSH[:, rows]) / np.sqrt(q_NTH.shape[2]))
    return np.einsum("nts,nsh->nth", p, v_NSH[:, rows]), p


def attended(w, cfg, x_SD, sizes=None):
    """(x_SD, p, v_NSH, q_NSH, k_NSH) behind the attention of a layer."""
    y = norm(x_SD, w["attn_norm_D"], w["attn_norm_bias_D"], cfg.eps)
    q, k, v = (heads(w, name, y) for name in "qkv")
    out, p = over(q, k, v, sizes)
    return x_SD + np.einsum("dnh,nsh->sd", w["o_DNH"], out) + w["o_bias_D"], p, v, q, k


def fed(w, cfg, x_SD, act=quick_gelu):
    """Rows behind the feed-forward of a layer."""
    y = norm(x_SD, w["ffn_norm_D"], w["ffn_norm_bias_D"], cfg.eps) @ w["up_FD"].T + w["up_bias_F"]
    return x_SD + act(y) @ w["down_DF"].T + w["down_bias_D"]


def block(w, cfg, x_SD):
    """(x_SD, p_NSS, v_NSH, q_NSH, k_NSH) of one layer over these rows alone."""
    w = double(w)
    x, *made = attended(w, cfg, x_SD)
    return fed(w, cfg, x), *made


def merging(blocks, cfg, x_SD, drop, protected=0, sized=True, act=quick_gelu):
    """(x_SD, sizes) through layers that merge `drop` rows each between attention and feed-forward, by the mean of the keys over heads
    (Bolya et al. 2023). sized: a row draws attention for all that it stands for."""
    sizes = [1] * len(x_SD)
    for w, r in zip(map(double, blocks), drop, strict=True):
        x_SD, *_, k = attended(w, cfg, x_SD, sizes if sized else None)
        x_SD, sizes = joining.joined(x_SD, sizes, k.mean(axis=0), r, protected)
        x_SD = fed(w, cfg, x_SD, act)
    return x_SD, sizes


def merged(params, cfg, pixels_YXC, drop, sized=True):
    """`merging` through a whole tower."""
    return merging(params.blocks, cfg, embed(params, cfg, pixels_YXC), drop, int(cfg.cls), sized)
