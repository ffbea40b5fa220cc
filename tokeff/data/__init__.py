"""Real text, synthetic tasks on it, and the data sets they are kept in.

    from tokeff.data import load
    for example in load("multi_question", length=2048, n=8, seed=0, tokenizer=m.tokenizer):
        example.context, example.questions, example.held_out

tensorflow-datasets and grain are imported by the first `load` or `load_text`, not before.
"""

from typing import TYPE_CHECKING, Any

from tokeff.data.haystack import encoder
from tokeff.data.sources import PROMPT_KINDS, SOURCES, Prompt, prompts, text
from tokeff.data.tasks import TASKS, Example, Question, make

if TYPE_CHECKING:
    import grain

__all__ = [
    "PROMPT_KINDS",
    "SOURCES",
    "TASKS",
    "Example",
    "Prompt",
    "Question",
    "encoder",
    "load",
    "load_text",
    "make",
    "prompts",
    "text",
]


def load(task: str, length: int, n: int, seed: int, tokenizer: Any, **options: Any) -> "grain.MapDataset":
    """Return `n` examples of a task from disk, made first if needed; see `tokeff.data.builders.load`."""
    from tokeff.data import builders

    return builders.load(task, length, n, seed, tokenizer, **options)


def load_text(source: str, length: int, tokenizer: Any) -> "grain.MapDataset":
    """Return a source in passages of at most `length` tokens; see `tokeff.data.builders.load_text`."""
    from tokeff.data import builders

    return builders.load_text(source, length, tokenizer)
