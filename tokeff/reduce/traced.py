"""Which patches a row is made of that a method leaves of a picture: for pictures of it (`tokeff.report.patches`), and for tests.

Methods say at whose place a row stands, not what was merged into it. But whatever they do to rows they do to every number of a row alike.
So each patch gets a number of its own, small enough to change no comparison and zero in all other patches; what a row that is left has of
these numbers are the shares of the patches in it. Means over a row's numbers (distances over sqrt D) stay what they were too: rows are
scaled by as much as they have become longer.

    left = see(v, pixels_BYXC, Traced(VisionZip(64, 8)))    # place_BM: for every patch, the patch at whose place its row stands
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from tokeff.errors import UserError
from tokeff.models.flow import EMPTY
from tokeff.models.vit import Seen, Taps
from tokeff.models.vit_config import ViTConfig
from tokeff.reduce.visual import Filmed, Picked, Reduced, Told, Walked, patches

SMALL = 1e-6
"""Of a patch's own number: its square is nothing beside that of a row."""


def weights(method: Picked, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig, about_D: jax.Array | None = None) -> tuple[Reduced, jax.Array]:
    """(what is left, weight_BMP of every patch in every row). Of a video P are the patches of all frames, one after the other."""
    B, P = len(x_BSD), cfg.patches
    own = jnp.eye(B * P).reshape(B, P, B * P) if isinstance(method, Filmed) else jnp.broadcast_to(jnp.eye(P), (B, P, P))
    own = jnp.pad(own, ((0, 0), (int(cfg.cls), 0), (0, 0)))
    D, more = x_BSD.shape[2], own.shape[2]
    scale = (1 + more / D) ** 0.5
    x = jnp.concatenate([scale * x_BSD, SMALL * own.astype(x_BSD.dtype)], axis=2)
    left = method.reduce(x, seen, cfg)
    if about_D is not None and isinstance(method, Told):
        left = method.answer(x, seen, cfg, jnp.pad(about_D, (0, more)))
    return left.replace(x_BMD=left.x_BMD[..., :D] / scale), left.x_BMD[..., D:].astype(jnp.float32) / SMALL


@dataclass(frozen=True)
class Traced(Told):
    """A method as one that leaves all patches as they are, and says of each in which row it would be.

    place_BM, M all patches: the patch at whose place that row stands (of a video counted through all frames), EMPTY where no row has it.
    A row of no place counts as one behind all patches. A patch in several rows is in the one that has most of it. UserError for methods
    that act while the tower runs: there the patch of a row is that of its place.
    """

    method: Picked

    def __post_init__(self):
        if isinstance(self.method, Walked):
            raise UserError(f"{type(self.method).__name__} acts while the tower runs; see where its rows stand, see(...).place_BM")
        object.__setattr__(self, "projected", self.method.projected)

    def check(self, cfg: ViTConfig) -> None:
        self.method.check(cfg)

    def rows(self, cfg: ViTConfig) -> int:
        return cfg.patches

    def taps(self, cfg: ViTConfig) -> Taps:
        return self.method.taps(cfg)

    def reduce(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig) -> Reduced:
        return self.traced(x_BSD, cfg, *weights(self.method, x_BSD, seen, cfg))

    def answer(self, x_BSD: jax.Array, seen: Seen, cfg: ViTConfig, about_D: jax.Array) -> Reduced:
        return self.traced(x_BSD, cfg, *weights(self.method, x_BSD, seen, cfg, about_D))

    def traced(self, x_BSD: jax.Array, cfg: ViTConfig, left: Reduced, weight_BMP: jax.Array) -> Reduced:
        x, real_BM = patches(x_BSD, cfg), jnp.ones(left.place_BM.shape, bool) if left.real_BM is None else left.real_BM
        place_BM = left.place_BM
        if isinstance(self.method, Filmed):  # one row of a video
            place_BM = place_BM + cfg.patches * jnp.arange(len(x))[:, None]
            place_BM, real_BM, weight_BMP = place_BM.reshape(1, -1), real_BM.reshape(1, -1), weight_BMP.reshape(1, -1, weight_BMP.shape[2])
        _, M, P = weight_BMP.shape
        place_BM = jnp.where(place_BM == EMPTY, P + jnp.arange(M), place_BM)
        weight_BMP = jnp.where(real_BM[..., None], weight_BMP, 0)
        source_BP = jnp.take_along_axis(place_BM, jnp.argmax(weight_BMP, axis=1), axis=1)
        source_BP = jnp.where(weight_BMP.max(axis=1) > 0, source_BP, EMPTY)
        return Reduced(x, source_BP.reshape(x.shape[:2]).astype(jnp.int32))
