"""Prompts to text: tokenise, pad, prefill, pack, decode. Everything a caller may combine meets here, and is checked here first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tokeff.decode.draft import Drafter, Plain
from tokeff.decode.loop import Decoding, begin
from tokeff.decode.sample import GREEDY, Sampling, row_keys
from tokeff.errors import UserError
from tokeff.kv.bounded import check_bounded, prefill_bounded
from tokeff.kv.cache import Room
from tokeff.kv.evidence import Evidence
from tokeff.kv.extend import extend, pack
from tokeff.kv.policy import Full, Policy
from tokeff.kv.prefill import Prompt, check_pass, join, prefill
from tokeff.models.load import Model, fingerprint
from tokeff.models.transformer import Pass
from tokeff.sharding import beside, follow
from tokeff.sparse.pattern import Pattern

if TYPE_CHECKING:
    from tokeff.context import Compressed


@dataclass(frozen=True)
class Generation:
    """What came out, one entry per prompt. `passes` counts model calls after the prefill; tokens / passes is the mean accepted length."""

    texts: list[str]
    tokens: list[list[int]]
    passes: list[int]


@dataclass(frozen=True)
class Setup:
    """One combination of parts, checked before anything is computed."""

    kv: Policy = field(default_factory=Full)
    cut: Pass | None = None
    decode: Drafter = field(default_factory=Plain)
    sampling: Sampling = GREEDY
    prefill: Pattern | None = None
    bounded: int | None = None

    def __post_init__(self):
        """A pass says what holds the prompt that it leaves (`Pass.holds`)."""
        if isinstance(self.cut, Pass) and isinstance(self.kv, Policy):
            object.__setattr__(self, "kv", self.cut.holds(self.kv))

    def check(self, m: Model, lengths: Sequence[int], new: int) -> None:
        """Raise UserError when the parts do not fit each other, the model, or the prompts."""
        self.check_kinds()
        check_new(new)
        for i, n in enumerate(lengths):
            if n == 0:
                raise UserError(f"prompt {i} is empty; give at least one token")
            if n + new > m.cfg.max_len:
                raise UserError(
                    f"prompt {i} has {n} tokens and {new} more are wanted, but {m.cfg.name} reads {m.cfg.max_len}; shorten it"
                )
            if self.cut is not None:
                self.cut.check(m.cfg, n)
                n = self.cut.rows(n)
            self.kv.check(m.cfg, n)
            if self.prefill is not None:
                self.prefill.check(m.cfg, n)
        self.check_evidence()
        self.check_angles()
        check_pass(self.prefill, self.cut)
        check_bounded(self.bounded, self.kv, self.cut, self.prefill)
        self.sampling.check(len(lengths))
        self.decode.check(m)
        reason = self.kv.drafts(self.decode.depth) if self.decode.nodes > 1 else None
        if reason := reason or self.decode.fits(self.kv, m.cfg):
            raise UserError(f"{type(self.decode).__name__} does not fit {type(self.kv).__name__}: {reason}")

    def fit(self, m: Model) -> Setup:
        """With what the policy leaves open filled in from the model."""
        return replace(self, kv=self.kv.fit(m))

    def check_angles(self) -> None:
        """Raise UserError when rows stand at other angles than a policy would take off their keys."""
        if self.cut is not None and self.cut.renumbers and (policy := raw_keyed(self.kv)):
            names = type(self.cut).__name__, type(policy).__name__
            raise UserError(f"{names[0]} renumbers rows, and {names[1]} takes the rotation off keys by place; set renumber=False")

    def check_evidence(self) -> None:
        """Raise UserError when the policy wants attention of prompt rows that a sparse prefill does not compute."""
        if self.prefill is None:
            return
        names = f"{type(self.prefill).__name__} does not fit {type(self.kv).__name__}"
        for rows in (kind.attends() for kind in self.kv.needs()):
            if rows == float("inf"):
                raise UserError(f"{names}: it ranks by the attention of every prompt row; use a policy that asks the last ones")
            if rows > self.prefill.dense:
                raise UserError(f"{names}: it ranks by the last {rows} rows, which must read densely; set dense={rows}")

    def check_kinds(self) -> None:
        """Raise UserError for something that is not a part of its kind, such as a method's name or a method not called."""
        kinds = (("kv", self.kv, Policy), ("decode", self.decode, Drafter), ("sampling", self.sampling, Sampling))
        for name, part, kind in kinds:
            if not isinstance(part, kind):
                raise UserError(f"{name}={part!r} is no {kind.__name__}; give for example {name}={_EXAMPLES[name]}")
        if self.cut is not None and not isinstance(self.cut, Pass):
            raise UserError(f"cut={self.cut!r} is no pass; give for example cut={_EXAMPLES['cut']}")
        if self.prefill is not None and not isinstance(self.prefill, Pattern):
            raise UserError(f"prefill={self.prefill!r} is no pattern; give for example prefill={_EXAMPLES['prefill']}")

    def room(self, new: int) -> Room:
        """Space for `new` tokens. A draft row beyond the limit is never accepted, so drafts need no extra slots."""
        return Room(new, self.decode.nodes if self.decode.nodes > 1 else 0)


_EXAMPLES = {
    "kv": "tokeff.kv.snapkv(0.1)", "cut": "tokeff.reduce.gemfilter(0.5)",
    "decode": "tokeff.decode.prompt_lookup()", "sampling": "tokeff.Sampling(0.7)",
    "prefill": "tokeff.sparse.tri_shape()",
}  # fmt: skip


def raw_keyed(part: Any) -> Policy | None:
    """The part of a policy that takes the rotation off a prompt's keys, or None."""
    if isinstance(part, Policy) and part.raw_keys:
        return part
    return next((found for f in fields(part) if (found := raw_keyed(getattr(part, f.name)))), None) if is_dataclass(part) else None


def check_new(new: int) -> None:
    if new < 1:
        raise UserError(f"max_new={new} generates nothing; give at least 1")


def bucket(n: int) -> int:
    """Round a length up so that prompts of similar length share compiled code."""
    step = 64 if n <= 1024 else 256
    return -(-n // step) * step


def encode(m: Model, prompts: str | Sequence[str] | Sequence[Sequence[int]], special: bool = True) -> list[list[int]]:
    """Token ids of each prompt; ids pass through. special: add what the tokenizer puts before a text; not behind a context."""
    items = [prompts] if isinstance(prompts, str) else list(prompts)
    if not items or not all(isinstance(p, (str, Sequence, np.ndarray)) for p in items):
        raise UserError("prompts must be a string, a list of strings, or a list of token lists")
    ids = [m.tok.encode(p, special) if isinstance(p, str) else [int(t) for t in p] for p in items]
    wrong = next((t for row in ids for t in row if not 0 <= t < m.cfg.V), None)
    if wrong is not None:
        raise UserError(f"token id {wrong} is outside the vocabulary; {m.cfg.name} has ids 0 to {m.cfg.V - 1}")
    return ids


def check_chunk(chunk: int | None, bounded: int | None) -> None:
    if chunk is not None and (not isinstance(chunk, Integral) or chunk < 1):
        raise UserError(f"chunk={chunk} reads nothing; give a number of tokens, or None for the whole prompt at once")
    if chunk is not None and bounded is not None:
        raise UserError(f"bounded={bounded} says already in which pieces the prompt is read; leave out chunk")


def pad(ids: Sequence[Sequence[int]], T: int | None = None) -> tuple[jax.Array, jax.Array]:
    """(tokens_BT, length_B), padded on the right to a bucket."""
    lengths = [len(row) for row in ids]
    tokens = np.zeros((len(ids), T or bucket(max(lengths))), np.int32)
    for row, given in zip(tokens, ids, strict=True):
        row[: len(given)] = given
    return jnp.asarray(tokens), jnp.asarray(lengths, jnp.int32)


def read(m: Model, ids, setup: Setup, *, chunk: int | None = None, evidence: tuple[Evidence, ...] = ()) -> Prompt:
    """Prefill these prompts, gathering what the policy needs (and what else is asked for)."""
    tokens, length = pad(ids)
    given = follow(m.params, {"tokens_BT": tokens, "length_B": length})
    wanted = tuple(dict.fromkeys((*setup.kv.needs(), *evidence)))
    with beside(m.params):
        if setup.bounded is not None:
            return prefill_bounded(
                m.params, m.cfg, given["tokens_BT"], given["length_B"], setup.kv,
                piece=setup.bounded, evidence=wanted, dtype=m.precision.cache,
            )  # fmt: skip
        return prefill(
            m.params, m.cfg, given["tokens_BT"], given["length_B"],
            evidence=wanted, cut=setup.cut, chunk=chunk, dtype=m.precision.cache, pattern=setup.prefill,
        )  # fmt: skip


def start(m: Model, prompt: Prompt, setup: Setup, new: int, seed: int = 0, eos: tuple[int, ...] = ()) -> Decoding:
    """Pack the prompt under the policy and draw the first token."""
    with beside(m.params):
        layers = pack(setup.kv, prompt.layers, setup.room(new), m.cfg)
        state = setup.decode.prepare(m, prompt.tokens_BT, prompt.length_B, new)
        s = decoding(layers, prompt.tokens_BT, prompt.length_B, prompt.next_B, prompt.logits_BV, setup, new, seed, eos, state)
    return follow(m.params, s)


def decoding(
    layers, tokens_BT, length_B, next_B, logits_BV, setup: Setup, new: int, seed: int, eos: tuple[int, ...], state: Any = None
) -> Decoding:
    """A generation about to start from these caches and last logits; state is what the drafter prepared."""
    B = length_B.shape[0]
    table = jnp.pad(tokens_BT, ((0, 0), (0, new)))
    keys = row_keys(seed, jnp.arange(B))
    limit = jnp.full(B, new, jnp.int32)
    return begin(layers, table, length_B, length_B - next_B, logits_BV, setup.decode, keys, limit, setup.sampling, eos, state)


def go(m: Model, s: Decoding, setup: Setup, steps: int, eos: tuple[int, ...]) -> Decoding:
    """At most `steps` more passes. Consumes `s`."""
    with beside(m.params):
        return setup.decode.drive(m.params, m.cfg, s, steps, policy=setup.kv.onward(), how=setup.sampling, eos=eos)


def new_tokens(s: Decoding) -> list[list[int]]:
    """The generated ids of each row, the end-of-sequence token included."""
    tokens, count, made = (np.asarray(x) for x in (s.tokens_BS, s.count_B, s.made_B))
    return [row[c - n : c].tolist() for row, c, n in zip(tokens, count, made, strict=True)]


def finished(m: Model, s: Decoding) -> Generation:
    ids = new_tokens(s)
    return Generation([m.tok.decode(t) for t in ids], ids, np.asarray(s.passes_B).tolist())


def generate(
    m: Model,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    kv: Policy | None = None,
    cut: Pass | None = None,
    decode: Drafter | None = None,
    max_new: int = 64,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    prefill: Pattern | None = None,
    chunk: int | None = None,
    bounded: int | None = None,
    stop: bool = True,
    cache: Compressed | None = None,
) -> Generation:
    """Continue each prompt by up to `max_new` tokens.

    kv: what each layer keeps and reads. cut: which prompt rows go on through the network. decode: how many tokens a pass may
    commit. prefill: which blocks of the prompt its rows read (default all), or where rows are taken from. chunk: prefill in pieces of so
    many tokens. bounded: let `kv` drop rows after each piece of so many tokens, so that its budget bounds the memory (kv/bounded.py).
    stop: end a row at the model's end-of-sequence tokens. cache: a compressed context that every prompt continues, under the parts it
    was compressed with.
    A row's tokens depend on (seed, row) alone.
    Raises UserError, before computing anything, for parts that do not fit.
    """
    if cache is not None:
        if (kv, cut, decode, prefill, chunk, bounded) != (None,) * 6:
            raise UserError("the compressed context fixes kv, cut, decode and how it was read; give them to compress instead")
        return finished(m, ask(m, cache, encode(m, prompts, special=False), sampling, seed, max_new, m.cfg.eos if stop else ()))
    setup = Setup(Full() if kv is None else kv, cut, Plain() if decode is None else decode, sampling, prefill, bounded)
    ids, eos = encode(m, prompts), m.cfg.eos if stop else ()
    setup.check(m, [len(row) for row in ids], max_new)
    check_chunk(chunk, bounded)
    setup = setup.fit(m)
    s = start(m, read(m, ids, setup, chunk=chunk), setup, max_new, seed, eos)
    return finished(m, go(m, s, setup, max_new, eos))


def ask(m: Model, cache: Compressed, ids: list[list[int]], sampling: Sampling, seed: int, new: int, eos) -> Decoding:
    """Continue one compressed context by several prompts at once, each on a fork of its own; the context stays as it is."""
    if cache.model != fingerprint(m):
        raise UserError("the context was compressed with another model; load that one, or compress the text again")
    check_new(new)
    setup = replace(cache.setup, sampling=sampling)
    longest, n = max(map(len, ids)), len(cache.tokens)
    if not all(ids):
        raise UserError("a prompt is empty; give at least one token behind the context")
    if longest + new > cache.room:
        raise UserError(f"{longest} + {new} tokens do not fit the context's room of {cache.room}; compress with room={longest + new}")
    setup.sampling.check(len(ids))
    tokens, length = pad(ids, longest)
    B = len(ids)
    layers = setup.kv.fork(cache.layers, B, setup.room(cache.room))
    context = jnp.repeat(jnp.asarray([cache.tokens], jnp.int32), B, axis=0)
    start_B, before_B = jnp.full(B, cache.next, jnp.int32), jnp.full(B, n, jnp.int32)
    with beside(m.params):
        logits, layers = extend(m.params, m.cfg, follow(m.params, layers), tokens, start_B, length, setup.kv)
        last = jnp.take_along_axis(logits, (length - 1)[:, None, None], axis=1)[:, 0]
        text_BT, length_B = join(context, before_B, tokens), before_B + length
        state = setup.decode.prepare(m, text_BT, length_B, new)
        s = decoding(layers, text_BT, length_B, start_B + length, last, setup, new, seed, eos, state)
    return go(m, follow(m.params, s), setup, new, eos)


def stream(
    m: Model,
    prompt: str | Sequence[int],
    *,
    kv: Policy | None = None,
    cut: Pass | None = None,
    decode: Drafter | None = None,
    max_new: int = 64,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    prefill: Pattern | None = None,
    chunk: int | None = None,
    bounded: int | None = None,
    stop: bool = True,
    every: int = 4,
) -> Iterator[str]:
    """Yield the text of one prompt's continuation piece by piece, after every `every` passes. Otherwise like `generate`."""
    setup = Setup(Full() if kv is None else kv, cut, Plain() if decode is None else decode, sampling, prefill, bounded)
    check_chunk(chunk, bounded)
    ids, eos = encode(m, [prompt] if isinstance(prompt, str) else [list(prompt)]), m.cfg.eos if stop else ()
    setup.check(m, [len(row) for row in ids], max_new)
    setup = setup.fit(m)
    s, said = start(m, read(m, ids, setup, chunk=chunk), setup, max_new, seed, eos), ""
    while True:
        text, done = m.tok.decode(new_tokens(s)[0]), bool(s.done_B.all())
        if done or not text.endswith("\ufffd"):  # half a character waits for its other bytes
            yield text[len(said) :]
            said = text
        if done:
            return
        s = go(m, s, setup, every, eos)

