"""Chat templates, rendered where they can do no harm (see `chat_worker`)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokeff.errors import UserError

SECONDS = 10
MEMORY = 1 << 30
SPARE = 1 << 20  # characters of output beyond four times what went in


def render(template: str, variables: Sequence[dict[str, Any]]) -> list[str]:
    """One text per set of variables (messages, add_generation_prompt, bos_token, ...).

    The template runs in a separate process inside Jinja's immutable sandbox, with 1 GiB of memory and 10 seconds.
    Raises UserError with its own message for `raise_exception`, forbidden access, a syntax error, or a limit passed.
    """
    try:
        given = json.dumps(list(variables))
    except (TypeError, ValueError) as e:
        raise UserError(f"chat messages must be plain strings, numbers, lists and dicts ({e})") from None
    limits = {"memory": MEMORY + 32 * len(given), "seconds": SECONDS, "most": SPARE + 4 * len(given)}
    job = json.dumps({"template": template, "variables": given, **limits})
    command = [sys.executable, "-P", str(Path(__file__).with_name("chat_worker.py"))]
    answer: dict[str, Any] = {"error": f"it needs more than {SECONDS} seconds or {MEMORY >> 30} GiB"}
    with contextlib.suppress(subprocess.TimeoutExpired, ValueError):  # ValueError: killed before it could answer
        done = subprocess.run(command, input=job.encode(), capture_output=True, timeout=2 * SECONDS)
        answer = json.loads(done.stdout)
    if "texts" not in answer:
        raise UserError(f"the model's chat template failed ({answer['error']}); pass plain text instead of messages")
    return answer["texts"]
