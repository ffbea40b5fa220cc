"""Chat templates, rendered where they can do no harm (see `chat_worker`)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokeff.errors import UserError

SECONDS = 10
MEMORY = 1 << 30
SPARE = 1 << 20  # characters a template may add to what it was given, four times over


def render(template: str, variables: Sequence[dict[str, Any]]) -> list[str]:
    """One text per set of variables (messages, add_generation_prompt, bos_token, ...).

    The template runs in a separate process inside Jinja's immutable sandbox, with 1 GiB of memory and 10 seconds. Raises
    UserError with its own message for `raise_exception`, forbidden access, a syntax error, or a limit passed.
    """
    try:
        given = json.dumps(list(variables))
    except (TypeError, ValueError) as e:
        raise UserError(f"chat messages must be plain strings, numbers, lists and dicts ({e})") from None
    limits = {"memory": MEMORY + 32 * len(given), "seconds": SECONDS, "most": SPARE + 4 * len(given)}
    job = json.dumps({"template": template, "variables": json.loads(given), **limits})
    command = [sys.executable, "-I", str(Path(__file__).with_name("chat_worker.py"))]
    try:
        done = subprocess.run(command, input=job.encode(), capture_output=True, timeout=2 * SECONDS)
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        answer = {"error": f"it took more than {2 * SECONDS} seconds"}
    except ValueError:  # killed by a limit before it could answer
        answer = {"error": f"it used more than {SECONDS} seconds or {MEMORY} bytes"}
    if "texts" not in answer:
        raise UserError(f"the model's chat template failed ({answer['error']}); pass plain text instead of messages")
    return answer["texts"]
