"""Numbers out of files somebody else wrote: each read with a type and a range, each failure one line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokeff.errors import UserError

MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json in use is about 40 MB
_REQUIRED: Any = object()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Anything else is one line naming the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} is larger than {MAX_JSON_BYTES} bytes; it is not a model's {path.name}")
        value = json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror or e}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


@dataclass(frozen=True)
class Fields:
    """A table of metadata. A key that is missing or null gives the default; without a default it is an error."""

    values: Mapping[str, Any]
    where: str

    def fail(self, key: str, expected: str) -> UserError:
        return UserError(f"{self.where}: {key} is {str(self.values.get(key))[:60]!r}, expected {expected}")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise UserError(f"{self.where} has no {key}; the file is incomplete or of an unsupported model")
        return default

    def whole(self, key: str, default: Any = _REQUIRED, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, low: float = 0.0) -> float:
        """A finite float of at least `low`."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, "a number")
        if not low <= value <= 1e30 or not math.isfinite(value):
            raise self.fail(key, f"a finite number of at least {low}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "true or false")
        return value

    def word(self, key: str, default: Any = _REQUIRED) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, "a string")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """An object, or {} where there is none."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids: none, one, or a list."""
        value = self.get(key, ())
        value = [value] if isinstance(value, int) else value
        if not isinstance(value, list | tuple) or len(value) > 64 or not all(type(i) is int and i >= 0 for i in value):
            raise self.fail(key, "a token id or a short list of them")
        return tuple(value)
