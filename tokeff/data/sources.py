"""Where text comes from: two committed passages of prose, Python's own standard library, or a text file of yours.

A source is a name in `SOURCES` or a path that ends in .txt (UTF-8, public or not: it is only read). It is read as
*pieces*: sentences of prose or lines of code. Each piece starts with the white space that separates it from the one
before, so that joining neighbouring pieces gives the text back, and a text can be cut or added to between any two.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import sysconfig

from tokeff.errors import UserError, nearest

PROSE = "northanger_abbey"
CALIBRATION = "persuasion"
"""For methods that are calibrated and models that are trained: no task reads it, and it shares no eight words in a row with what they
read."""
CODE = "stdlib"
TRAINING_CODE = "stdlib_training"
"""Other files of the standard library, for models that are trained: no evaluation reads them."""
SOURCES = (PROSE, CALIBRATION, CODE, TRAINING_CODE)
STDLIB_FILES = (
    "argparse.py",
    "ast.py",
    "calendar.py",
    "configparser.py",
    "csv.py",
    "dataclasses.py",
    "difflib.py",
    "fractions.py",
    "heapq.py",
    "shutil.py",
    "statistics.py",
    "textwrap.py",
)
"""Files of the standard library that Python 3.11 to 3.14 all have, in the order they are read."""
TRAINING_FILES = (
    "bdb.py",
    "cmd.py",
    "contextlib.py",
    "copy.py",
    "queue.py",
    "random.py",
    "sched.py",
    "shlex.py",
    "socketserver.py",
    "timeit.py",
    "wave.py",
    "weakref.py",
)
PROMPT_KINDS = ("prose", "code", "chat", "copy", "summarise")
COPY_HEAVY = 0.7
"""The share of its 8-grams that a continuation must have from its prompt, for the prompt to be one of `copy_heavy`."""

_TEXT = pathlib.Path(__file__).parent / "text"
_ABBREVIATIONS = frozenset({"Mr.", "Mrs.", "Dr.", "St.", "No.", "Vol.", "Esq."})
_SHORTEST = 20  # characters: a cry such as "Oh!" stays with the sentence after it
_SENTENCE_END = re.compile(r"[.!?][\"')]*\s+(?=[\"'(]*[A-Z])")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One short everyday prompt.

    text: at most 128 tokens of SmolLM2's tokenizer. For kinds 'chat' and 'summarise' it is what the user says, to be put into
    the model's chat template by the caller; the other kinds are plain text to continue.
    kind: one of `PROMPT_KINDS`; 'copy' prompts can be answered by repeating parts of themselves.
    copied: of a 'copy' prompt, the share of the 8-grams of SmolLM2's continuation that stand in the prompt, as
    experiments/copy_heavy.py measured it; None for the other kinds.
    """

    text: str
    kind: str
    copied: float | None = None

    @property
    def said(self) -> bool:
        """Whether it is what a user says to a chat model."""
        return self.kind in ("chat", "summarise")


def text(source: str = PROSE) -> str:
    """Return the whole text of a source, white space at the ends removed.

    Prose is unwrapped: one line a paragraph, an empty line between paragraphs, no chapter headings. The text of
    'stdlib' and 'stdlib_training' is that of the running Python, so figures measured on it belong to one Python version.
    Raises UserError for an unknown source or an unreadable file.
    """
    return "".join(pieces(source)).strip()


@functools.lru_cache(maxsize=8)
def pieces(source: str = PROSE) -> tuple[str, ...]:
    """Return the sentences of prose or the lines of code of a source, each with its white space in front."""
    if source in (CODE, TRAINING_CODE):
        return tuple(_code_lines(_stdlib(STDLIB_FILES if source == CODE else TRAINING_FILES)))
    if source in (PROSE, CALIBRATION):
        raw = (_TEXT / f"{source}.txt").read_text(encoding="utf-8")
    elif source.endswith(".txt"):
        raw = _read(pathlib.Path(source))
    else:
        raise UserError(f"unknown text source {source!r}; {nearest(source, SOURCES)} (or give a path to a .txt file)")
    found = tuple(_sentences(raw))
    if not found:
        raise UserError(f"the text source {source} is empty; give a file with text in it")
    return found


def digest(source: str) -> str:
    """Return 16 hex digits of the sha256 of a source's text: it changes when the text does."""
    return hashlib.sha256(text(source).encode()).hexdigest()[:16]


@functools.cache
def prompts(kind: str | None = None) -> tuple[Prompt, ...]:
    """Return the committed prompts, of one kind or (None) of all, in a fixed order. Raises UserError for the kind."""
    rows = json.loads((_TEXT / "prompts.json").read_text(encoding="utf-8"))
    if kind is not None and kind not in PROMPT_KINDS:
        raise UserError(f"unknown prompt kind {kind!r}; {nearest(kind, PROMPT_KINDS)}")
    return tuple(Prompt(row["text"], row["kind"], row.get("copied")) for row in rows if kind in (None, row["kind"]))


def copy_heavy() -> tuple[Prompt, ...]:
    """Return the 'copy' prompts whose continuation is mostly copied from them: at least `COPY_HEAVY` of its 8-grams."""
    return tuple(prompt for prompt in prompts("copy") if (prompt.copied or 0) >= COPY_HEAVY)


def _read(path: pathlib.Path) -> str:
    """Return the text of a file of the user's."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give a readable .txt file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; save it as UTF-8") from error


def _stdlib(files: tuple[str, ...]) -> str:
    """Return these files of the installed standard library, one after another."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise UserError(f"this Python has no source of {missing[0]}; use a Python installed with its library sources")
    return "\n\n".join((folder / name).read_text(encoding="utf-8").strip() for name in files)


def _sentences(raw: str) -> list[str]:
    """Split prose into sentences; the first of a paragraph starts with an empty line, the others with a space."""
    found = []
    for block in re.split(r"\n\s*\n", raw):
        paragraph = " ".join(block.split())
        if not paragraph or re.fullmatch(r"CHAPTER \w+", paragraph, re.IGNORECASE):
            continue
        lead = "\n\n"
        for sentence in _split(paragraph):
            found.append(lead + sentence)
            lead = " "
    return found


def _split(paragraph: str) -> list[str]:
    """Split one paragraph at the ends of its sentences, not after an abbreviation such as Mr."""
    found, start = [], 0
    for match in _SENTENCE_END.finditer(paragraph):
        last = paragraph[start : match.end()].split()[-1]
        if last.lstrip("\"'(") not in _ABBREVIATIONS and match.end() - start > _SHORTEST:
            found.append(paragraph[start : match.end()].strip())
            start = match.end()
    return [*found, paragraph[start:].strip()] if paragraph[start:].strip() else found


def _code_lines(raw: str) -> list[str]:
    """Split code into lines, each with the line breaks and the indentation in front of it."""
    lines = re.findall(r"\s*\S[^\n]*", raw)
    return ["\n" + lines[0], *lines[1:]]
