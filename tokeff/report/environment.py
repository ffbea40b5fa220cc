"""Where a run was made: versions, hardware, commit and command."""

import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import tokeff
from tokeff.errors import size

PACKAGES = ("tokeff", "jax", "jaxlib", "numpy", "flax")
SAME = ("commit", "dirty", "cpu", "cores", "devices", "python", "jax", "jaxlib", "numpy")
"""What two runs should share before their figures are compared."""


def describe(args: Sequence[str]) -> dict[str, Any]:
    """Return the environment of this process, as JSON values; `args` is the command line after the program's name."""
    import jax

    commit, dirty = commit_of(pathlib.Path(tokeff.__path__[0]))
    devices = jax.devices()
    return {
        "command": "tokeff " + shlex.join(args),
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "backend": jax.default_backend(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def commit_of(package: pathlib.Path) -> tuple[str | None, bool | None]:
    """Return (commit, dirty) of the checkout that holds `package`, or (None, None) for an installed copy."""
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or pathlib.Path(top).resolve() != package.resolve().parent:
        return None, None
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain")
    return commit, None if changes is None else bool(changes)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Return one line for each way in which two environments differ that bears on their figures."""
    lines = [f"{k} differs: {a.get(k)} and {b.get(k)}" for k in SAME if k != "dirty" and a.get(k) != b.get(k)]
    for which, environment in (("first", a), ("second", b)):
        if environment.get("dirty"):
            lines.append(f"the {which} run was made with uncommitted changes")
    return lines


def cpu_model() -> str:
    """Return the processor's name as the system gives it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _memory() -> str | None:
    try:
        return size(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def _git(folder: pathlib.Path, *args: str) -> str | None:
    """Return what a git command prints, or None where there is no git or no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
