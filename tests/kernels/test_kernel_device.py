"""Every kernel on a device: what `make gpu` and `make tpu` run, here on a CPU and with small shapes."""

import dataclasses
import json
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_ops import SMALL

from tokeff.bench import device
from tokeff.kernels import check as check_module
from tokeff.kernels.bench import OPS
from tokeff.kernels.cases import Case
from tokeff.kernels.check import check, deviation

pytestmark = pytest.mark.core

PROMPT = Case("prompt", T=48, N=4, K=2, C=64, H=16, page_size=16, blocks=2, rows=3, ascending=True)
TINY = {op: cases[-1] for op, cases in SMALL.items()} | {
    "block_sparse_prefill": PROMPT,
    "flash_prefill": dataclasses.replace(PROMPT, rows=0, blocks=0, window=20, sinks=2),
    "tree_attention": Case("tree", T=5, N=4, K=2, C=40, H=16, W=7),
    "decode_attention": Case("pages", B=2, N=4, K=2, C=48, H=16, M=2, page_size=8),
    "column_mass": Case("mass", T=3, N=4, K=2, C=40, H=16),
}
ONE = ("--platform", "cpu", "--ops", "decode_attention", "--cases", "smol_2k", "--implementation", "xla", "--rounds", "1")


@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op_passes_on_this_device(op, monkeypatch):
    monkeypatch.setattr(check_module, "PIECE", 32)  # prompts are compared a piece at a time
    row = check(op, TINY[op])
    assert row["passed"] and row["repeats"] and row["swapped"] == 0, row
    assert max(row["error"], row["poisoned_error"]) < 1e-5 and json.loads(json.dumps(row)) == row


def test_a_wrong_kernel_does_not_pass(monkeypatch):
    module, public, *rest = OPS["decode_attention"]

    def wrong(*arrays, implementation, **options):
        out, lse = public(*arrays, **options, implementation=implementation)
        return (out if implementation == "reference" else out.at[0, 0, 0].add(jnp.nan)), lse

    monkeypatch.setitem(OPS, "decode_attention", (module, wrong, *rest))
    row = check("decode_attention", TINY["decode_attention"])
    assert not row["passed"] and row["error"] is None


def test_a_kernel_that_misses_a_block_of_rows_does_not_pass(monkeypatch):
    """Among thousands of rows, in bfloat16, where outputs are small numbers."""
    module, public, *rest = OPS["decode_attention"]
    case = Case("long", N=2, K=1, C=4096, H=64, dtype="bfloat16")
    assert check("decode_attention", case)["passed"]

    def wrong(q, k, v, order, *bounds, implementation, **options):
        order = order if implementation == "reference" else order.at[:, :, 256:320].set(-1)
        return public(q, k, v, order, *bounds, **options, implementation=implementation)

    monkeypatch.setitem(OPS, "decode_attention", (module, wrong, *rest))
    assert not check("decode_attention", case)["passed"]


def test_deviation_knows_infinities_and_whole_numbers():
    x, whole = np.array([1.0, -np.inf, np.nan], np.float32), np.array([3, 4, 5, 6])
    assert deviation((x, whole), (x, whole)) == (0.0, 0.0)
    assert deviation((x + 0.5, whole), (x, np.array([3, 4, 5, 7]))) == (0.5, 0.25)
    assert deviation((x,), (np.nan_to_num(x),))[0] == np.inf


def test_parts_are_run_once_and_can_be_listed(tmp_path, capfd, monkeypatch):
    args = [*ONE, "--out", str(tmp_path)]
    assert device.main(args) == 0
    assert "2 of 2 passed" in capfd.readouterr().out
    found = json.loads((tmp_path / "cpu.json").read_text())
    (checked,), (timed,) = found["checks"]["rows"], found["kernels"]["rows"]
    assert checked["passed"] and checked["implementation"] == timed["implementation"] == "xla" and timed["of_floor"] > 0
    assert found["checks"]["environment"]["command"].startswith("python -m tokeff.bench.device --platform cpu")
    before = (tmp_path / "cpu.json").read_bytes(), (tmp_path / "cpu.parts.json").read_bytes()
    assert device.main(args) == 0
    monkeypatch.setattr(device, "device", lambda platform: "cpu")
    assert device.main([*args, "--list"]) == 0
    assert "check-decode_attention" in (said := capfd.readouterr().out) and "1 of 1 cases" in said
    assert before == ((tmp_path / "cpu.json").read_bytes(), (tmp_path / "cpu.parts.json").read_bytes())


@pytest.mark.parametrize("end", ["hangs", "dies"])
def test_a_case_that_hangs_or_dies_costs_itself_and_no_other(end, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "device", lambda platform: "cpu")
    calls, git = [], subprocess.run

    def run(command, timeout, **more):
        """The first process stops in its first case; the next one does the rest."""
        if command[0] == "git":
            return git(command, timeout=timeout, **more)
        state, part = device._State(tmp_path / "cpu.parts.json", False), command[-1]
        left = [name for name in ("smol_2k", "smol_8k") if name not in state.of(part)["cases"]]
        calls.append((part, left))
        assert timeout <= 8 * 60
        if len(left) == 2:
            state.of(part)["running"] = left[0]
            state.save()
            if end == "hangs":
                raise subprocess.TimeoutExpired(command, timeout)
            return subprocess.CompletedProcess(command, -11)
        state.of(part)["cases"][left[0]] = "passed"
        state.save()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    args = ["--platform", "cpu", "--ops", "decode_attention", "--cases", "smol_2k", "smol_8k", "--out", str(tmp_path)]
    assert device.main(args) == 1
    assert calls == [(f"{what}-decode_attention", left) for what in ("check", "bench") for left in (["smol_2k", "smol_8k"], ["smol_8k"])]
    said = capsys.readouterr().out
    assert "2 of 4 passed" in said and ("not finished after 8 minutes" if end == "hangs" else "ended with code -11") in said
    assert device.main(args) == 1 and len(calls) == 4  # what hung is not tried again unless it is asked for


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--platform", "tpu"], "no tpu is here, jax sees: cpu"),
        (["--platform", "cpu", "--ops", "attention"], "no op 'attention'"),
        (["--platform", "cpu", "--cases", "smol_2"], "did you mean 'smol_2k"),
        (["--platform", "cpu", "--part", "check-kcentre"], "did you mean 'check-k_centre'"),
        (["--platform", "abacus"], "invalid choice"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert device.main(args) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not list(tmp_path.iterdir())
