"""A Llama decoder in float64 numpy, one row and one head at a time: slow, and plain enough to be checked by reading.

Rows are known by their order (place in the sequence). A cache is a dict from order to (unrotated key, value).
"""

from dataclasses import dataclass, field

import numpy as np


class Model:
    """The formulas of one decoder. `params` and `cfg` are tokeff's, read as numbers only."""

    def __init__(self, params, cfg):
        self.cfg, self.G = cfg, cfg.N // cfg.K
        self.embeddings = np.asarray(params.embed_VD, np.float64)
        self.head = self.embeddings if params.head_VD is None else np.asarray(params.head_VD, np.float64)
        self.norm = np.asarray(params.norm_D, np.float64)
        self.blocks = [{name: np.asarray(x, np.float64) for name, x in vars(b).items() if x is not None} for b in params.blocks]

    def embed(self, token: int) -> np.ndarray:
        return self.embeddings[token]

    def rms(self, x, weight):
        return x / np.sqrt(np.mean(x**2) + self.cfg.eps) * weight

    def qkv(self, layer: int, x_D):
        """Unrotated q_NH, k_KH, v_KH of one row."""
        b = self.blocks[layer]
        y = self.rms(x_D, b["attn_norm_D"])
        return b["q_NHD"] @ y, b["k_KHD"] @ y, b["v_KHD"] @ y

    def rest(self, layer: int, x_D, out_NH):
        """The block after attention: output projection, residual, gated feed-forward, residual."""
        b = self.blocks[layer]
        x = x_D + np.einsum("dnh,nh->d", b["o_DNH"], out_NH)
        y = self.rms(x, b["ffn_norm_D"])
        gate = b["gate_FD"] @ y
        return x + b["down_DF"] @ (gate / (1 + np.exp(-gate)) * (b["up_FD"] @ y))

    def logits(self, x_D):
        return self.head @ self.rms(x_D, self.norm)

    def rope(self, layer: int, x_H, position):
        """Pairs (x_i, x_{i + H/2}) turned by position * base**(-2i/H)."""
        half = len(x_H) // 2
        turned = np.empty_like(x_H)
        for i in range(half):
            angle = position * self.cfg.rope_of(layer).base ** (-2 * i / len(x_H))
            turned[i] = x_H[i] * np.cos(angle) - x_H[i + half] * np.sin(angle)
            turned[i + half] = x_H[i + half] * np.cos(angle) + x_H[i] * np.sin(angle)
        return turned

    def dot(self, q_H, k_H) -> float:
        """Scaled score of two rotated rows."""
        return float(q_H @ k_H) * self.cfg.scale

    def oldest(self, layer: int, order: int) -> int:
        """The smallest order that a row may see in this layer."""
        window = self.cfg.windows[layer]
        return 0 if window is None else order - window + 1


def softmax(scores: dict) -> dict:
    """Probabilities of {key: score}."""
    if not scores:
        return {}
    top = max(scores.values())
    e = {key: np.exp(s - top) for key, s in scores.items()}
    total = sum(e.values())
    return {key: x / total for key, x in e.items()}


@dataclass
class Seen:
    """What a dense prefill saw in one layer: rows in order, and A[n][asking order] = {order: probability}."""

    orders: list[int] = field(default_factory=list)
    q: dict = field(default_factory=dict)  # order -> (N, H) unrotated; only rows that asked
    k: dict = field(default_factory=dict)  # order -> (K, H) unrotated
    v: dict = field(default_factory=dict)
    rotated: dict = field(default_factory=dict)  # order -> (K, H)
    A: list = field(default_factory=list)


def prefill(model: Model, tokens, cut=None) -> tuple[list[Seen], np.ndarray]:
    """([Seen of each layer], logits after the last token). cut: a pass, as in `oracles.reduce`."""
    cfg = model.cfg
    rows, seen = {order: model.embed(t) for order, t in enumerate(tokens)}, []
    for layer in range(cfg.L):
        s = Seen(sorted(rows), A=[{} for _ in range(cfg.N)])
        for order in s.orders:
            s.q[order], s.k[order], s.v[order] = model.qkv(layer, rows[order])
            s.rotated[order] = np.stack([model.rope(layer, k, order) for k in s.k[order]])
        asking = s.orders if cut is None or cut.layer != layer else cut.choose(model, layer, s)
        rows = {order: model.rest(layer, rows[order], attend_dense(model, layer, s, order)) for order in asking}
        seen.append(s)
    return seen, model.logits(rows[max(rows)])


def attend_dense(model: Model, layer: int, s: Seen, order: int) -> np.ndarray:
    """out_NH of one prompt row over the rows up to itself, noting its probabilities in A."""
    out = np.zeros((model.cfg.N, model.cfg.H))
    visible = [o for o in s.orders if model.oldest(layer, order) <= o <= order]
    for n in range(model.cfg.N):
        q = model.rope(layer, s.q[order][n], order)
        p = softmax({o: model.dot(q, s.rotated[o][n // model.G]) for o in visible})
        s.A[n][order] = p
        out[n] = sum(p[o] * s.v[o][n // model.G] for o in visible)
    return out


def decode(model: Model, cache, tokens, start: int):
    """One-token decoding of given tokens under a policy: yields (logits, cache) after each."""
    for order, token in enumerate(tokens, start):
        x = model.embed(token)
        for layer in range(model.cfg.L):
            x = model.rest(layer, x, cache.attend(layer, *model.qkv(layer, x), order))
        yield model.logits(x), cache
