"""What a decoder is: `Config` (static numbers) and `Params` (arrays), for every text family the loaders know.

Letters (docs/design.md has the whole table): V vocab, D model, F feed-forward, L layers, N query heads, K key/value heads,
H head dim. An array's suffix lists its axes, so `q_NHD` maps a D-vector to N heads of H numbers: weights are stored
(out..., in), which is the row-major order a matrix-vector product reads fastest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import struct


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies: `base ** (-2i/H)`, then a scaling rule.

    kind: 'none', 'linear' (divide every frequency by `factor`), 'llama3' (Llama 3.1: divide only wavelengths longer than
    `original_len / low`, blend up to `original_len / high`) or 'yarn' (Peng et al. 2023: blend by `beta_fast`/`beta_slow`
    rotations, and multiply cos and sin by `attention_factor`).
    """

    base: float = 10_000.0
    kind: str = "none"
    factor: float = 1.0
    original_len: int = 0
    low: float = 1.0
    high: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0


@dataclass(frozen=True)
class Config:
    """One pure decoder. `windows[l]` is layer l's sliding window in tokens (itself included), None for full attention.

    Layers with a window use `local_rope` when it is given (Gemma 3). `scale` multiplies q.k; `softcap`/`final_softcap` are
    Gemma 2's tanh caps (0 = none); `embed_scale` multiplies embeddings (Gemma: sqrt(D)). Norm weights are stored ready to
    multiply: the loader adds Gemma's +1. `activations` is the dtype of the hidden rows, None for that of the embedding.
    """

    name: str
    V: int
    D: int
    F: int
    L: int
    N: int
    K: int
    H: int
    rope: Rope = Rope()
    local_rope: Rope | None = None
    windows: tuple[int | None, ...] = ()
    eps: float = 1e-5
    act: str = "silu"
    scale: float = 0.0
    softcap: float = 0.0
    final_softcap: float = 0.0
    embed_scale: float = 1.0
    tied: bool = True
    max_len: int = 2048
    eos: tuple[int, ...] = ()
    bos: int | None = None
    activations: str | None = None

    def __post_init__(self):
        if self.N % self.K:
            raise ValueError(f"{self.N} query heads do not divide over {self.K} key/value heads")
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.L)
        if not self.scale:
            object.__setattr__(self, "scale", self.H**-0.5)
        if len(self.windows) != self.L:
            raise ValueError(f"windows names {len(self.windows)} layers, the model has {self.L}")

    def rope_of(self, layer: int) -> Rope:
        local = self.local_rope is not None and self.windows[layer] is not None
        return self.local_rope if local else self.rope  # type: ignore[return-value]


class Block(struct.PyTreeNode):
    """One layer's weights. Fields that a family does not have are None.

    side: learned parts that methods bring (gates, heads), named like fields, letters included; a method finds them in `here.side`.
    """

    attn_norm_D: jax.Array
    q_NHD: jax.Array
    k_KHD: jax.Array
    v_KHD: jax.Array
    o_DNH: jax.Array
    ffn_norm_D: jax.Array
    gate_FD: jax.Array
    up_FD: jax.Array
    down_DF: jax.Array
    q_bias_NH: jax.Array | None = None
    k_bias_KH: jax.Array | None = None
    v_bias_KH: jax.Array | None = None
    q_norm_H: jax.Array | None = None
    k_norm_H: jax.Array | None = None
    post_attn_norm_D: jax.Array | None = None
    post_ffn_norm_D: jax.Array | None = None
    side: dict[str, jax.Array] | None = None


class Params(struct.PyTreeNode):
    """The whole decoder. `head_VD` is None when the embedding is tied.

    side: what methods bring beside the whole model, by name (the weights of a draft model, heads): arrays named by their letters, or trees.
    """

    embed_VD: jax.Array
    blocks: tuple[Block, ...]
    norm_D: jax.Array
    head_VD: jax.Array | None = None
    side: dict[str, Any] | None = None


@dataclass(frozen=True)
class Precision:
    """dtypes by name. Softmax, log-sum-exp and logits are float32 whatever stands here."""

    weights: str = "float32"
    activations: str = "float32"
    cache: str = "float32"

    @staticmethod
    def default(platform: str | None = None) -> Precision:
        """float32 on CPU (bfloat16 matrix-vector products are 18x slower there), bfloat16 on GPU and TPU."""
        platform = platform or jax.default_backend()
        name = "float32" if platform == "cpu" else "bfloat16"
        return Precision(name, name, name)
