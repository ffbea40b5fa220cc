"""Every kernel on the device of this machine: `make gpu`, `make tpu`, or python -m tokeff.bench.device --platform gpu

Each op has two parts. `check-<op>` runs all its cases against the float32 definition (`tokeff.kernels.check`), `bench-<op>` times them
(`tokeff.kernels.bench`). A last part, `model-end-to-end`, runs a model with the kernels and without (`tokeff.bench.end_to_end`). Rows go
to benchmarks/<device kind>.json as they come. What is done stands beside it, in <device kind>.parts.json, and is not done again: run the
same command once more after an interruption, or when a machine is lent for some minutes at a time. A part is a process of its own that
ends after at most 8 minutes, so a kernel that hangs or crashes costs its case and no other.

Nothing but jax needs to be installed. The last part, which is a model, needs what tokeff needs, and is left out where that is not there.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokeff.bench.files import old, path_of, write
from tokeff.cli import Parser
from tokeff.errors import EXIT_USER_ERROR, UserError, nearest, one_line
from tokeff.kernels import bench
from tokeff.kernels.check import check

SECONDS = 480  # of a part
LAST_START = 240  # seconds after which a part begins no further case, and leaves the rest to the next process
WHAT = {"check": "checks", "bench": "kernels", "model": "end-to-end"}  # the entry of the file that each kind of part fills
MODEL = "model-end-to-end"
SETTINGS = ("prefill", "dense", "pages", "int8", "int4", "tree")  # of the model, as `tokeff.bench.end_to_end` has them
NEEDED = ("flax", "safetensors", "tokenizers", "tqdm")  # by the model, beside jax
PROBE = "import jax; print(jax.default_backend(), jax.devices()[0].device_kind, sep='|')"
INSTALL = {"gpu": "pip install 'jax[cuda13]'", "tpu": "pip install 'jax[tpu]'", "cpu": "unset JAX_PLATFORMS"}


def main(args: Sequence[str]) -> int:
    """Command line. 0: everything passed; 1: a case did not; 2: a mistake of the user, such as no device."""
    try:
        known = _parse(args)
        return _inside(known, args) if known.inside else _all(known, args)
    except (Exception, KeyboardInterrupt) as error:
        if (told := one_line(error)) is None:
            raise
        print(f"tokeff: {told[0]}", file=sys.stderr)
        return told[1]


def check_names(ops: Sequence[str], cases: Sequence[str] | None) -> None:
    """Raise UserError for ops, or cases of them, that there are none of."""
    for op in ops:
        if op not in bench.OPS:
            raise UserError(f"no op {op!r}; {nearest(op, bench.OPS)}")
    names = sorted({case.name for op in ops for case in bench.OPS[op][0].CASES})
    for case in cases or ():
        if case not in names:
            raise UserError(f"no case {case!r}; {nearest(case, names)}")


def _parse(args: Sequence[str]) -> argparse.Namespace:
    p = Parser("python -m tokeff.bench.device", description="Check and time every kernel on this machine's device.", allow_abbrev=False)
    p.add_argument("--platform", choices=tuple(INSTALL), required=True, help="the device that must be here")
    p.add_argument("--ops", nargs="+", default=sorted(bench.OPS), help="ops (default: all)")
    p.add_argument("--cases", nargs="+", help="names of cases (default: all; on a CPU those made for one)")
    p.add_argument("--implementation", help="force one, such as xla (default: the kernel of the platform)")
    p.add_argument("--rounds", type=int, default=9, help="how often everything is timed (default: %(default)s)")
    p.add_argument("--part", nargs="+", help="run these parts alone, such as check-k_centre, whether they are done or not")
    p.add_argument("--list", action="store_true", help="show the parts and how far they are, and run nothing")
    p.add_argument("--fresh", action="store_true", help="do again what is done")
    p.add_argument("--out", type=Path, default=Path("benchmarks"), help="folder of the results (default: %(default)s)")
    p.add_argument("--inside", help=argparse.SUPPRESS)  # the part that this process is
    known = p.parse_args(args)
    check_names(known.ops, known.cases)
    for part in known.part or ():
        if part not in parts(known):
            raise UserError(f"no part {part!r}; {nearest(part, parts(known))}")
    return known


def parts(known: argparse.Namespace) -> dict[str, list[str]]:
    """{part: names of its cases}: every check before every timing, and the model where no ops or cases were named."""
    chosen = {}
    for op in known.ops:
        cases = bench.OPS[op][0].CPU if known.platform == "cpu" and not known.cases else bench.OPS[op][0].CASES
        if names := [case.name for case in cases if not known.cases or case.name in known.cases]:
            chosen[op] = names
    found = {f"{what}-{op}": names for what in ("check", "bench") for op, names in chosen.items()}
    whole = known.ops == sorted(bench.OPS) and not known.cases and not absent()
    return {**found, MODEL: [*SETTINGS]} if whole else found


def absent() -> list[str]:
    """Packages that the model needs and that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def _all(known: argparse.Namespace, args: Sequence[str]) -> int:
    """Run every part that is not done in a process of its own, and say what came of it."""
    path = path_of(known.out, device(known.platform))
    state = _State(path.with_suffix(".parts.json"), known.fresh)
    if known.list:
        for part, names in parts(known).items():
            done, seconds = state.of(part)["cases"], state.of(part)["seconds"]
            print(f"{part:28} {sum(name in done for name in names)} of {len(names)} cases, {seconds:.0f} s")
        return 0
    known.out.mkdir(parents=True, exist_ok=True)
    for part in known.part or parts(known):
        if known.part or known.fresh:
            state.forget(part)
        while left := [name for name in parts(known)[part] if name not in state.of(part)["cases"]]:
            print(f"{part}: {len(left)} of {len(parts(known)[part])} cases to do", flush=True)
            _spawn(part, state, args)
    found = {(part, name): state.of(part)["cases"].get(name, "not done") for part, names in parts(known).items() for name in names}
    bad = [f"{part} {name}: {said}" for (part, name), said in found.items() if said not in ("passed", "not done")]
    if absent():
        print(f"{MODEL} was left out: it needs {', '.join(absent())}; pip install . and run again")
    print(f"{sum(said == 'passed' for said in found.values())} of {len(found)} passed; results: {path}", *bad, sep="\n")
    return 1 if bad else 0


def _spawn(part: str, state: _State, args: Sequence[str]) -> None:
    """Run what is left of a part in a process; a case in which that dies, or runs out of time, is written down and not tried again."""
    command = [sys.executable, "-m", "tokeff.bench.device", *args, "--inside", part]
    start, before = time.monotonic(), len(state.of(part)["cases"])
    try:
        code = subprocess.run(command, timeout=SECONDS).returncode
        said = f"the process ended with code {code}"
    except subprocess.TimeoutExpired:
        code, said = None, f"not finished after {SECONDS // 60} minutes"
    state.read()
    mine = state.of(part)
    mine["seconds"] += time.monotonic() - start
    if code == EXIT_USER_ERROR:
        raise UserError(f"{part} was refused, as said above")
    if code != 0 and mine["running"]:
        mine["cases"][mine["running"]] = said
    mine["running"] = None
    state.save()
    if len(mine["cases"]) == before:
        raise RuntimeError(f"{part} did nothing: {said}")


def _inside(known: argparse.Namespace, args: Sequence[str]) -> int:
    """Run cases of one part in this process, until they are done or the time for another one is over."""
    import jax

    from tokeff.report.environment import describe

    what, op = known.inside.split("-", 1)
    start, path = time.monotonic(), path_of(known.out)
    state = _State(path.with_suffix(".parts.json"), False)
    command = "python -m tokeff.bench.device " + shlex.join(args[: list(args).index("--inside")])
    environment = describe(()) | {"command": command}
    for name in parts(known)[known.inside]:
        if name in state.of(known.inside)["cases"]:
            continue
        if time.monotonic() - start > LAST_START:
            break
        state.of(known.inside)["running"] = name
        state.save()
        row, said = _case(what, op, name, known)
        print(f"  {name}: {said}", flush=True)
        if row is not None:
            _merge(path, WHAT[what], row | {"commit": environment["commit"], "jax": jax.__version__}, environment)
        state.of(known.inside)["cases"][name] = said
        state.of(known.inside)["running"] = None
        state.save()
    return 0


def _case(what: str, op: str, name: str, known: argparse.Namespace) -> tuple[dict[str, Any] | None, str]:
    """(row, 'passed' or what is wrong) of one case; no row where it raised."""
    try:
        if what == "model":
            return _setting(name, known), "passed"
        case = next(case for case in bench.OPS[op][0].CASES if case.name == name)
        if what == "bench":
            return bench.bench(op, [case], known.implementation, known.rounds)[0], "passed"
        row = check(op, case, known.implementation)
    except Exception as error:  # whatever a compiler or a device says: the next case may be better
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    told = ("error", "poisoned_error", "swapped", "repeats")
    return row, "passed" if row["passed"] else ", ".join(f"{name} {row[name]}" for name in told)


def _setting(name: str, known: argparse.Namespace) -> dict[str, Any]:
    """The row of one setting of a model with random weights."""
    from tokeff.bench import end_to_end
    from tokeff.models.config import Precision

    m = end_to_end.random_model(end_to_end.here(end_to_end.SHAPES), Precision.default())
    return end_to_end.row(m, name, end_to_end.here(end_to_end.CONTEXTS), rounds=known.rounds)


def _merge(path: Path, entry: str, row: dict[str, Any], environment: dict[str, Any]) -> None:
    """Put a row in the file of this device in the place of an earlier one of its op and case."""
    found = old(path)
    kept = [r for r in found.get(entry, {}).get("rows", ()) if (r["op"], r["case"]) != (row["op"], row["case"])]
    write(path, found | {entry: {"environment": environment, "rows": [*kept, row]}})


def device(platform: str) -> str:
    """What jax calls the device of this platform; a process of its own asks, because a TPU has room for one."""
    asked = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    backend, _, kind = asked.stdout.strip().rpartition("\n")[2].partition("|")
    if asked.returncode or backend != platform:
        seen = backend or (asked.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"no {platform} is here, jax sees: {seen}; install jax for this device, such as by {INSTALL[platform]}")
    return kind


class _State:
    """What is done of each part, in a file of JSON: begun anew when the commit is another one."""

    def __init__(self, path: Path, fresh: bool):
        import tokeff
        from tokeff.report.environment import commit_of

        self.path, self.commit, self.parts = path, commit_of(Path(tokeff.__path__[0]))[0], {}
        self.read()
        if fresh:
            self.parts = {}

    def read(self) -> None:
        """Take over what other processes have written."""
        found = old(self.path)
        self.parts = found["parts"] if found.get("commit") == self.commit and "parts" in found else {}

    def save(self) -> None:
        """Write the file."""
        write(self.path, {"commit": self.commit, "parts": self.parts})

    def of(self, part: str) -> dict[str, Any]:
        """{cases: {name: what came of it}, running: name of a case or None, seconds}."""
        return self.parts.setdefault(part, {"cases": {}, "running": None, "seconds": 0.0})

    def forget(self, part: str) -> None:
        """Do a part again."""
        self.parts.pop(part, None)
        self.save()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
