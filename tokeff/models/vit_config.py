"""What an image tower is: `ViTConfig` (static numbers) and `ViTParams` (arrays), for ViT, CLIP and SigLIP.

Letters as in docs/design.md, where S are the rows of one image: its patches in reading order, behind the class row where there is one.
I are the numbers of a vector that comes in (a patch: channels, then rows, then columns), V the labels or the width that pooled rows go to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import struct

from tokeff.errors import UserError


@dataclass(frozen=True)
class ViTConfig:
    """One image tower. image, patch: pixels (height, width) of an image, and of a patch on each side.

    cls: a class row stands before the patches. pre_norm: rows are normed before the first block (CLIP). norm_rows: `finish` norms every row
    (ViT, SigLIP); else `pool` norms the class row alone (CLIP). attention_pool: rows are pooled by a query of their own (SigLIP).
    """

    name: str
    D: int
    F: int
    L: int
    N: int
    image: tuple[int, int]
    patch: int
    channels: int = 3
    V: int = 0
    cls: bool = True
    pre_norm: bool = False
    norm_rows: bool = True
    attention_pool: bool = False
    act: str = "gelu"
    eps: float = 1e-12

    def __post_init__(self):
        if self.D % self.N or self.image[0] % self.patch or self.image[1] % self.patch:
            raise ValueError(f"{self.D} numbers in {self.N} heads or {self.image} pixels in patches of {self.patch} leave a remainder")

    @property
    def H(self) -> int:
        return self.D // self.N

    @property
    def I(self) -> int:  # noqa: E743
        return self.channels * self.patch**2

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def S(self) -> int:
        return self.patches + self.cls

    def layer(self, index: int) -> int:
        """A layer's number; -1 is the last."""
        if not -self.L <= index < self.L:
            raise UserError(f"layer {index} is outside {self.name}; give 0 to {self.L - 1}, or -1 to {-self.L} from the end")
        return index % self.L


class ViTBlock(struct.PyTreeNode):
    """One layer's weights, (out..., in). Query, key and value biases are None where a model has none."""

    attn_norm_D: jax.Array
    attn_norm_bias_D: jax.Array
    q_NHD: jax.Array
    k_NHD: jax.Array
    v_NHD: jax.Array
    o_DNH: jax.Array
    o_bias_D: jax.Array
    ffn_norm_D: jax.Array
    ffn_norm_bias_D: jax.Array
    up_FD: jax.Array
    up_bias_F: jax.Array
    down_DF: jax.Array
    down_bias_D: jax.Array
    q_bias_NH: jax.Array | None = None
    k_bias_NH: jax.Array | None = None
    v_bias_NH: jax.Array | None = None


class AttentionPool(struct.PyTreeNode):
    """SigLIP's head: one learned query over all rows, then a feed-forward with its residual."""

    probe_D: jax.Array
    q_NHD: jax.Array
    k_NHD: jax.Array
    v_NHD: jax.Array
    q_bias_NH: jax.Array
    k_bias_NH: jax.Array
    v_bias_NH: jax.Array
    o_DNH: jax.Array
    o_bias_D: jax.Array
    ffn_norm_D: jax.Array
    ffn_norm_bias_D: jax.Array
    up_FD: jax.Array
    up_bias_F: jax.Array
    down_DF: jax.Array
    down_bias_D: jax.Array


class ViTParams(struct.PyTreeNode):
    """The whole tower. place_SD: one learned position a row. head_VD: class labels (ViT) or the shared space of text and images (CLIP).

    side: learned parts that methods of token reduction bring (a router), named like fields, letters included. A method finds them in
    `Seen.side`, one that works while the tower runs in these params.
    """

    patch_DI: jax.Array
    place_SD: jax.Array
    blocks: tuple[ViTBlock, ...]
    norm_D: jax.Array
    norm_bias_D: jax.Array
    patch_bias_D: jax.Array | None = None
    cls_D: jax.Array | None = None
    pre_norm_D: jax.Array | None = None
    pre_norm_bias_D: jax.Array | None = None
    pool: AttentionPool | None = None
    head_VD: jax.Array | None = None
    head_bias_V: jax.Array | None = None
    side: dict[str, Any] | None = None
