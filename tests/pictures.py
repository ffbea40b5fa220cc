"""Tiny image towers and models of pictures with random weights, and what a tower might have seen."""

import dataclasses
from functools import cache

import jax.numpy as jnp
import numpy as np
import tiny

from tokeff.models.config import Precision
from tokeff.models.llava import Llava, LlavaConfig, LlavaParams
from tokeff.models.load import Model
from tokeff.models.vit import Seen
from tokeff.models.vit_config import ViTBlock, ViTConfig, ViTParams
from tokeff.sharding import letters

TOWER = ViTConfig("tower", D=16, F=24, L=3, N=2, image=(24, 24), patch=4, pre_norm=True, norm_rows=False, act="quick_gelu", eps=1e-5)
BARE = dataclasses.replace(TOWER, name="bare", cls=False, pre_norm=False)  # no class row
IMAGE, VIDEO = tiny.CFG.V - 1, tiny.CFG.V - 2


def random(kind, sizes, rng, **more):
    """Random arrays for every field of a state that has no default; the letters of its name give its shape."""
    made = {}
    for f in dataclasses.fields(kind):
        if f.default is dataclasses.MISSING and f.name not in more:
            shape = [getattr(sizes, letter) for letter in letters(f.name)]
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
            made[f.name] = jnp.asarray(rng.normal(size=shape) * scale + ("norm_D" in f.name), jnp.float32)
    return kind(**made, **more)


def tower(cfg=TOWER, seed=0) -> ViTParams:
    """Weights of a tower."""
    rng = np.random.default_rng(seed)
    bias = {f"{x}_bias_NH": jnp.asarray(rng.normal(size=(cfg.N, cfg.H)), jnp.float32) for x in "qkv"}
    ends = {name: jnp.asarray(rng.normal(size=cfg.D), jnp.float32) for name in ("cls_D", "pre_norm_D", "pre_norm_bias_D")}
    if not cfg.cls:
        ends = {}
    return random(ViTParams, cfg, rng, blocks=tuple(random(ViTBlock, cfg, rng, **bias) for _ in range(cfg.L)), **ends)


@cache
def llava(canvases=(), most=None, cls=True) -> Llava:
    """The tests' tiny decoder behind a tiny tower. canvases: it reads crops, and with cls=False, like OneVision, frames."""
    cfg, rng = TOWER if cls else BARE, np.random.default_rng(1)
    into, out = rng.normal(size=(tiny.CFG.D, cfg.D)) / 4, rng.normal(size=(tiny.CFG.D, tiny.CFG.D)) / 3
    newline = jnp.asarray(rng.normal(size=tiny.CFG.D), jnp.float32) if canvases else None
    params = LlavaParams(tower(cfg), jnp.asarray(into, jnp.float32), jnp.asarray(out, jnp.float32), newline_D=newline)
    text = Model(tiny.CFG, tiny.params(), None, Precision(), "tiny")
    video = None if cls else VIDEO
    return Llava(LlavaConfig(cfg, IMAGE, (1,), canvases=canvases, most=most, video=video), params, text, None, "tiny-llava")


def looked(cfg, B, seed=0) -> tuple[jnp.ndarray, Seen]:
    """(x_BSD, Seen) of random pictures, with everything of every layer."""
    rng = np.random.default_rng(seed)

    def softmax(*shape):
        e = np.exp(2 * rng.normal(size=shape))
        return jnp.asarray(e / e.sum(axis=-1, keepdims=True), jnp.float32)

    def heads():
        return {i: jnp.asarray(rng.normal(size=(B, cfg.S, cfg.N, cfg.H)), jnp.float32) for i in range(cfg.L)}

    cls = {i: softmax(B, cfg.N, cfg.S) for i in range(cfg.L)} if cfg.cls else {}
    received = {i: softmax(B, cfg.S) for i in range(cfg.L)}
    x = jnp.asarray(rng.normal(size=(B, cfg.S, cfg.D)), jnp.float32)
    return x, Seen({}, cls, received, heads(), heads(), pixels(cfg, B, seed))


def pixels(cfg, B, seed=0) -> jnp.ndarray:
    """Random normalised pictures of a tower's size."""
    return jnp.asarray(np.random.default_rng(seed + 100).uniform(-1, 1, size=(B, *cfg.image, cfg.channels)), jnp.float32)
