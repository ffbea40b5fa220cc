"""The files of one run: written whole or line by line, read without running anything.

What a run leaves in its folder:

    config.txt, config.json   the experiment as printed text (which says whether two runs are the same) and as JSON
    environment.json          versions, hardware, commit and command of the latest start
    results.jsonl             one measurement a line, forced to disk as it is made
    kept/*.npz                which tokens a method kept, arrays only
    table.md, table.txt, plots/*.png|svg, report.html
"""

import contextlib
import json
import math
import os
import pathlib
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from tokeff.errors import UserError
from tokeff.report import kept as kept_file

CONFIG, CONFIG_JSON, ENVIRONMENT, RESULTS = "config.txt", "config.json", "environment.json", "results.jsonl"
OURS = ("config.*", "environment.json", "results.jsonl", "table.*", "report.html", "plots/*.*g", "kept/*.npz")
"""Patterns of everything a run writes: all that `clear` removes."""


class RunFolder:
    """A folder that holds one run."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)

    def exists(self) -> bool:
        """Say whether a run is here."""
        return (self.path / CONFIG).is_file()

    def require(self) -> "RunFolder":
        """Return the folder, or refuse one that holds no run."""
        if not self.exists():
            raise UserError(f"no run in {self.path} (it has no {CONFIG}); give a folder that `tokeff run` made")
        return self

    def check_writable(self) -> None:
        """Refuse a folder that cannot be written, or that holds something else than a run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            strangers = not self.exists() and any(not p.name.startswith(".") for p in self.path.iterdir())
        except OSError as error:
            reason = error.strerror or "not possible"
            raise UserError(f"cannot write to {self.path} ({reason}); choose another folder with --out") from error
        if strangers:
            raise UserError(f"{self.path} is not empty and holds no run; choose another folder with --out")

    def clear(self) -> None:
        """Remove what an earlier run wrote here, and nothing else."""
        for pattern in OURS:
            for file in self.path.glob(pattern):
                file.unlink()

    def check_config(self, config_text: str, config: dict[str, Any]) -> None:
        """Refuse a folder that holds a run of another config."""
        if self.exists() and self.config_text() != config_text:
            where = first_difference(self.config().get("experiment"), config["experiment"]) or CONFIG
            raise UserError(
                f"{self.path} holds a run of another config ({where}); choose another folder with --out, or replace it with --fresh"
            )

    def start(self, config_text: str, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Take the folder for a run of this config, or go on with it; refuse a folder that holds another."""
        self.check_config(config_text, config)
        self.write(CONFIG, config_text)  # first: its presence says that a run is here
        self.write(CONFIG_JSON, json.dumps(config, indent=2) + "\n")
        self.write(ENVIRONMENT, json.dumps(environment, indent=2) + "\n")

    def write(self, name: str, data: str | bytes) -> None:
        """Write a file whole: to a temporary name first, then renamed."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data.encode("utf-8", "replace") if isinstance(data, str) else data)
            os.replace(temporary, file)
        except OSError as error:
            reason = error.strerror or "not possible"
            raise UserError(f"cannot write {file} ({reason}); free some space or choose another --out") from error
        finally:
            temporary.unlink(missing_ok=True)

    def config_text(self) -> str:
        """Return the config as printed text."""
        return (self.path / CONFIG).read_text(encoding="utf-8")

    def config(self) -> dict[str, Any]:
        """Return {'about': docstring of the config file, 'experiment': its fields}."""
        return _read_json(self.path / CONFIG_JSON)

    def environment(self) -> dict[str, Any]:
        """Return where the run was made."""
        return _read_json(self.path / ENVIRONMENT)

    def rows(self) -> list[dict[str, Any]]:
        """Return every finished measurement in the order made; a line cut short by a crash is left out."""
        file = self.path / RESULTS
        whole = file.read_bytes().rpartition(b"\n")[0] if file.exists() else b""
        rows = []
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                row = json.loads(line)
                if not {"key", "method"} <= row.keys():
                    raise ValueError("a row needs a key and a method")
            except (ValueError, AttributeError) as error:
                raise UserError(f"line {number} of {file} is damaged; delete it, or start over with --fresh") from error
            rows.append(row)
        return rows

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes out of this folder, where the system has file locks."""
        with open(self.path / ".lock", "w") as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                message = f"another process is measuring into {self.path}; wait for it, or choose another --out"
                raise UserError(message) from error
            yield

    @contextlib.contextmanager
    def appending(self) -> Iterator["Appender"]:
        """Open results.jsonl to add rows, without the half-written line a crash may have left."""
        with open(self.path / RESULTS, "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            yield Appender(self, file)

    def kept(self, row: dict[str, Any]) -> "kept_file.Kept | None":
        """Return what the method of `row` kept, if the row says so and the file is in this folder."""
        name = row.get("kept")
        if not isinstance(name, str) or not re.fullmatch(r"kept/[\w.-]+\.npz", name):
            return None
        file = self.path / name
        try:
            return kept_file.read(file) if file.is_file() else None
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(f"{file} is damaged; delete the run's folder and rerun") from error


class Appender:
    """Adds rows to a run, each on disk before the next is measured."""

    def __init__(self, folder: RunFolder, file):
        self.folder, self.file = folder, file

    def add(self, key: str, row: dict[str, Any], **more: Any) -> None:
        """Append one row; a `Kept` in it goes to a file of its own, written first."""
        row = {"key": key, **row, **more}
        kept = row.pop("kept", None)
        if kept is not None:
            row["kept"] = f"kept/{slug(key)}.npz"
            self.folder.write(row["kept"], kept_file.to_bytes(kept))
        line = json.dumps(finite(row), allow_nan=False, default=_plain) + "\n"
        self.file.write(line.encode())
        self.file.flush()
        os.fsync(self.file.fileno())


def finite(value: Any) -> Any:
    """Return a value whose infinities and NaNs are the strings 'inf', '-inf', 'nan': JSON has no numbers for them."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """Return a numpy or jax scalar or array as plain numbers."""
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    raise TypeError(f"a measured row holds {type(value).__name__}, which is not a JSON value")


def slug(key: str) -> str:
    """Return a file name for a key: unlike keys get unlike names."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", key).strip("._") or "row"
    return plain if plain == key and len(key) <= 80 else f"{plain[:80]}-{zlib.crc32(key.encode()):08x}"


def first_difference(there: Any, here: Any, path: str = "") -> str:
    """Return the first field in which two configs (as JSON) differ, with its two values, or '' where none does."""
    if isinstance(there, dict) and isinstance(here, dict):
        pairs = [(f"{path}.{k}" if path else k, there.get(k), here.get(k)) for k in {**there, **here}]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(f"{path}.{i}", a, b) for i, (a, b) in enumerate(zip(there, here))]
    else:
        return "" if there == here else f"{path}: {_short(there)} and {_short(here)}"
    return next(filter(None, (first_difference(a, b, name) for name, a, b in pairs)), "")


def _short(value: Any, width: int = 40) -> str:
    text = str(value.get("type", "{...}")) if isinstance(value, dict) else json.dumps(value)
    if isinstance(value, list) and len(text) > width:
        return f"{len(value)} items"
    return text if len(text) <= width else text[: width - 1] + "…"


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    """Return the object in a JSON file, or refuse the run it belongs to."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is missing or damaged; rerun into a new folder with --out") from error
    return value if isinstance(value, dict) else {}
