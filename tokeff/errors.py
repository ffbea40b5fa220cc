"""Errors that a user can fix, said in one line.

Code that finds bad input raises `UserError` with a sentence that names the fix. The command line prints that
sentence and exits with code 2; it never shows a stack trace for it. Everything else is a bug and keeps its trace.
"""

import difflib
import os
import re
import sys
from collections.abc import Iterable

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad input. The message is one line and names the fix."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the closest of `names`, or the list of names when none is close."""
    known = sorted(set(names))
    lower = {k.lower().replace("-", "_"): k for k in known}
    close = difflib.get_close_matches(name.lower().replace("-", "_"), list(lower), n=1, cutoff=0.5)
    if close:
        return f"did you mean {lower[close[0]]!r}?"
    return f"known: {', '.join(known)}" if known else "none are known"


def one_line(error: BaseException) -> tuple[str, int] | None:
    """Return (message, exit code) for an error the user can act on, or None for a bug."""
    if isinstance(error, UserError):
        return " ".join(str(error).split()), EXIT_USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; rerun the same command to resume", EXIT_INTERRUPTED
    if _out_of_memory(error):
        return out_of_memory(str(error)), EXIT_USER_ERROR
    return None


def _out_of_memory(error: BaseException) -> bool:
    """Say whether an error is exhausted memory: Python's own, or XLA's (known by name, so jax is not imported)."""
    if isinstance(error, MemoryError):
        return True
    return type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)


def out_of_memory(message: str) -> str:
    """Return one line with the bytes needed and available, where they can be told, and what to do."""
    used_of = re.search(r"Used ([\d.]+[KMGT]?i?B?) of ([\d.]+[KMGT]?i?B?)", message)  # how a TPU compile says it
    allocating = re.search(r"allocat\w*\s+([\d.]+\s*[KMGT]?i?B?)", message)  # CPU, GPU and numpy
    needed = _bytes(used_of[1]) if used_of else _bytes(allocating[1]) if allocating else None
    available = _bytes(used_of[2]) if used_of else free_bytes()
    said = [f"{size(n)} {what}" for n, what in ((needed, "needed"), (available, "available")) if n is not None]
    facts = f" ({', '.join(said)})" if said else ""
    return f"out of memory{facts}; use a smaller context, batch or cache budget"


def _bytes(text: str) -> int | None:
    """Return the bytes in a text such as 4096, 1.5GiB or 20.1G."""
    found = re.match(r"(\d+(?:\.\d+)?)\s*([KMGT]?)", text)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else None


def free_bytes() -> int | None:
    """Return the free bytes of the first accelerator, or of main memory, or None where neither can be told."""
    jax = sys.modules.get("jax")
    stats = jax.local_devices()[0].memory_stats() if jax else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def size(n: float) -> str:
    """Return a byte count for people, such as 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
