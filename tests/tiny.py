"""The one tiny model of these tests, its prompts, and how its parts are driven: one fixed shape for every method.

Settings for it come by parameter name (`settings`), so a method joins the shared tests by being listed in `tokeff.listing`.
"""

import inspect
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokeff.decode.draft import Plain
from tokeff.decode.lookup import PromptLookup
from tokeff.decode.loop import Decoding, begin
from tokeff.decode.sample import GREEDY, row_keys
from tokeff.kv.cache import Room
from tokeff.kv.extend import extend, pack
from tokeff.kv.policy import Full
from tokeff.kv.prefill import Prompt, prefill
from tokeff.models.config import Block, Config, Params, Precision
from tokeff.models.load import Model

CFG = Config("tiny", V=61, D=32, F=48, L=3, N=4, K=2, H=8, max_len=256, tied=False)
FULL, PLAIN = Full(), Plain()
LENGTHS = (64, 51)
NEW = 20
ROOM = Room(NEW)  # one program packs for given tokens and for a text
TREE = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
SETTINGS = {
    "budget": 0.5, "window": 6, "sinks": 4, "layer": 1, "dense": (0,), "select": (1,), "recent": 8, "page": 4,
    "length": 4, "ngram": 2, "tree": TREE, "lag": 8, "piece": 20, "ask": (3, 5), "judges": ((0, 3), (1,), (0, 3)),
    "group": 8, "residual": 8, "every": 4, "logical": 2, "start": 16, "outliers": 0.125,
    "exit": 2, "exits": (1, 2), "lengths": (2, 4),
}  # fmt: skip
OWN = {
    "AShape": {"block": 8, "window": 8, "dense": 0},
    "TriShape": {"block": 8, "window": 8, "dense": 6},
    "BlockTopK": {"block": 8, "top": 2, "dense": 0},
    "MInference": {"block": 8, "vertical": 8, "slash": 1, "dense": 0},
    "FlexPrefill": {"block": 8, "most": 3, "vertical": 8, "dense": 0},
    "SentenceKV": {"budget": 0.4, "factor": 1.5, "ends": (3, 8, 21, 34, 40, 55), "cell": 4, "longest": 8, "kernel": 3},
    "TransMLA": {"rank": 0.25},  # fewer directions than the prompt has distinct tokens
    "S2-Attention": {"block": 8, "near": 1, "stride": 4, "dense": 0},
    "Video-XL-2": {"block": 8, "size": 1, "dense": 0},
    "CacheBlend": {"chunk": 16, "share": 0.2, "dense": 4},
    "ShadowKV": {"budget": 0.2},  # its local chunks are half of so short a prompt
    "LServe": {"budget": 0.6},  # room for the recent rows that drafts need
    "TopK": {"budget": 0.25},  # at half of the rows it loses nothing; nor does a vote
    "TokenSelect": {"budget": 0.3},
    "RazorAttention": {"heads": ((0,), (), (0, 1))},
    "DuoAttention": {"heads": ((0,), (), (0, 1))},
    "SmartSpec": {"drafter": PromptLookup(4, 2), "widths": (1, 3, 5)},
    "FFN-SkipLLM": {"tau": 0.5, "head": 1, "tail": 0, "warm": 2},
    "SkipDecode": {"least": 1, "warm": 1, "over": 6},
    "CaM": {"over": 16},  # in fewer rows than its store has; else writing them looks like a copy to the test that counts those
    "LazyLLM": {"at": (0, 1)},
    "SpAtten": {"at": (0, 1)},
    "SpAttenHeads": {"at": (0, 1), "heads_at": (0,)},
    "SpAttenCache": {"high": 2, "low": 2, "tau": 0.5, "values": 0.2},
    "TOVA": {"budget": 0.6},  # at half, its sums over heads look like activations to the test that counts those
}


def settings(method) -> dict:
    """Settings of a listed method at which it is active on the tiny prompts: SETTINGS where it has a parameter of that name."""
    given = {}
    for name, parameter in inspect.signature(method.make).parameters.items():
        if name in SETTINGS and not (isinstance(parameter.default, float) and name == "recent"):
            given[name] = SETTINGS[name]
    return given | OWN.get(method.name, {})


def fast(method) -> dict:
    """`settings`, changed so that drafts are exact: as the listing says, but with blocks that fit the tiny budget."""
    return settings(method) | {name: 4 if name == "evict" else value for name, value in (method.fast or {}).items()}


def identity(method) -> dict:
    """The listed identity setting on top of `settings`."""
    return settings(method) | method.identity


def weights(cfg: Config, seed: int = 0, follow: float = 0.7) -> tuple[Params, np.ndarray]:
    """(float64 params, successor_V). The head leans towards one successor of every token, by `follow`, so that text repeats itself
    and drafts are sometimes right; the rest is random, and attention is sharp enough for lost rows to change the text."""
    rng = np.random.default_rng(seed)

    def normal(*shape, inputs=1, scale=1.0):
        return scale * rng.normal(size=shape) / inputs**0.5

    def block():
        D, F, N, K, H = cfg.D, cfg.F, cfg.N, cfg.K, cfg.H
        return Block(
            1 + normal(D, scale=0.1), normal(N, H, D, inputs=D, scale=3.0), normal(K, H, D, inputs=D, scale=3.0),
            normal(K, H, D, inputs=D), normal(D, N, H, inputs=D), 1 + normal(D, scale=0.1),
            normal(F, D, inputs=D), normal(F, D, inputs=D), normal(D, F, inputs=F, scale=0.5),
        )  # fmt: skip

    blocks = tuple(block() for _ in range(cfg.L))
    embed, successor = normal(cfg.V, cfg.D), rng.permutation(cfg.V)
    head = (1 - follow) * normal(cfg.V, cfg.D)
    head[successor] += follow * embed
    return Params(embed, blocks, 1 + normal(cfg.D, scale=0.1), head), successor


@cache
def params(cfg: Config = CFG, dtype: str = "float32") -> Params:
    """The weights as arrays, also when first asked for inside a jitted function."""
    with jax.ensure_compile_time_eval():
        return jax.tree.map(lambda x: jnp.asarray(x, dtype), weights(cfg)[0])


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """Random prompts of LENGTHS in which every other token is the successor of the one before."""
    rng, (_, successor) = np.random.default_rng(1), weights(CFG)
    rows = []
    for length in LENGTHS:
        row = rng.integers(0, CFG.V, length)
        for t in range(1, length):
            row[t] = successor[row[t - 1]] if rng.random() < 0.5 else row[t]
        rows.append(tuple(row.tolist()))
    return tuple(rows)


def sampled(params, daily) -> list:
    """Parameters of which those named in `daily` run with every test, and the others in `make proofs`."""

    def marked(param):
        values, marks, name = getattr(param, "values", (param,)), getattr(param, "marks", ()), getattr(param, "id", None)
        return pytest.param(*values, id=name, marks=marks if values[0] in daily else (*marks, pytest.mark.proof))

    return [marked(param) for param in params]


def padded(rows, T: int | None = None) -> tuple[jax.Array, jax.Array]:
    """(tokens_BT, length_B), padded on the right with a token that is in the vocabulary."""
    T = T or max(map(len, rows))
    tokens = np.full((len(rows), T), 7, np.int32)
    for out, row in zip(tokens, rows, strict=True):
        out[: len(row)] = row
    return jnp.asarray(tokens), jnp.asarray([len(row) for row in rows], jnp.int32)


def read(policy, rows=None, *, cfg=CFG, dtype="float32", cut=None, chunk=None, evidence=(), T=None, pattern=None) -> Prompt:
    """Prefill."""
    tokens, length = padded(rows or prompts(), T)
    wanted = tuple(dict.fromkeys((*policy.needs(), *evidence)))
    return prefill(params(cfg, dtype), cfg, tokens, length, evidence=wanted, cut=cut, chunk=chunk, pattern=pattern)


def only(policy, prompt: Prompt) -> Prompt:
    """The prompt with the evidence that this policy asks for and no more."""

    def asked(rows):
        return rows.replace(evidence_BKS={kind: rows.evidence_BKS[kind] for kind in policy.needs() if kind in rows.evidence_BKS})

    return prompt.replace(layers=tuple(map(asked, prompt.layers)))


def packed(policy, prompt: Prompt, room: Room = ROOM, *, cfg=CFG) -> tuple:
    """The policy's own caches: one compiled program packs prompts that were read for it alone and for many."""
    return pack(policy, only(policy, prompt).layers, room, cfg)


def start(prompt: Prompt, policy, drafter=PLAIN, *, cfg=CFG, new=NEW, how=GREEDY, eos=(), seed=0, rows=None, keys=None, m=None) -> Decoding:
    """Pack, and draw the first token. rows: which rows of a batch these are, for their noise. m: the model with what the drafter brings."""
    B = prompt.tokens_BT.shape[0]
    layers = packed(policy, prompt, Room(new, drafter.nodes if drafter.nodes > 1 else 0), cfg=cfg)
    table = jnp.pad(prompt.tokens_BT, ((0, 0), (0, new)))
    keys = row_keys(seed, jnp.asarray(rows if rows is not None else range(B))) if keys is None else keys
    limit = jnp.full(B, new, jnp.int32)
    gone = prompt.length_B - prompt.next_B
    m = m or Model(cfg, params(cfg), None, Precision(), cfg.name)
    state = drafter.prepare(m, prompt.tokens_BT, prompt.length_B, new)
    return begin(layers, table, prompt.length_B, gone, prompt.logits_BV, drafter, keys, limit, how, eos, state)


def go(s: Decoding, policy, drafter=PLAIN, *, cfg=CFG, dtype="float32", how=GREEDY, eos=(), steps=1000) -> Decoding:
    """Decode to the end, or for so many passes. Consumes `s`."""
    return drafter.drive(params(cfg, dtype), cfg, s, steps, policy=policy.onward(), how=how, eos=eos)


def decode(policy=FULL, drafter=PLAIN, rows=None, *, cfg=CFG, dtype="float32", cut=None, chunk=None, T=None, **options) -> Decoding:
    """Everything from prompts to the last state."""
    prompt = read(policy, rows, cfg=cfg, dtype=dtype, cut=cut, chunk=chunk, T=T)
    named = {name: options[name] for name in ("how", "eos") if name in options}
    return go(start(prompt, policy, drafter, cfg=cfg, **options), policy, drafter, cfg=cfg, dtype=dtype, **named)


def text(s: Decoding) -> list[list[int]]:
    """The new tokens of each row."""
    tokens, count, made = (np.asarray(x) for x in (s.tokens_BS, s.count_B, s.made_B))
    return [row[c - n : c].tolist() for row, c, n in zip(tokens, count, made, strict=True)]


def forced(policy, layers, prompt: Prompt, tokens_BT, *, cfg=CFG):
    """One-row decoding of given tokens: yields (logits_BV, layers) after each. One compiled layer serves all steps."""
    tokens_BT, one = np.asarray(tokens_BT, np.int32), jnp.ones(len(tokens_BT), jnp.int32)
    for t in range(tokens_BT.shape[1]):
        token = jnp.asarray(tokens_BT[:, t : t + 1])
        logits, layers = extend(params(cfg), cfg, layers, token, prompt.next_B + t, one, policy)
        yield np.asarray(logits)[:, 0], layers


def kept(policy, layer) -> list[list[list[int]]]:
    """Ascending orders of the rows that each sequence and kv head still holds."""
    return [[sorted(int(o) for o in head if o >= 0) for head in row] for row in np.asarray(policy.kept(layer))]


def compiled(lowered) -> jax.stages.Compiled:
    """As users compile it: XLA's own emitters, which the other tests do without (conftest.py)."""
    return lowered.compile({"xla_cpu_use_fusion_emitters": True})


# Another text in the middle of the first prompt, and a piece of the second one behind it.
EARLIER = (*prompts()[0][:20], 3, 1, 4, 1, *prompts()[0][22:40], *prompts()[1][10:40])
OWN["KVShare"] = {"earlier": EARLIER, "share": 0.2, "dense": 4, "least": 4}
