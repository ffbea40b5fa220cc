"""The tasks and texts as tensorflow-datasets builders in array_record form, read through grain. No tensorflow.

Examples are made once and kept under `$TOKEFF_CACHE/datasets` (default ~/.cache/tokeff/datasets). The name of a
builder's config ends in a digest of all that decides its examples (source text, tokenizer, options and the code of the
tasks), so a change of any of them makes a new data set and an old one is never read by mistake.

This module imports tensorflow-datasets and grain; `import tokeff.data` does not import this module.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import grain
import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from tokeff.data import haystack, sources, tasks
from tokeff.data.haystack import Encode
from tokeff.data.tasks import Example, Question
from tokeff.errors import UserError
from tokeff.models.fetch import cache_dir

SPLIT = "test"
T = TypeVar("T")
_CODE = ("tasks.py", "haystack.py", "sources.py", "builders.py")
_PROBE = 4000  # characters of the prose whose token ids tell tokenizers apart


@dataclasses.dataclass(eq=False, kw_only=True)
class TaskConfig(tfds.core.BuilderConfig):
    """One task at one length: examples `seed` to `seed + n - 1`. Make it with `task_config`."""

    task: str
    length: int
    n: int
    seed: int
    encode: Encode
    options: Mapping[str, Any]


@dataclasses.dataclass(eq=False, kw_only=True)
class TextConfig(tfds.core.BuilderConfig):
    """One source cut into passages of at most `length` tokens. Make it with `text_config`."""

    source: str
    length: int
    encode: Encode


class TokeffTasks(tfds.core.GeneratorBasedBuilder):
    """The synthetic tasks of `tokeff.data.tasks`."""

    VERSION = tfds.core.Version("1.0.0")
    builder_config: TaskConfig

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, {name: tfds.features.Text() for name in ("context", "questions", "held_out", "meta")})

    def _split_generators(self, dl_manager):
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        for seed in _shown(range(config.seed, config.seed + config.n), config.task):
            yield seed, to_record(tasks.make(config.task, seed, config.length, config.encode, **config.options))


class TokeffText(tfds.core.GeneratorBasedBuilder):
    """Passages of the sources of `tokeff.data.sources`, in their order, cut at the ends of sentences or lines."""

    VERSION = tfds.core.Version("1.0.0")
    builder_config: TextConfig

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, {"text": tfds.features.Text(), "number": np.int64})

    def _split_generators(self, dl_manager):
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        passages = haystack.passages(config.source, config.length, config.encode)
        for number, text in enumerate(_shown(passages, config.source)):
            yield number, {"text": text, "number": number}


def _info(builder: tfds.core.GeneratorBasedBuilder, features: dict[str, Any]) -> tfds.core.DatasetInfo:
    """Return the info of a builder whose records stay in the order they are made."""
    features_dict = tfds.features.FeaturesDict(features)
    return tfds.core.DatasetInfo(builder=builder, features=features_dict, disable_shuffling=True)


def load(task: str, length: int, n: int, seed: int, tokenizer: Any, **options: Any) -> grain.MapDataset:
    """Return `n` examples of a task as a grain data set of `Example`, made at the first call and then read from disk.

    length: tokens of each context. tokenizer: a tokeff Tokenizer or a function `encode(text) -> list[int]`.
    Example i is `tasks.make(task, seed + i, length, encode, **options)`.
    Raises UserError for a task, length or option that cannot be, and for a cache folder that cannot be written.
    """
    data = _read(TokeffTasks, task_config(task, length, n, seed, haystack.encoder(tokenizer), **options))
    return data.map(from_record)


def load_text(source: str, length: int, tokenizer: Any) -> grain.MapDataset:
    """Return a source as a grain data set of str: passages of at most `length` tokens that follow one another."""
    if length < 1:
        raise UserError(f"passages of {length} tokens are impossible; use a length of at least 1")
    return _read(TokeffText, text_config(source, length, haystack.encoder(tokenizer))).map(_text)


def task_config(task: str, length: int, n: int, seed: int, encode: Encode, **options: Any) -> TaskConfig:
    """Return the builder config of one task at one length. The first example is made here, so bad input fails early."""
    if n < 1 or seed < 0:
        raise UserError(
            f"{n} examples from seed {seed} are impossible; use at least 1 example and a seed of at least 0"
        )
    first = tasks.make(task, seed, length, encode, **options)
    told = digest(encode, task, length, n, seed, options, sources.digest(first.meta["source"]))
    name = f"{task}_{length}_{n}x_seed{seed}_{told}"
    return TaskConfig(name=name, task=task, length=length, n=n, seed=seed, encode=encode, options=options)


def text_config(source: str, length: int, encode: Encode) -> TextConfig:
    """Return the builder config of one source at one length."""
    told = digest(encode, length, sources.digest(source))
    stem = "".join(c if c.isalnum() else "_" for c in pathlib.Path(source).stem)
    return TextConfig(name=f"{stem}_{length}_{told}", source=source, length=length, encode=encode)


def digest(encode: Encode, *settings: Any) -> str:
    """Return 12 hex digits that stand for settings, the tokenizer (by the ids of a piece of prose), and the code."""
    code = [hashlib.sha256(pathlib.Path(__file__).with_name(name).read_bytes()).hexdigest() for name in _CODE]
    ids = [int(i) for i in encode(sources.text()[:_PROBE])]
    return hashlib.sha256(json.dumps([settings, ids, code], sort_keys=True).encode()).hexdigest()[:12]


def to_record(example: Example) -> dict[str, str]:
    """Return an example as the texts of a record. Questions and meta become JSON; tfds would round depths."""
    questions = json.dumps([dataclasses.asdict(question) for question in example.questions])
    meta = json.dumps(dict(example.meta), sort_keys=True)
    return {"context": example.context, "questions": questions, "held_out": example.held_out, "meta": meta}


def from_record(record: Mapping[str, bytes]) -> Example:
    """Return the example of a record as it is read, with str for bytes."""
    questions = tuple(Question(**row) for row in json.loads(record["questions"]))
    return Example(record["context"].decode(), questions, record["held_out"].decode(), json.loads(record["meta"]))


def _text(record: Mapping[str, Any]) -> str:
    """Return the text of a record."""
    return record["text"].decode()


def _read(builder_class: type[tfds.core.GeneratorBasedBuilder], config: tfds.core.BuilderConfig) -> grain.MapDataset:
    """Return the records of a config, after making them if they are not on disk yet."""
    root = cache_dir() / "datasets"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _quiet():
            builder = builder_class(data_dir=root, config=config, file_format="array_record")
            folder = pathlib.Path(builder.data_dir)
            if not folder.exists():
                _make(builder, folder)
            made = tfds.builder_from_directory(folder)
            return grain.MapDataset.source(made.as_data_source(split=SPLIT))  # type: ignore[call-arg]
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {root} ({reason}); set TOKEFF_CACHE to a folder with room") from error


def _make(builder: tfds.core.GeneratorBasedBuilder, folder: pathlib.Path) -> None:
    """Make the records of a builder. tfds writes beside the folder and renames at the end, so it is whole or not there.

    Where two processes make the same one, the second cannot rename over the first and its copy is dropped.
    """
    try:
        builder.download_and_prepare()
    except OSError:
        if not folder.exists():
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what tfds prints of each builder, its progress bars, and its note that a config is a custom one."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    tfds.display_progress_bar(enable=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        tfds.display_progress_bar(enable=True)


def _shown(items: Iterable[T], what: str) -> Iterable[T]:
    """Return the items, with a progress bar on a terminal when they take more than two seconds."""
    return tqdm(items, desc=f"making {what}", unit=" examples", delay=2, disable=None, leave=False)
