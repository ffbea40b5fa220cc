"""Clips and their transcripts, and how transcripts are compared."""

import functools
import hashlib
import io
import pathlib
import tarfile

import numpy as np
import pytest

from tokeff.data import speech
from tokeff.errors import UserError
from tokeff.models.presets import SOUNDS

pytestmark = pytest.mark.core


def distance(a, b):
    """Levenshtein distance by its definition."""

    @functools.cache
    def d(i, j):
        if not i or not j:
            return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return d(len(a), len(b))


def test_word_errors_equal_the_recursion():
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = (" ".join(rng.choice(list("abcd"), rng.integers(0, 9))) for _ in range(2))
        assert speech.word_errors(a, b) == (distance(a.split(), b.split()), len(b.split()))


def test_words_are_compared_without_case_marks_and_spelling_of_titles():
    assert speech.word_errors(" And Mr. Dashwood, cold-hearted: don't!", "and mister dashwood cold hearted don't") == (0, 6)
    assert speech.words("It’s 10 o'clock") == ["it's", "10", "o'clock"]
    assert speech.word_errors("", "three words here") == (3, 3)


def test_pinned_clips_are_those_of_the_preset():
    assert {m.name for m in SOUNDS["speech-clips"].members} == set(speech.READ)
    assert len(speech.words(speech.TWO_CITIES)) == 119


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """A cache, and apt-get and dpkg-deb replaced by functions: returns (folder, set what the package holds)."""
    monkeypatch.setenv("TOKEFF_CACHE", str(tmp_path / "cache"))
    bodies = {m: m.name.encode() for m in speech.LIBRIVOX}
    pinned = {
        speech.Member(m.name, hashlib.sha256(body).hexdigest(), len(body)): speech.LIBRIVOX[m] for m, body in bodies.items()
    }
    monkeypatch.setattr(speech, "LIBRIVOX", pinned)
    monkeypatch.setattr(speech, "DEBIAN_SHA256", hashlib.sha256(b"deb").hexdigest())

    def give(deb: bytes | None = b"deb", change: bytes = b""):
        def run(command, where):
            if command[0] == "apt-get":
                return None if deb is None else bytes((pathlib.Path(where) / "a.deb").write_bytes(deb))
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w") as tar:
                for m, body in bodies.items():
                    info = tarfile.TarInfo(speech.DEBIAN_FOLDER + m.name)
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(change + body[len(change) :]))
            return out.getvalue()

        monkeypatch.setattr(speech, "_run", run)

    return tmp_path / "cache" / "librivox", give


def test_clips_of_the_debian_package_are_checked(debian):
    folder, give = debian
    give(deb=None)
    with pytest.raises(UserError, match="apt-get; place its"):
        speech.librivox()
    give(deb=b"other")
    with pytest.raises(UserError, match="wrong sha256: not opened"):
        speech.librivox()
    assert not list(folder.iterdir())
    give(change=b"x")
    with pytest.raises(UserError, match="wrong sha256; delete it"):
        speech.librivox()
    for file in folder.iterdir():
        file.unlink()
    give()
    clips = speech.librivox()
    assert [c.path.read_bytes().decode() for c in clips] == [c.path.name for c in clips] and all(c.said for c in clips)
    give(deb=None)  # nothing is asked for again
    assert speech.librivox() == clips
