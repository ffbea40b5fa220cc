"""`tokeff bench presses`: the same method here and in kvpress, on the same weights and threads: prefill with compression, and decoding.

Both keep the same share of the prompt once, when it is read, and append what comes: methods that would go on evicting are told not to. A
prefill ends with the compressed cache; decoding is greedy, one token a pass. What kvpress needs for a token it needs through transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax.numpy as jnp
import numpy as np

from tokeff.bench import common
from tokeff.bench.common import Timer, interleave, ratio
from tokeff.bench.decode import Loop
from tokeff.bench.peer import Peer, is_llama, peer, peers_python
from tokeff.errors import UserError, nearest
from tokeff.kv.cache import Room
from tokeff.kv.extend import pack
from tokeff.kv.policy import Policy
from tokeff.kv.prefill import prefill
from tokeff.listing import find
from tokeff.models.load import Model

CONTEXTS = (2048,)
SCRIPT = Path(__file__).with_name("press_process.py")
# method: (kvpress' class, {its argument: our setting}); the ratio, which is the share removed, is added to all.
PRESSES: dict[str, tuple[str, dict[str, str]]] = {
    "SnapKV": ("SnapKVPress", {"window_size": "window", "kernel_size": "kernel"}),
    "Knorm": ("KnormPress", {}),
    "KeyDiff": ("KeyDiffPress", {}),
    "ExpectedAttention": ("ExpectedAttentionPress", {"n_future_positions": "future", "n_sink": "sinks", "epsilon": "floor"}),
    "TOVA": ("TOVAPress", {}),
    "StreamingLLM": ("StreamingLLMPress", {"n_sink": "sinks"}),
    "LagKV": ("LagKVPress", {"lag_size": "lag", "n_sink": "sinks"}),
    "PyramidKV": ("PyramidKVPress", {"window_size": "window", "kernel_size": "kernel"}),
}
SHOWN = (
    "method", "context", "seconds", "kvpress_seconds", "prefill_of_kvpress", "tokens_per_s", "kvpress_tokens_per_s", "decode_of_kvpress",
)  # fmt: skip


def pair(name: str, budget: float) -> tuple[Policy, list[Any]]:
    """(our policy, their press) of one method that keeps a share of the prompt."""
    if name not in PRESSES:
        raise UserError(f"no method {name!r} to compare with kvpress; {nearest(name, PRESSES)}")
    method, (press, arguments) = find(name), PRESSES[name]
    settings = method.settings() | {"budget": budget}
    if "evict" in settings:
        settings["evict"] = 0
    theirs = {argument: settings[setting] for argument, setting in arguments.items()}
    return method.build(**settings), [press, {"compression_ratio": 1 - budget, **theirs}]


def compressed(m: Model, policy: Policy, context: int, tokens: int) -> Timer:
    """A timer of one prefill and its packing."""
    policy.check(m.cfg, context)
    rng, length = np.random.default_rng(context), jnp.array([context], jnp.int32)
    ids = jnp.asarray(rng.integers(0, m.cfg.V, (1, context)), jnp.int32)

    def run():
        prompt = prefill(m.params, m.cfg, ids, length, evidence=policy.needs(), dtype=m.precision.cache)
        return pack(policy, prompt.layers, Room(tokens + 1), m.cfg), prompt.logits_BV

    return common.timed(run)


def rows(
    m: Model, other: Peer, contexts: Sequence[int], methods: Sequence[str], *, budget: float = 0.125, tokens: int = 16, rounds: int = 5
) -> list[dict[str, Any]]:
    """One row a context and method. All methods of both libraries take turns, prefills first, then decoding."""
    pairs, found = {name: pair(name, budget) for name in methods}, []
    for context in contexts:
        n, whole, steps = context - tokens - 1, {}, {}
        for name, (policy, press) in pairs.items():
            whole[name] = compressed(m, policy, context, tokens)
            whole[theirs(name)] = partial(other.ask, do="prefill", press=press, context=context)
            steps[name] = Loop(m, policy, context, tokens)
            steps[theirs(name)] = partial(each, other, do="decode", press=press, context=n, tokens=tokens)
        read, decoded = interleave(whole, rounds, f"prefill {context}"), interleave(steps, rounds, f"decode {context}")
        found += [_row(name, pairs[name][1][0], context, budget, read, decoded) for name in methods]
    return found


def each(other: Peer, *, tokens: int, **request: Any) -> float:
    """Seconds of one of so many tokens."""
    return other.ask(tokens=tokens, **request) / tokens


def theirs(name: str) -> str:
    """The name of kvpress' timer of a method."""
    return f"kvpress {name}"


def _row(name: str, press: str, context: int, budget: float, read: dict[str, list[float]], decoded: dict[str, list[float]]):
    """Ratios are theirs over ours: above 1, ours is faster."""
    other = theirs(name)
    return {
        "method": name,
        "press": press,
        "context": context,
        "budget": budget,
        "seconds": median(read[name]),
        "kvpress_seconds": median(read[other]),
        "prefill_of_kvpress": ratio(read[other], read[name]),
        "tokens_per_s": 1 / median(decoded[name]),
        "kvpress_tokens_per_s": 1 / median(decoded[other]),
        "decode_of_kvpress": ratio(decoded[other], decoded[name]),
        "rounds": len(read[name]),
    }


def main(args: list[str]) -> None:
    """Command line."""
    p = common.parser("presses", "Prefill with compression, and decoding, next to kvpress' same methods.", rounds=5)
    common.model_options(p, CONTEXTS, peer=False)
    p.add_argument("--methods", nargs="+", default=list(PRESSES), help=f"which methods (default: {' '.join(PRESSES)})")
    p.add_argument("--budget", type=float, default=0.125, help="share of the prompt that is kept (default: %(default)s)")
    p.add_argument("--tokens", type=common.positive, default=16, help="tokens of each timing (default: %(default)s)")
    known = p.parse_args(args)
    for name in known.methods:
        pair(name, known.budget)
    common.check_out(known.out)
    if peers_python() is None:
        raise UserError("no peers environment to compare with; run `make peers`, or set TOKEFF_PEERS_PYTHON")
    m = common.open_model(known.model, known.contexts, known.tokens + 16)
    if not is_llama(m):
        raise UserError(f"{m.name} is no plain Llama, which is what kvpress is given here; choose another --model")
    with peer(m, script=SCRIPT) as other:
        if other is None:
            raise UserError("kvpress is compared with on a CPU; set JAX_PLATFORMS=cpu")
        found = rows(m, other, known.contexts, known.methods, budget=known.budget, tokens=known.tokens, rounds=known.rounds)
    common.finish("presses", found, known.out, args, SHOWN)
