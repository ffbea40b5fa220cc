"""What a Whisper model is (Radford et al. 2022): `WhisperConfig` (static numbers) and `WhisperParams` (arrays).

Letters as in docs/design.md. S are the rows of 30 seconds of sound (1500, two mel frames a row), I the mel bands of a frame, X the taps of
a convolution. Encoder and decoder have the same width and heads; all heads have keys of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import struct

from tokeff.models.vit_config import ViTBlock


@dataclass(frozen=True)
class WhisperConfig:
    """Sizes, and which tokens mean what.

    L, layers: layers of the encoder and of the decoder. max_len: positions of the decoder. start: the tokens a transcript begins with.
    never, never_first: tokens that greedy transcription does not write, anywhere and as the first of a transcript.
    """

    name: str
    V: int
    D: int
    F: int
    L: int
    layers: int
    N: int
    I: int = 80
    S: int = 1500
    max_len: int = 448
    eos: int = 50256
    start: tuple[int, ...] = (50257, 50362)
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()
    act: str = "gelu"
    eps: float = 1e-5

    def __post_init__(self):
        if self.D % self.N:
            raise ValueError(f"{self.D} numbers do not divide over {self.N} heads")

    @property
    def H(self) -> int:
        return self.D // self.N


class CrossAttention(struct.PyTreeNode):
    """How a decoder layer listens to the encoder's rows."""

    attn_norm_D: jax.Array
    attn_norm_bias_D: jax.Array
    q_NHD: jax.Array
    k_NHD: jax.Array
    v_NHD: jax.Array
    o_DNH: jax.Array
    o_bias_D: jax.Array
    q_bias_NH: jax.Array | None = None
    k_bias_NH: jax.Array | None = None
    v_bias_NH: jax.Array | None = None


class DecoderBlock(struct.PyTreeNode):
    """One decoder layer: `own` attends to the text so far and has the feed-forward, `cross` stands between the two."""

    own: ViTBlock
    cross: CrossAttention


class WhisperParams(struct.PyTreeNode):
    """The whole model. The embedding is tied to the head; `place_SD` are the encoder's sinusoids, `place_TD` the decoder's positions."""

    conv1_DIX: jax.Array
    conv1_bias_D: jax.Array
    conv2_DDX: jax.Array
    conv2_bias_D: jax.Array
    place_SD: jax.Array
    encoder: tuple[ViTBlock, ...]
    norm_D: jax.Array
    norm_bias_D: jax.Array
    embed_VD: jax.Array
    place_TD: jax.Array
    decoder: tuple[DecoderBlock, ...]
    text_norm_D: jax.Array
    text_norm_bias_D: jax.Array
