"""What compilers say of the kernels has not grown, and the table made of it is the committed one."""

import os
import subprocess
import sys

import jax
import pytest

from tokeff.compat import pl
from tokeff.kernels import static, table
from tokeff.kernels.bench import OPS

COMPILED = {"k_centre": "odd_729", "page_scores": "smol_odd_mean"}  # the cheapest for libtpu
LOWERED = {"decode_attention": "8b_8k", "flash_prefill": "8b_8k_prompt"}


def made(tmp_path, chosen, *targets):
    """The entries that the script makes in a process of its own, since libtpu takes its flags when it is loaded."""
    out = tmp_path / "static.json"
    command = [sys.executable, "-m", "tokeff.kernels.static", "--targets", *targets, "--ops", *chosen, "--cases", *chosen.values()]
    subprocess.run([*command, "--out", str(out)], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.DEVNULL)
    return static.read(out)["entries"]


@pytest.mark.aot
@pytest.mark.parametrize(("chosen", "targets"), [(COMPILED, ("v5e",)), (LOWERED, ("triton",))], ids=["libtpu", "triton"])
def test_figures_have_not_grown(chosen, targets, tmp_path):
    committed, here = static.read(), static.versions()
    package = "jax" if targets == ("triton",) else "libtpu"
    if committed["versions"][package] != here[package]:
        pytest.skip(f"the figures are of {package} {committed['versions'][package]}, here is {here[package]}")
    now = made(tmp_path, chosen, *targets)
    assert len(now) == len(chosen)
    for key, figures in now.items():
        before = committed["entries"][key]
        assert set(figures) == set(before)
        held = [name for name in static.HELD if name in figures]
        grown = {name: (before[name], figures[name]) for name in held if static.grown(name, figures[name], before[name])}
        assert not grown, f"{key} grew: {grown}; if that is meant, run: python -m tokeff.kernels.static --fresh"


@pytest.mark.core
def test_every_real_case_has_figures():
    entries = static.read()["entries"]
    expected = {f"{target}/{op}/{case.name}" for target in static.TARGETS for op in OPS for case in OPS[op][0].ACCELERATOR}
    assert expected <= set(entries), "run: python -m tokeff.kernels.static"
    kernels = [figures for figures in entries.values() if "bundles" in figures]
    assert all(figures["bundles"] > 0 and figures["kernels"] > 0 for figures in kernels)


@pytest.mark.core
def test_spills_are_read_off_a_table_of_units():
    head = "== CAPACTIY:\nMXU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU\n 4 3 3 1 1 2\n== UTILIZATION:\n"
    assert static.spills(head + "0 1 2 0 0 0\n1 0 0 0 1 2\n") == 3
    assert static.grown("bundles", 106, 100) and not static.grown("bundles", 105, 100)
    assert static.grown("spills", 9, 0) and not static.grown("spills", 8, 0)


@pytest.mark.core
def test_steps_of_a_grid_count_as_often_as_its_loop_turns():
    def copy(x_ref, out_ref):
        out_ref[...] = x_ref[...]

    def call(x):
        at = pl.BlockSpec((8, 128), lambda i, j: (i, j))
        return pl.pallas_call(copy, grid=(3, 2), in_specs=[at], out_specs=at, out_shape=jax.ShapeDtypeStruct((24, 256), "float32"))(x)

    f = jax.jit(lambda x: jax.lax.map(jax.jit(call), x))
    assert static.steps(f.trace(jax.ShapeDtypeStruct((5, 24, 256), "float32")).jaxpr.jaxpr) == 30


@pytest.mark.core
def test_table_is_made_from_the_figures():
    page = table.README.read_text(encoding="utf-8")
    assert table.replaced(page) == page, "run: python -m tokeff.kernels.table"


@pytest.mark.core
def test_a_device_that_was_measured_appears_in_the_table():
    environment = {"backend": "gpu"}
    checks = [{"op": "k_centre", "case": name, "implementation": used, "refusal": why, "passed": True}
              for name, used, why in (("a", "pallas_gpu", None), ("b", "auto", "too many rows"))]  # fmt: skip
    timed = [{"op": "k_centre", "case": name, "implementation": "auto", "of_floor": ratio} for name, ratio in (("a", 0.5), ("b", 0.1))]
    files = [("h1", {"checks": {"rows": checks, "environment": environment}, "kernels": {"rows": timed, "environment": environment}})]
    assert (table.ran("k_centre", "pallas_gpu", files), table.ran("k_centre", "xla", files)) == ("h1 1/1", "h1 1/1")
    assert (table.floors("k_centre", "pallas_gpu", files), table.floors("k_centre", "xla", files)) == ("h1 0.50", "h1 0.10")
    assert table.floors("k_centre", "pallas_tpu", files) == "not measured"
