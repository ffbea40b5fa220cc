"""An image tower over one picture's rows, in numpy float64 loops over layers: rows can be taken out between them."""

import numpy as np


def norm(x, weight, bias, eps):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight + bias


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


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


def block(w, cfg, x_SD):
    """(x_SD, p_NSS, v_NSH, q_NSH, k_NSH) of one layer over these rows alone; quick_gelu."""
    w = double(w)
    y = norm(x_SD, w["attn_norm_D"], w["attn_norm_bias_D"], cfg.eps)
    q, k, v = (np.einsum("nhd,sd->nsh", w[f"{n}_NHD"], y) + w[f"{n}_bias_NH"][:, None] for n in "qkv")
    p = softmax(np.einsum("nsh,nth->nst", q, k) / np.sqrt(cfg.H))
    x = x_SD + np.einsum("dnh,nsh->sd", w["o_DNH"], np.einsum("nst,nth->nsh", p, v)) + w["o_bias_D"]
    y = norm(x, w["ffn_norm_D"], w["ffn_norm_bias_D"], cfg.eps) @ w["up_FD"].T + w["up_bias_F"]
    y = y / (1 + np.exp(-1.702 * y))
    return x + y @ w["down_DF"].T + w["down_bias_D"], p, v, q, k
