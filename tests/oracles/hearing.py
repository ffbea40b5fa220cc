"""Whisper (Radford et al. 2022) over one window, in numpy float64: an encoder that may merge rows, and a decoder over what it leaves."""

import math

import numpy as np
from oracles.tower import double, fed, heads, merging, norm, over, softmax


def gelu(y):
    return y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2


def convolve(x_TI, w_DIX, bias_D, stride):
    """Over time, three taps, a border of zeros."""
    x, w = np.pad(x_TI, ((1, 1), (0, 0))), np.float64(w_DIX)
    return np.array([sum(w[:, :, i] @ x[t + i] for i in range(3)) for t in range(0, len(x_TI), stride)]) + np.float64(bias_D)


def encode(params, cfg, mel_TI, drop, sized=True):
    """(x_MD, how many rows each stands for)."""
    x = gelu(convolve(np.float64(mel_TI), params.conv1_DIX, params.conv1_bias_D, 1))
    x = gelu(convolve(x, params.conv2_DDX, params.conv2_bias_D, 2)) + np.float64(params.place_SD)
    x, sizes = merging(params.encoder, cfg, x, drop, 0, sized, gelu)
    return norm(x, np.float64(params.norm_D), np.float64(params.norm_bias_D), cfg.eps), sizes


def decode(params, cfg, tokens, x_MD, sizes):
    """logits_TV of a transcript over the encoder's rows, each as often there as it stands for others."""
    x = np.float64(params.embed_VD)[tokens] + np.float64(params.place_TD)[: len(tokens)]
    for layer in params.decoder:
        own, cross = double(layer.own), double(layer.cross)
        y = norm(x, own["attn_norm_D"], own["attn_norm_bias_D"], cfg.eps)
        q, k, v = (heads(own, name, y) for name in "qkv")
        hidden = np.triu(np.full((len(x), len(x)), -np.inf), 1)
        said = np.einsum("nts,nsh->nth", softmax(np.einsum("nth,nsh->nts", q, k) / np.sqrt(cfg.H) + hidden), v)
        x = x + np.einsum("dnh,nth->td", own["o_DNH"], said) + own["o_bias_D"]
        q = heads(cross, "q", norm(x, cross["attn_norm_D"], cross["attn_norm_bias_D"], cfg.eps))
        heard, _ = over(q, heads(cross, "k", x_MD), heads(cross, "v", x_MD), sizes)
        x = fed(own, cfg, x + np.einsum("dnh,nth->td", cross["o_DNH"], heard) + cross["o_bias_D"], gelu)
    return norm(x, np.float64(params.text_norm_D), np.float64(params.text_norm_bias_D), cfg.eps) @ np.float64(params.embed_VD).T
