"""The data sets: the same examples after a trip through array_record and grain, and no tensorflow anywhere."""

import os
import re
import subprocess
import sys
import zlib

import numpy as np
import pytest

from tokeff.data import builders, load, load_text, make, sources
from tokeff.errors import UserError

pytestmark = pytest.mark.core
WITHOUT_TENSORFLOW = """
import sys
import tokeff.data
assert not {"tensorflow_datasets", "grain", "torch", "transformers"} & set(sys.modules)
encode = lambda text: [len(word) for word in text.split()]
data = tokeff.data.load("multi_question", 200, 2, 0, encode)
assert data[1] == tokeff.data.make("multi_question", 1, 200, encode)
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
"""


def words(text):
    """Return one id for each word."""
    return [zlib.crc32(word.encode()) % 50000 for word in text.split()]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty folder that data sets are kept in."""
    monkeypatch.setenv("TOKEFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_examples_come_back_as_they_were_made(cache):
    data = load("variable_tracking", 300, 3, 7, words, hops=2)
    assert [data[i] for i in range(3)] == [make("variable_tracking", 7 + i, 300, words, hops=2) for i in range(3)]
    assert len(data) == 3
    for text in (data[0].context, data[0].held_out, data[0].questions[0].prompt, data[0].meta["source"]):
        assert isinstance(text, str)


def test_examples_without_questions_come_back(cache):
    assert list(load("perplexity", 300, 2, 0, words)) == [make("perplexity", seed, 300, words) for seed in range(2)]


def test_the_second_call_reads_what_the_first_one_wrote(cache):
    first = list(load("single_needle", 200, 2, 0, words))
    times = {path: path.stat().st_mtime_ns for path in cache.rglob("*.array_record*")}
    assert len(times) == 1
    assert list(load("single_needle", 200, 2, 0, words)) == first
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.array_record*")} == times


def test_what_decides_the_examples_decides_the_folder(cache):
    def lengths(text):
        return [len(word) for word in text.split()]

    for args in ((200, 2, 0, words), (200, 2, 0, lengths), (201, 2, 0, words), (200, 3, 0, words), (200, 2, 1, words)):
        load("multi_key", *args)
    load("multi_key", 200, 2, 0, words, keys=2)
    assert len(list(cache.rglob("*.array_record*"))) == 6


def test_a_half_written_data_set_is_not_read(cache, monkeypatch):
    def stop(*args, **options):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr("tokeff.data.builders.to_record", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            load("multi_key", 200, 2, 0, words)
    assert not list(cache.rglob("*.array_record*"))
    assert load("multi_key", 200, 2, 0, words)[0] == make("multi_key", 0, 200, words)


def test_grain_maps_and_batches_the_examples(cache):
    batches = load("single_needle", 200, 4, 0, words).map(lambda example: np.array(words(example.context))).batch(2)
    assert [batch.shape for batch in batches] == [(2, 200), (2, 200)]


@pytest.mark.parametrize("source", sources.SOURCES)
def test_passages_are_the_text_in_its_order(cache, source):
    passages = list(load_text(source, 500, words))
    assert max(len(words(passage)) for passage in passages) <= 500
    assert sum(len(words(passage)) for passage in passages) > 0.7 * 500 * len(passages)
    assert re.sub(r"\s", "", "".join(passages)) == re.sub(r"\s", "", sources.text(source))


def test_tensorflow_is_not_imported(cache):
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", WITHOUT_TENSORFLOW], check=True, env=env)


def test_whoever_finishes_second_reads_what_the_first_one_made(cache, monkeypatch):
    plain = builders.to_record

    def made_elsewhere_meanwhile(example):
        monkeypatch.setattr(builders, "to_record", plain)
        load("multi_key", 200, 2, 0, words)
        return plain(example)

    monkeypatch.setattr(builders, "to_record", made_elsewhere_meanwhile)
    assert load("multi_key", 200, 2, 0, words)[1] == make("multi_key", 1, 200, words)
    assert [path.name for path in cache.rglob("*multi_key*/*")] == ["1.0.0"]


@pytest.mark.parametrize(
    ("task", "length", "n", "seed", "fix"),
    [
        ("multi_kez", 200, 2, 0, "did you mean"),
        ("multi_key", 3, 2, 0, "at least"),
        ("multi_key", 200, 0, 0, "at least 1"),
        ("multi_key", 200, 1, -1, "at least 0"),
    ],
)
def test_bad_input_leaves_nothing_behind(cache, task, length, n, seed, fix):
    with pytest.raises(UserError, match=fix):
        load(task, length, n, seed, words)
    assert not cache.exists()


def test_bad_passage_lengths_are_refused(cache):
    with pytest.raises(UserError, match="at least 1"):
        load_text("stdlib", 0, words)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKEFF_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set TOKEFF_CACHE"):
        load("multi_key", 200, 2, 0, words)
