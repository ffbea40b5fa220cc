"""The file of a device's benchmarks, benchmarks/<device kind>.json: one entry a benchmark, each with its rows and where they were made.

Nothing but jax is imported here, so that kernels can be measured where nothing else is installed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from tokeff.errors import UserError


def path_of(out: Path, kind: str | None = None) -> Path:
    """benchmarks/<device kind>.json. kind: what jax calls the device, by default the first one here."""
    kind = re.sub(r"[^a-z0-9]+", "-", (kind or jax.devices()[0].device_kind).lower()).strip("-")
    return out / f"{kind}.json"


def old(path: Path) -> dict[str, Any]:
    """What the file of this device holds so far."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged; move it away and measure again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a file of benchmarks; choose another folder with --out")
    return found


def save(out: Path, name: str, rows: list[dict[str, Any]], args: Sequence[str]) -> Path:
    """Put one benchmark's rows in the file of this device; what other benchmarks left there stays. The file appears whole."""
    from tokeff.report.environment import describe

    path = path_of(out)
    write(path, old(path) | {name: {"environment": describe(["bench", name, *args]), "rows": rows}})
    return path


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a file of JSON that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(found, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
