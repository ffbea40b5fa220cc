"""Weights before any training: image towers, projectors and decoders at random, for recipes that train small ones.

Matrices are normal with variance 1 / inputs, those that write into the residual less by how many do (Radford et al. 2019); biases are zero,
norms one, heads zero (Dosovitskiy et al. 2021). Positions of a tower begin as sines and cosines in two dimensions (Beyer et al. 2022), and
its queries as its keys, so that a patch looks at patches near it from the start (Trockman & Kolter 2023): without that a small tower that
sees few pictures stays for long where it tells ink from background and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.models.config import Block, Config, Params
from tokeff.models.llava_rows import LlavaConfig, LlavaParams
from tokeff.models.vit_config import ViTBlock, ViTConfig, ViTParams
from tokeff.sharding import letters

SHARP = 1.4  # of queries and keys that begin alike
WRITES = ("o_DNH", "down_DF")  # what adds to the residual


def _array(name: str, sizes: Any, key: jax.Array, layers: int) -> jax.Array:
    shape = tuple(getattr(sizes, letter) for letter in letters(name))
    if "norm_bias" in name or "bias" in name:
        return jnp.zeros(shape)
    if "norm_" in name:
        return jnp.ones(shape)
    inputs = math.prod(shape[-2:]) if name == "o_DNH" else shape[-1]
    return jax.random.normal(key, shape) * (inputs * (2 * layers if name in WRITES else 1)) ** -0.5


def _filled(kind: Any, names: list[str], sizes: Any, key: jax.Array) -> Any:
    return kind(**{name: _array(name, sizes, jax.random.fold_in(key, i), sizes.L) for i, name in enumerate(names)})


def fresh_vit(cfg: ViTConfig, seed: int) -> ViTParams:
    """A tower with a class row, a bias everywhere, and a head where cfg.V is not 0."""
    key = jax.random.key(seed)
    names = [f.name for f in dataclasses.fields(ViTBlock)]
    blocks = tuple(_filled(ViTBlock, names, cfg, jax.random.fold_in(key, i)) for i in range(cfg.L))
    blocks = tuple(block.replace(q_NHD=SHARP * block.q_NHD, k_NHD=SHARP * block.q_NHD) for block in blocks)
    names = ("norm_D", "norm_bias_D", "patch_bias_D", "patch_DI")
    ends: dict[str, Any] = {name: _array(name, cfg, jax.random.fold_in(key, 100), cfg.L) for name in names}
    cls = 0.02 * jax.random.normal(jax.random.fold_in(key, 101), (cfg.D,))
    head: dict[str, Any] = {"head_VD": jnp.zeros((cfg.V, cfg.D)), "head_bias_V": jnp.zeros(cfg.V)} if cfg.V else {}
    return ViTParams(place_SD=jnp.asarray(places(cfg)), blocks=blocks, cls_D=cls, **ends, **head)


def places(cfg: ViTConfig, longest: float = 10.0) -> np.ndarray:
    """place_SD: a quarter of the width each for sine and cosine of the row and of the column, at rates from 1 to 1 / longest; zeros for the
    class row."""
    quarter = cfg.D // 4
    rate = longest ** (-np.arange(quarter) / quarter)
    y, x = (axis.reshape(-1, 1) * rate for axis in np.meshgrid(*map(np.arange, cfg.grid), indexing="ij"))
    table = np.concatenate([np.sin(y), np.cos(y), np.sin(x), np.cos(x)], axis=1)
    return np.pad(table, ((int(cfg.cls), 0), (0, cfg.D - 4 * quarter))).astype(np.float32)


def fresh_decoder(cfg: Config, seed: int) -> Params:
    """A Llama with a tied embedding: no biases, no further norms."""
    key = jax.random.key(seed)
    names = [f.name for f in dataclasses.fields(Block) if f.default is dataclasses.MISSING]
    blocks = tuple(_filled(Block, names, cfg, jax.random.fold_in(key, i)) for i in range(cfg.L))
    return Params(_array("embed_VD", cfg, jax.random.fold_in(key, 100), cfg.L), blocks, jnp.ones(cfg.D))


def fresh_projector(cfg: LlavaConfig, tower: ViTParams, D: int, seed: int) -> LlavaParams:
    """What stands between a tower and a decoder of width D, biases and a newline with it."""
    key, wide = jax.random.key(seed), cfg.tower.D * len(cfg.layers)
    into, out, newline = (jax.random.normal(jax.random.fold_in(key, i), shape) for i, shape in enumerate(((D, wide), (D, D), (D,))))
    return LlavaParams(tower, into * wide**-0.5, out * D**-0.5, jnp.zeros(D), jnp.zeros(D), newline * D**-0.5)
