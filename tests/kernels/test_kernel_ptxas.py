"""What NVIDIA's assembler says of the Triton kernels: nothing is spilled, and nothing has grown."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tokeff.errors import UserError
from tokeff.kernels import ptxas, static
from tokeff.kernels.bench import OPS
from tokeff.listing import methods

ROOT = Path(__file__).parents[2]
ENTRIES = ptxas.read()["entries"]
SAMPLE = {
    "decode_attention": "8b_8k_tree64", "flash_prefill": "8b_8k_prompt", "quant_decode": "8b_8k_int2_tree16",
    "tree_attention": "8b_8k_tree64",
}  # fmt: skip


@pytest.fixture
def python() -> Path:
    """The environment that has the compiler."""
    if named := os.environ.get("TOKEFF_CUDA_PYTHON"):  # as `make test` names it
        assert Path(named).exists(), f"TOKEFF_CUDA_PYTHON={named} is no file; run `make cuda`"
    found = Path(named or ROOT / ".venv-cuda" / "bin" / "python")
    if not found.exists():  # a bare pytest run by hand; a gigabyte of compiler is not asked of everybody
        pytest.skip("no compiler for GPUs: make cuda, or set TOKEFF_CUDA_PYTHON")
    return found


@pytest.mark.aot
def test_kernels_compile_for_an_h200_and_have_not_grown(python, tmp_path):
    out = tmp_path / "ptxas.json"
    command = [python, "-m", "tokeff.kernels.ptxas", "--ops", *SAMPLE, "--cases", *set(SAMPLE.values()), "--out", out]
    given = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=given | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    found = ptxas.read(out)
    assert found["versions"] == ptxas.read()["versions"], "the figures are of other versions; run: python -m tokeff.kernels.ptxas"
    assert {f"h200/{op}/{case}" for op, case in SAMPLE.items()} <= set(found["entries"])
    for key, figures in found["entries"].items():
        grown = {name: (ENTRIES[key][name], figures[name]) for name in ptxas.HELD if static.grown(name, figures[name], ENTRIES[key][name])}
        assert not grown, f"{key} grew: {grown}; if that is meant, run: python -m tokeff.kernels.ptxas --fresh"


@pytest.mark.core
def test_every_real_case_compiles_without_spills():
    expected = {f"h200/{op}/{case.name}" for op in OPS for case in OPS[op][0].ACCELERATOR}
    assert expected == set(ENTRIES), "run: python -m tokeff.kernels.ptxas"
    assert {key for key, figures in ENTRIES.items() if "refused" in figures} == set()
    for key, figures in ENTRIES.items():
        assert figures["spills"] == 0 and 0 < figures["registers"] <= 255, key
        assert figures["registers"] * 32 * figures["warps"] <= 65536, key  # one block at least fits an SM


@pytest.mark.core
def test_every_cache_policy_was_compiled_for_an_h200_and_copies_no_cache():
    rows = json.loads((ROOT / "experiments" / "results" / "aot_gpu_decode.json").read_text())["rows"]
    assert {m.name for m in methods() if m.part == "kv"} < set(rows), "run: python experiments/aot_gpu_decode.py"
    assert not any(row["cache_copies"] for row in rows.values())
    reads = {"Full": "decode_attention", "Quest": "page_scores", "KIVI": "quant_decode", "ShadowKV": "lowrank_scores"}
    assert all(rows[name]["kernels"].get(kernel) for name, kernel in (reads | {"Full, 15 drafts": "tree_attention"}).items())


@pytest.mark.core
def test_registers_and_spills_are_read_off_what_ptxas_says():
    text = """ptxas info    : Compiling entry function 'loop_fusion' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas info    : Compiling entry function 'flash_prefill' for 'sm_90a'
    640 bytes stack frame, 1200 bytes spill stores, 1384 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers"""
    assert ptxas.told(text) == [("loop_fusion", 10, 0), ("flash_prefill", 255, 2584)]


@pytest.mark.core
def test_where_there_is_no_compiler_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setattr(ptxas.shutil, "which", lambda *_, **__: None)
    with pytest.raises(UserError, match="ptxas is not installed here; run `make cuda`"):
        ptxas.assembler()
    monkeypatch.undo()
    monkeypatch.setattr(ptxas, "assembler", lambda: "ptxas")
    monkeypatch.setattr(ptxas.static, "versions", lambda packages: dict.fromkeys(packages))
    with pytest.raises(UserError, match="CUDA plugin is not installed here; run `make cuda`"):
        ptxas.fill(None)
