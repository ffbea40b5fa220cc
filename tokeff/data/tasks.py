"""Synthetic tasks on real text: what a context must keep for its questions to be answered.

Each task is a pure function of (seed, length in tokens, encode) and of its options. The shapes of the tasks are those
of RULER (Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?", section 3):
single, multi-key and multi-value needle retrieval, and variable tracking. They differ from RULER's in two ways: the
haystack is real prose in all of them, and questions are put as text to continue, which a small model can do.

A question is asked by reading `context`, then `prompt`; the model is right when it goes on with `answer`. The three
are encoded one by one, so that the questions of an example share one context.
"""

import dataclasses
import inspect
import itertools
import string
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tokeff.data import sources
from tokeff.data.haystack import Encode, Haystack, Insert, build
from tokeff.errors import UserError, nearest

DEPTHS = (0.1, 0.5, 0.9)
HELD_OUT = 128
_CITY_NAMES = (
    "Amsterdam Ankara Athens Baghdad Bangkok Beijing Berlin Bogota Boston Brussels Budapest Cairo Calgary Chicago "
    "Copenhagen Dakar Dallas Delhi Denver Dublin Geneva Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta "
    "Krakow Lagos Lima Lisbon Madrid Manila Melbourne Miami Milan Montreal Moscow Mumbai Munich Nairobi Oslo Paris "
    "Prague Quebec Rome Santiago Seattle Seoul Shanghai Singapore Stockholm Sydney Tehran Tokyo Toronto Vienna "
    "Warsaw Zurich"
)
CITIES = tuple(_CITY_NAMES.split())
"""Keys of the needles; none of them stands in the committed prose."""
FACTS = (
    "special magic number for {}",
    "secret code of the {} office",
    "winning lottery ticket of {}",
    "telephone number of the {} airport",
    "flight number to {}",
    "invoice number of the {} bank",
    "locker number of the {} stadium",
    "licence plate of the {} taxi",
)
"""What a needle says of its city: "The special magic number for Paris is: 41933." The first one is RULER's."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question on a context.

    prompt: text that follows the context; starts with an empty line and ends without white space.
    answer: the right continuation of the prompt; starts with its space.
    depth: where in [0, 1] of the context the fact was put that is asked for (the first one, where there are several).
    """

    prompt: str
    answer: str
    depth: float


@dataclasses.dataclass(frozen=True)
class Example:
    """A context, questions on it, and how its prose goes on.

    context: text of exactly the asked number of tokens.
    held_out: the next 128 tokens of the same text, for loss and divergence; encode it by itself.
    meta: 'task', 'seed', 'length', 'source', 'repeats' (1, or how often the source was repeated to be long enough),
        'needles' (list of [start, end) of every hidden sentence, in tokens of the context), and the task's own facts.
    """

    context: str
    questions: tuple[Question, ...]
    held_out: str
    meta: Mapping[str, Any] = dataclasses.field(hash=False)


Task = Callable[..., Example]


def single_needle(
    seed: int, length: int, encode: Encode, *, depths: Sequence[float] = DEPTHS, source: str = sources.PROSE
) -> Example:
    """One needle, one question (RULER's S-NIAH). Seed s uses depth s modulo the number of depths."""
    rng = _rng("single_needle", seed, length)
    depth = _checked(depths)[seed % len(depths)]
    return _needles("single_needle", seed, length, encode, rng, (depth,), asked=(0,), source=source)


def multi_question(
    seed: int, length: int, encode: Encode, *, depths: Sequence[float] = DEPTHS, source: str = sources.PROSE
) -> Example:
    """One needle of its own kind at every depth and one question for each: several questions that share one context.

    A method that compresses the context once must keep all of them without knowing which is asked. RULER's MQ-NIAH
    asks them in one question, with needles of one kind; with unlike kinds each question is as hard as a single needle.
    """
    rng = _rng("multi_question", seed, length)
    depths = _checked(depths)
    facts = [FACTS[i % len(FACTS)] for i in rng.permutation(max(len(depths), len(FACTS)))[: len(depths)]]
    return _needles("multi_question", seed, length, encode, rng, depths, range(len(depths)), source, facts)


def multi_key(seed: int, length: int, encode: Encode, *, keys: int = 4, source: str = sources.PROSE) -> Example:
    """`keys` needles that differ in their key and value, spread over the context; one is asked (RULER's MK-NIAH)."""
    rng = _rng("multi_key", seed, length)
    depths = _spread(rng, _count("keys", keys, len(CITIES)))
    return _needles("multi_key", seed, length, encode, rng, depths, (int(rng.integers(keys)),), source)


def multi_value(seed: int, length: int, encode: Encode, *, values: int = 4, source: str = sources.PROSE) -> Example:
    """`values` needles with one key and different values; all are asked for in their order (RULER's MV-NIAH)."""
    rng = _rng("multi_value", seed, length)
    city, numbers = str(rng.choice(CITIES)), _numbers(rng, _count("values", values, 100))
    depths = _spread(rng, values)
    inserts = [Insert(d, f" One of the special magic numbers for {city} is: {n}.") for d, n in zip(depths, numbers)]
    hay = build(rng, length, encode, inserts, source, HELD_OUT)
    prompt = (
        f"\n\nQuestion: List the special magic numbers for {city}, in the order of the text.\n"
        f"Answer: The special magic numbers for {city} are:\n1."
    )
    answer = " " + "".join(f"{n}\n{i}. " for i, n in enumerate(numbers[:-1], start=2)) + numbers[-1]
    question = Question(prompt, answer, depths[0])
    facts = {"key": city, "values": numbers, "depths": list(depths)}
    return _example("multi_value", seed, length, source, hay, (question,), facts)


def variable_tracking(seed: int, length: int, encode: Encode, *, hops: int = 4, source: str = sources.PROSE) -> Example:
    """A chain X1 = value, X2 = X1, ... of `hops` copies; asked are all names that hold the value (RULER's VT).

    The statements stand in the order of the chain, as in RULER with one chain; names are five capital letters.
    """
    rng = _rng("variable_tracking", seed, length)
    names, value = _names(rng, _count("hops", hops, 100) + 1), _numbers(rng, 1)[0]
    depths = _spread(rng, hops + 1)
    said = [f" VAR {names[0]} = {value}.", *(f" VAR {b} = VAR {a}." for a, b in itertools.pairwise(names))]
    hay = build(rng, length, encode, [Insert(d, text) for d, text in zip(depths, said)], source, HELD_OUT)
    prompt = (
        f"\n\nQuestion: Find all variables that are assigned the value {value} in the text above, in order.\nAnswer: "
        f"According to the chain of variable assignment, {len(names)} variables are assigned the value {value}, "
        "they are:"
    )
    facts = {"value": value, "variables": names, "depths": list(depths)}
    question = Question(prompt, " " + ", ".join(names), depths[0])
    return _example("variable_tracking", seed, length, source, hay, (question,), facts)


def perplexity(seed: int, length: int, encode: Encode, *, source: str = sources.PROSE) -> Example:
    """A context without questions: the loss on its 128 held-out tokens is what is measured.

    The source is never repeated here, because a repeated text can be copied. Raises UserError when it is too short.
    """
    hay = build(_rng("perplexity", seed, length), length, encode, (), source, HELD_OUT, repeat=False)
    return _example("perplexity", seed, length, source, hay, (), {})


TASKS: Mapping[str, Task] = {
    task.__name__: task
    for task in (single_needle, multi_question, multi_key, multi_value, variable_tracking, perplexity)
}


def make(task: str, seed: int, length: int, encode: Encode, **options: Any) -> Example:
    """Return example `seed` of a task.

    Raises UserError for an unknown task or option, or a length that the task does not fit in.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; {nearest(task, TASKS)}")
    known = [p.name for p in inspect.signature(TASKS[task]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise UserError(f"task {task!r} has no option {option!r}; {nearest(option, known)}")
    return TASKS[task](seed, length, encode, **options)


def _needles(
    task: str,
    seed: int,
    length: int,
    encode: Encode,
    rng: np.random.Generator,
    depths: Sequence[float],
    asked: Sequence[int],
    source: str,
    facts: Sequence[str] | None = None,
) -> Example:
    """Hide a number at every depth, each for another city, and ask for the needles that are listed in `asked`.

    facts: what each needle says of its city; None: all say the first of `FACTS`.
    """
    cities = [str(city) for city in rng.choice(CITIES, len(depths), replace=False)]
    numbers = _numbers(rng, len(depths))
    said = [fact.format(city) for fact, city in zip(facts or FACTS[:1] * len(depths), cities)]
    inserts = [Insert(d, f" The {what} is: {number}.") for d, what, number in zip(depths, said, numbers)]
    hay = build(rng, length, encode, inserts, source, HELD_OUT)
    prompts = [f"\n\nQuestion: What is the {what}?\nAnswer: The {what} is:" for what in said]
    questions = tuple(Question(prompts[i], " " + numbers[i], depths[i]) for i in asked)
    meta = {"keys": said, "values": numbers, "depths": list(depths)}
    return _example(task, seed, length, source, hay, questions, meta)


def _example(
    task: str, seed: int, length: int, source: str, hay: Haystack, questions: tuple[Question, ...], facts: dict
) -> Example:
    """Return the example of a haystack, its facts in JSON's types."""
    spans = [list(span) for span in hay.spans]
    meta = {"task": task, "seed": seed, "length": length, "source": source, "repeats": hay.repeats, "needles": spans}
    return Example(hay.context, questions, hay.held_out, meta | facts)


def _rng(task: str, seed: int, length: int) -> np.random.Generator:
    """Return the generator of one example: unlike tasks, seeds and lengths draw unlike texts."""
    return np.random.default_rng([zlib.crc32(task.encode()), seed, length])


def _numbers(rng: np.random.Generator, n: int) -> list[str]:
    """Return `n` different numbers of five digits."""
    return [str(10000 + int(number)) for number in rng.choice(90000, n, replace=False)]


def _names(rng: np.random.Generator, n: int) -> list[str]:
    """Return `n` different names of five capital letters."""
    found: dict[str, None] = {}
    while len(found) < n:
        found["".join(rng.choice(list(string.ascii_uppercase), 5))] = None
    return list(found)


def _spread(rng: np.random.Generator, n: int) -> tuple[float, ...]:
    """Return `n` rising depths, one at random in each n-th of the context."""
    return tuple(round(float((i + u) / n), 4) for i, u in enumerate(rng.random(n)))


def _checked(depths: Sequence[float]) -> tuple[float, ...]:
    """Return the depths if there are any and all are in [0, 1]."""
    if not depths or len(depths) > len(CITIES) or not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"depths {list(depths)} are not 1 to {len(CITIES)} numbers in [0, 1]; use for example {DEPTHS}")
    return tuple(float(depth) for depth in depths)


def _count(name: str, n: int, most: int) -> int:
    """Return a number of needles if it is possible."""
    if not 1 <= n <= most:
        raise UserError(f"{name} is {n}; use 1 to {most}")
    return n
