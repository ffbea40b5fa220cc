"""The tasks: exact lengths, needles where they were asked for, answers that follow from the context."""

import re

import pytest

from tokeff.data import TASKS, encoder, make, sources, tasks
from tokeff.errors import UserError

pytestmark = pytest.mark.core
NEEDLE_TASKS = ("single_needle", "multi_question", "multi_key", "multi_value", "variable_tracking")


def solve(context, value):
    """Return the variables that hold `value`, by running the statements hidden in the text."""
    held = {}
    for name, number, other in re.findall(r"VAR ([A-Z]{5}) = (?:(\d{5})|VAR ([A-Z]{5}))\.", context):
        held[name] = number or held[other]
    return [name for name, number in held.items() if number == value]


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_decides_the_example(task, encode):
    assert make(task, 3, 300, encode) == make(task, 3, 300, encode)
    assert make(task, 3, 300, encode).context != make(task, 4, 300, encode).context


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [200, 513, 2048])
def test_lengths_are_exact(task, length, encode):
    for seed in range(4):
        example = make(task, seed, length, encode)
        assert len(encode(example.context)) == length
        assert len(encode(example.held_out)) == tasks.HELD_OUT
        assert len(encode(example.context + example.held_out)) == length + tasks.HELD_OUT


@pytest.mark.parametrize("task", TASKS)
def test_the_context_is_prose_and_the_held_out_text_goes_on_with_it(task, encode):
    example = make(task, 0, 400, encode)
    prose = re.sub(r" (The [^.]* is|One of the special magic numbers for \w+ is): \d{5}\.", "", " " + example.context)
    prose = re.sub(r" VAR [A-Z]{5} = (VAR )?\w{5}\.", "", prose).strip()
    assert prose + example.held_out in sources.text()


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_needles_are_at_their_depths(task, encode):
    pieces = sorted(len(encode(piece)) for piece in sources.pieces())
    for seed in range(4):
        example = make(task, seed, 2048, encode)
        needles, depths = example.meta["needles"], example.meta["depths"]
        assert len(needles) == len(depths)
        for (start, _), depth in zip(needles, depths):
            assert abs(start - depth * 2048) <= pieces[-1] / 2 + 15 * len(needles)


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_spans_are_the_tokens_of_the_needles(task, encode):
    example = make(task, 1, 700, encode)
    ids = encode(example.context)
    values = example.meta.get("values") or [example.meta["value"], *example.meta["variables"][:-1]]
    for (start, end), value in zip(example.meta["needles"], values):
        sentence = re.search(rf" VAR \w+ = (VAR )?{value}\.| (The|One)[^.!?]* is: {value}\.", " " + example.context)
        assert sentence is not None
        assert ids[start:end] == encode(sentence[0] if start else sentence[0].lstrip())


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_any_depth_can_be_asked_for(depth, encode):
    example = make("single_needle", 0, 400, encode, depths=(depth,))
    start, end = example.meta["needles"][0]
    assert (start == 0) == (depth == 0) and (end == 400) == (depth == 1)


def test_single_needles_go_through_the_depths(encode):
    depths = [make("single_needle", seed, 256, encode).questions[0].depth for seed in range(6)]
    assert depths == [*tasks.DEPTHS, *tasks.DEPTHS]


@pytest.mark.parametrize("task", ["single_needle", "multi_question", "multi_key"])
def test_needle_answers_stand_once_behind_their_key(task, encode):
    example = make(task, 5, 600, encode)
    assert len(example.questions) == (3 if task == "multi_question" else 1)
    for question in example.questions:
        asked = question.prompt.rsplit("Answer: ", 1)[1]
        assert re.findall(re.escape(asked) + r" (\d{5})\.", example.context) == [question.answer.strip()]
    assert len(set(example.meta["values"])) == len(example.meta["values"])


def test_multi_question_asks_for_unlike_things(encode):
    asked = make("multi_question", 0, 400, encode).meta["keys"]
    assert len({re.sub(r" [A-Z]\w+", "", key) for key in asked}) == 3
    many = make("multi_question", 0, 2000, encode, depths=tuple(i / 10 for i in range(10)))
    assert len({question.prompt for question in many.questions}) == 10


def test_multi_key_hides_as_many_needles_as_asked(encode):
    example = make("multi_key", 0, 1000, encode, keys=7)
    assert len(re.findall(r"special magic number for \w+ is: \d{5}\.", example.context)) == 7


def test_multi_value_lists_all_values_in_their_order(encode):
    example = make("multi_value", 2, 600, encode, values=5)
    found = re.findall(r"special magic numbers for \w+ is: (\d{5})\.", example.context)
    assert found == re.findall(r"\d{5}", example.questions[0].answer) == example.meta["values"]
    said = example.questions[0].prompt[-2:] + example.questions[0].answer
    assert said == "\n".join(f"{i}. {value}" for i, value in enumerate(found, start=1))


@pytest.mark.parametrize("hops", [1, 4, 9])
def test_variable_tracking_is_solved_by_running_it(hops, encode):
    for seed in range(3):
        example = make("variable_tracking", seed, 700, encode, hops=hops)
        found = solve(example.context, example.meta["value"])
        assert example.questions[0].answer == " " + ", ".join(found)
        assert len(found) == hops + 1
        assert f"assigned the value {example.meta['value']}" in example.questions[0].prompt


def test_longer_contexts_than_the_source_repeat_it(tmp_path, encode):
    path = tmp_path / "short.txt"
    path.write_text(sources.text()[:20000])
    length = 3 * len(encode(path.read_text()))
    example = make("single_needle", 0, length, encode, source=str(path))
    assert example.meta["repeats"] > 1 and len(encode(example.context)) == length
    with pytest.raises(UserError, match="shorter length, or your own longer"):
        make("perplexity", 0, length, encode, source=str(path))


def test_code_can_be_the_haystack(encode):
    example = make("perplexity", 0, 500, encode, source="stdlib")
    assert len(encode(example.context)) == 500
    assert example.context + example.held_out in sources.text("stdlib")


def test_no_key_stands_in_the_prose():
    words = set(re.findall(r"\w+", sources.text()))
    assert not words & set(tasks.CITIES)
    assert not re.search(r"\d{5}|VAR |magic", sources.text())


@pytest.mark.parametrize(
    ("task", "length", "options", "fix"),
    [
        ("single_neddle", 512, {}, "did you mean 'single_needle'"),
        ("multi_key", 512, {"key": 3}, "did you mean 'keys'"),
        ("multi_key", 512, {"keys": 0}, "use 1 to"),
        ("multi_key", 512, {"keys": 999}, "use 1 to"),
        ("single_needle", 512, {"depths": (1.5,)}, "in \\[0, 1\\]"),
        ("single_needle", 512, {"depths": ()}, "in \\[0, 1\\]"),
        ("multi_question", 20, {}, "use a length of at least"),
        ("perplexity", 10**7, {}, "use a shorter length"),
        ("perplexity", 512, {"source": "stdlb"}, "did you mean 'stdlib'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(task, length, options, fix, encode):
    with pytest.raises(UserError, match=fix) as refused:
        make(task, 0, length, encode, **options)
    assert "\n" not in str(refused.value)


def test_the_least_length_that_an_error_names_works(encode):
    with pytest.raises(UserError) as refused:
        make("multi_value", 0, 1, encode)
    least = int(re.findall(r"\d+", str(refused.value))[-1])
    assert len(encode(make("multi_value", 0, least, encode).context)) == least


def test_an_encoder_leaves_out_special_tokens_and_is_remembered():
    class Tokenizer:
        def encode(self, text, special=True):
            return [0] * special + [1] * len(text.split())

    tokenizer = Tokenizer()
    assert encoder(tokenizer)("a b") == [1, 1]
    assert encoder(tokenizer) is encoder(tokenizer)
