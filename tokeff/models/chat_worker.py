"""Render a chat template in a process of its own. `chat.render` runs this as a script: only Jinja is imported.

A template comes with a model, so from a stranger. Jinja's immutable sandbox keeps it from attributes and from changing
things; this process's limits keep it from eating memory and time. Reads one JSON object (template, variable sets as
JSON, limits) from standard input; writes {"texts": [...]} or {"error": "..."} to standard output.
"""

import contextlib
import datetime
import json
import sys


def limit(memory: int, seconds: int) -> None:
    """Cap this process's memory and processor time, where the system can."""
    try:
        import resource
    except ImportError:  # not on Windows: the caller's time limit and the output limit remain
        return
    for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds)):
        with contextlib.suppress(ValueError, OSError):  # macOS does not take RLIMIT_AS
            resource.setrlimit(what, (most, most))


def environment():
    """The Jinja environment that chat templates are written for (as transformers' `apply_chat_template` sets it up)."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}...{% endgeneration %} marks the assistant's words; rendered, it is its content."""

        def __init__(self, environment):
            super().__init__(environment)
            self.tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def fail(message):
        raise TemplateError(str(message))

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = fail
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return env


def render(template: str, variables: list, most: int) -> list:
    """One text per set of variables, each at most `most` characters."""
    compiled = environment().from_string(template)
    texts = []
    for values in variables:
        parts, size = [], 0
        for part in compiled.generate(**values):
            size += len(part)
            if size > most:
                raise ValueError(f"its output is longer than {most} characters")
            parts.append(part)
        texts.append("".join(parts))
    return texts


def main() -> None:
    job = json.load(sys.stdin)
    limit(job["memory"], job["seconds"])
    try:
        answer = {"texts": render(job["template"], json.loads(job["variables"]), job["most"])}
    except MemoryError:
        answer = {"error": "it uses too much memory"}
    except RecursionError:
        answer = {"error": "it recurses too deeply"}
    except Exception as e:
        answer = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
