"""The command line: exit codes, one-line errors, typed overrides."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tokeff import cli, errors, overrides
from tokeff.experiment import load

pytestmark = pytest.mark.core

CONFIG = '''"""A tiny experiment.

    tokeff run tiny.py
"""
import dataclasses
from tokeff.errors import UserError
from tokeff.experiment import Experiment, Row


@dataclasses.dataclass(frozen=True)
class Policy:
    budget: float = 0.125

    def __post_init__(self):
        if not 0 < self.budget <= 1:
            raise UserError(f"budget {self.budget:g} is not in (0, 1]; use for example 0.125")


@dataclasses.dataclass(frozen=True)
class PolicyRow(Row):
    kv: Policy = Policy()


@dataclasses.dataclass(frozen=True)
class Tiny(Experiment):
    contexts: tuple[int, ...] = (8,)
    temperature: float | None = None
    warm: bool = True

    def keys(self):
        return [f"{row.method}/{c}" for row in self.rows for c in self.contexts]

    def prepare(self):
        return None

    def measure(self, context, key):
        method, length = key.split("/")
        return {"method": method, "context": int(length), "kl": 0.1}


def experiment(suite="full"):
    return Tiny("tiny", (PolicyRow("snapkv"), PolicyRow("h2o")), (8,) if suite == "smoke" else (8, 16))
'''


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Write the config above and work beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(CONFIG)
    return "tiny.py"


@pytest.fixture
def listing(monkeypatch):
    """Stand in for the list of methods."""
    paper = types.SimpleNamespace(title="SnapKV [a]", bibtex=lambda: "@x{y}")
    fields = ("name", "family", "paper", "lossless", "trained", "config", "published")
    rows = (("SnapKV", "kv", paper, False, False, "snapkv.py", {"window": 32}), ("Full", "baseline", None, True, False, "full.py", None))
    settings = {"paper": {"window": 32}, "scaled": {"window": 16}}.get
    named = [types.SimpleNamespace(**dict(zip(fields, row)), settings=settings) for row in rows]
    module = types.ModuleType("tokeff.listing")
    module.every = lambda: tuple(named)
    monkeypatch.setitem(sys.modules, "tokeff.listing", module)
    monkeypatch.setattr(sys.modules["tokeff"], "listing", module, raising=False)


def refused(capsys, *args):
    """Run a command that must fail as bad input does, and return its one line."""
    capsys.readouterr()
    assert cli.main(args) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("tokeff: ") and said.err.count("\n") == 1, said
    return said.err


def test_run_and_rerun(tiny, capsys):
    """A run leaves its report in runs/<name>; the second run measures nothing."""
    assert cli.main(["run", tiny]) == 0
    said = capsys.readouterr()
    assert "snapkv" in said.out and "runs/tiny/report.html" in said.out and "[4/4]" in said.err
    assert cli.main(["run", tiny]) == 0
    assert "4 of 4 measurements are already here" in capsys.readouterr().err


def test_overrides_are_typed(tiny):
    """Values take the type of their field, down to one row's choices."""
    exp = load(tiny).experiment
    changed = overrides.apply(
        exp, ["--contexts", "4", "5", "--temperature", "0.5", "--no-warm", "--rows.h2o.kv.budget", "1"]
    )
    assert (changed.contexts, changed.temperature, changed.warm) == ((4, 5), 0.5, False)
    assert [row.kv.budget for row in changed.rows] == [0.125, 1.0] and type(changed.rows[1]) is type(exp.rows[1])
    assert overrides.apply(exp, ["--rows.1.kv.budget=0.5"]).rows[1].kv.budget == 0.5
    assert overrides.apply(exp, []) == exp


def test_a_budget_on_the_command_line_is_a_share_or_a_number():
    exp = load(str(Path(__file__).parents[1] / "configs" / "quickstart.py")).experiment
    for said, meant in (("0.25", 0.25), ("64", 64)):
        (row,) = [row for row in overrides.apply(exp, ["--rows.SnapKV.kv.budget", said]).rows if row.method == "SnapKV"]
        assert row.kv.budget == meant and type(row.kv.budget) is type(meant)


@pytest.mark.parametrize(
    ("file", "suite"),
    [
        ("quickstart", None), ("leaderboard/kv", "smoke"), ("leaderboard/kv", "full"), ("leaderboard/kv_speed", None),
        ("leaderboard/reduce", "full"),
    ],
)  # fmt: skip
def test_every_row_of_a_config_fits_its_model(file, suite):
    """What the first command of the README loads and refuses, as far as the first measurement."""
    experiment = load(str(Path(__file__).parents[1] / "configs" / f"{file}.py"), suite).experiment.settled()
    experiment.check()
    try:
        experiment.prepare()
    except errors.UserError as error:
        if "Full: " in str(error) or "network" not in str(error):
            raise
        pytest.skip(f"no model: {error}")


def test_suite_and_only(tiny):
    """Both change the config, so they give another run."""
    assert load(tiny, "smoke").experiment.contexts == (8,)
    assert [row.method for row in load(tiny, only=("h2o",)).experiment.rows] == ["h2o"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--context", "3"], "no field 'context'; did you mean 'contexts'?"),
        (["--rows.h2.kv.budget", "3"], "did you mean 'rows.h2o.kv.budget'?"),
        (["--contexts", "three"], "--contexts"),
        (["--rows.h2o.kv.budget", "x"], "--rows.h2o.kv.budget"),
        (["--temperature"], "--temperature"),
        (["--rows.h2o.kv.budget", "0"], "budget 0 is not in (0, 1]"),
        (["stray"], "'stray' is not an option"),
        (["--only", "h20"], "did you mean 'h2o'?"),
        (["--out", "tiny.py/run"], "choose another folder with --out"),
        (["--out", "."], "choose another folder with --out"),
    ],
)
def test_bad_options_of_run(tiny, capsys, args, says, tmp_path):
    """One line that names the fix, and nothing written."""
    assert says in refused(capsys, "run", tiny, *args)
    assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["tiny.py"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def experiment():\n    return 3\n", "returned int"),
        ("x = 1\n", "no function experiment()"),
        ("def experiment(:\n", "not valid Python: line 1"),
    ],
)
def test_bad_configs(tmp_path, monkeypatch, capsys, source, says):
    """A file that gives no experiment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(source)
    assert says in refused(capsys, "run", "bad.py")


def test_bad_commands(tiny, capsys, listing, tmp_path):
    """Everything that is not there is answered with the nearest that is."""
    assert "did you mean 'run'?" in refused(capsys, "rnu")
    assert "did you mean 'tiny.py'?" in refused(capsys, "run", "tinny.py")
    assert "name a config file" in refused(capsys, "run")
    assert "only one suite" in refused(capsys, "run", _no_suite(tmp_path), "--suite", "smoke")
    assert "did you mean 'decode'?" in refused(capsys, "bench", "decod")
    assert "did you mean 'SnapKV'?" in refused(capsys, "methods", "--bibtex", "snap-kv")
    assert "--jsn" in refused(capsys, "methods", "--jsn")
    assert "no run in nowhere" in refused(capsys, "compare", "nowhere", "nowhere")
    assert "required" in refused(capsys, "compare", "nowhere")


def _no_suite(folder):
    (folder / "one.py").write_text(CONFIG.replace('suite="full"', "").replace('suite == "smoke"', "True"))
    return "one.py"


def test_methods(capsys, listing):
    """A table, JSON with the promised fields, and BibTeX."""
    assert cli.main(["methods"]) == 0
    assert "SnapKV [a]" in capsys.readouterr().out
    assert cli.main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    promised = {"name": "SnapKV", "family": "kv", "paper": "SnapKV [a]", "lossless": False, "trained": False}
    assert rows[0] == {**promised, "config": "snapkv.py", "paper_settings": {"window": 32}, "scaled_settings": {"window": 16}}
    assert rows[1]["paper"] is None and rows[1]["paper_settings"] is None
    assert "Full has no paper" in refused(capsys, "methods", "--bibtex", "Full")
    assert cli.main(["methods", "--bibtex", "SnapKV"]) == 0
    assert capsys.readouterr().out == "@x{y}\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_fetch_shows_progress(capsys, monkeypatch, terminal):
    """The path goes to stdout, the bar elsewhere: again and again on a terminal, once where there is none."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    seen = []
    module = types.ModuleType("tokeff.models.fetch")

    def fetch(name, progress=None):
        for done in (5, 10):
            progress(done, 10)
            seen.append(capsys.readouterr())
        return f"cache/{name}"

    module.fetch = fetch
    package = types.ModuleType("tokeff.models")
    package.fetch = module
    monkeypatch.setitem(sys.modules, "tokeff.models", package)
    monkeypatch.setitem(sys.modules, "tokeff.models.fetch", module)
    assert cli.main(["fetch"]) == 0
    said = capsys.readouterr()
    assert said.out == "cache/smollm2-135m\n" and not any(before.out for before in seen)
    assert "10/10 bytes" in said.err and "━" in said.err and ("\x1b[" in said.err) == terminal


def test_bench_passes_its_arguments_on(monkeypatch):
    """What follows the name goes to the benchmark, help included."""
    module = types.ModuleType("tokeff.bench.verify_cost")
    seen = []
    module.main = seen.append
    monkeypatch.setitem(sys.modules, "tokeff.bench", types.ModuleType("tokeff.bench"))
    monkeypatch.setitem(sys.modules, "tokeff.bench.verify_cost", module)
    assert cli.main(["bench", "verify-cost", "--widths", "1", "8", "--help"]) == 0
    assert seen == [["--widths", "1", "8", "--help"]]


def test_compare(tiny, capsys):
    """Two runs of one config compare without a word of doubt about the config."""
    for out in ("a", "b"):
        assert cli.main(["run", tiny, "--out", out]) == 0
    capsys.readouterr()
    assert cli.main(["compare", "a", "b"]) == 0
    said = capsys.readouterr()
    assert "snapkv/8" in said.out and "config" not in said.err


def test_interrupt_and_bugs(tiny, capsys, monkeypatch):
    """An interrupted run says how to go on; a bug keeps its trace."""
    run = __import__("tokeff.report.run", fromlist=["run"])
    monkeypatch.setattr(run, "run", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["run", tiny]) == 130
    assert capsys.readouterr().err == "tokeff: interrupted; rerun the same command to resume\n"
    monkeypatch.setattr(run, "run", lambda *a, **k: (_ for _ in ()).throw(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", tiny])


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 140737488355328 bytes.", ["128.0 TiB needed", "available"]),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4294967296 bytes.", ["4.0 GiB needed"]),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.10G of 15.48G hbm. Exceeded by 4.6G.",
         ["20.1 GiB needed", "15.5 GiB available"]),
        ("RESOURCE_EXHAUSTED: no figures", ["use a smaller"]),
    ],
)  # fmt: skip
def test_out_of_memory(message, parts):
    """XLA's error becomes one line with bytes and a way out."""
    error = type("XlaRuntimeError", (RuntimeError,), {})(message)
    said, code = errors.one_line(error)
    assert code == 2 and all(part in said for part in [*parts, "use a smaller context"])
    assert errors.one_line(type("XlaRuntimeError", (RuntimeError,), {})("INTERNAL: x")) is None


def test_nearest():
    """Case, dashes and typing errors do not matter."""
    assert errors.nearest("SnapKv", ["snapkv", "h2o"]) == "did you mean 'snapkv'?"
    assert errors.nearest("zzz", ["snapkv", "h2o"]) == "known: h2o, snapkv"
    assert errors.nearest("zzz", []) == "none are known"


def test_help_lists_the_fields(tiny, capsys):
    """`run CONFIG --help` shows what can be set."""
    assert cli.main(["run", tiny, "--help"]) == 0
    said = capsys.readouterr().out
    assert "--contexts" in said and "--fresh" in said and "1 is h2o" in said


def test_nothing_heavy_is_imported_for_help():
    """`methods --help` and `--version` are quick, and `python -m tokeff` works."""
    heavy = "{'jax', 'numpy', 'matplotlib', 'rich', 'tyro'}"
    code = f"import sys, tokeff.cli; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    for command in (["-c", code], ["-m", "tokeff", "--version"], ["-m", "tokeff", "methods", "--help"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
