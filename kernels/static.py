"""What compilers say of the kernels where no device is: python -m tokeff.kernels.static

For TPUs libtpu compiles every case of every op, as for a real chip. Of its own kernels it writes out the final bundles, of which a core
starts one a cycle. Their number, and how many moves of registers to memory and back (spills) stand in them, tells two versions of a kernel
apart under one version of libtpu. It is no time: a bundle in a loop counts once. Where versions differ in the size of their blocks, compare
bundles times the steps of the grid, which are the bundles that run where no block is skipped.

For CUDA, jax lowers to Triton: the size of the Triton program, its products and its reads and writes of memory. What becomes of it,
ptxas.py tells where jax's CUDA plugin is installed.

The figures are in kernels/static.json, and a test holds some of them.
"""

import argparse
import importlib.metadata
import json
import math
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from tokeff.cli import Parser
from tokeff.compat import count_operations, triton_calls
from tokeff.errors import UserError, nearest, one_line
from tokeff.kernels import cases as kernel_cases
from tokeff.kernels.bench import OPS

FILE = Path(__file__).with_name("static.json")
PACKAGES = ("jax", "libtpu")  # that figures depend on
TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TARGETS = (*TOPOLOGY, "triton")
MARGIN = 0.05  # by which a figure may grow unnoticed
HELD = ("bundles", "spills", "temp_bytes", "operations")  # figures that should not grow
# Several processes may hold the compiler at once; the others only quiet its log.
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled",
}  # fmt: skip


def main(args):
    """Command line. Figures that are there stay, unless they are named or --fresh is given."""
    p = Parser("python -m tokeff.kernels.static", description="Figures of the kernels from compilers alone.", allow_abbrev=False)
    p.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS, help=f"default: {' '.join(TARGETS)}")
    p.add_argument("--ops", nargs="+", default=sorted(OPS), help="ops (default: all)")
    p.add_argument("--cases", nargs="+", help="names of cases (default: those made for accelerators)")
    p.add_argument("--out", type=Path, default=FILE, help="file of the figures (default: kernels/static.json)")
    p.add_argument("--fresh", action="store_true", help="make again what is there")
    return run(p, args, fill)


def run(parser, args, fill):
    """Parse, check names of ops, and fill the file; return the exit code."""
    try:
        known = parser.parse_args(args)
        for op in known.ops:
            if op not in OPS:
                raise UserError(f"no op {op!r}; {nearest(op, OPS)}")
        fill(known)
        return 0
    except (UserError, KeyboardInterrupt) as error:
        told = one_line(error)
        assert told is not None
        print(f"tokeff: {told[0]}", file=sys.stderr)
        return told[1]


def versions(packages=PACKAGES):
    """Return what figures depend on, {package: version}; None for one that is not installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def read(path=FILE, packages=PACKAGES):
    """Return {versions, entries: {'target/op/case': figures}}."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"versions": versions(packages), "entries": {}}


def fill(known):
    """Make what is missing."""
    if versions()["libtpu"] is None and set(known.targets) != {"triton"}:
        raise UserError("libtpu, the TPU compiler, is not installed; pip install 'tokeff[test]', or give --targets triton")
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        make(known, PACKAGES, lambda target, op, case: figures(target, op, case, folder))


def make(known, packages, figures):
    """Make what is missing, one entry after the other, and write the file after each; all of it, where versions are others."""
    found, here = read(known.out, packages), versions(packages)
    if found["versions"] != here:
        found = {"versions": here, "entries": {}}
    for target, op, case in wanted(known):
        key = f"{target}/{op}/{case.name}"
        if known.fresh or key not in found["entries"]:
            found["entries"][key] = figures(target, op, case)
            print(key, found["entries"][key], flush=True)
            write(known.out, found)


def write(path, found):
    """Write the figures, a line an entry."""
    lines = [f"  {json.dumps(key)}: {json.dumps(found['entries'][key])}" for key in sorted(found["entries"])]
    head = f'{{\n "versions": {json.dumps(found["versions"])},\n "entries": {{\n'
    path.write_text(head + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")


def wanted(known: argparse.Namespace):
    """Yield (target, op, case)."""
    for target in known.targets:
        for op in known.ops:
            for case in OPS[op][0].CASES if known.cases else OPS[op][0].ACCELERATOR:
                if not known.cases or case.name in known.cases:
                    yield target, op, case


def prepare(folder):
    """Set up this process before libtpu is loaded: no device is looked for, and bundles are written to the folder."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    flags = {"to": folder, "llo_text": "true", "llo_pass_label_regex": "final_"}  # of some seventy passes, what the last one leaves
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(f"--xla_jf_dump_{name}={value}" for name, value in flags.items())
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what is not compiled writes no bundles


def figures(target, op, case, folder):
    """Return the figures of one case, or {refused: why the kernel does not take it}."""
    program, split = program_of(op, case, "pallas_gpu" if target == "triton" else "pallas_tpu")
    try:
        traced = program.trace(*split)
    except ValueError as refused:
        return {"refused": " ".join(str(refused).split())}
    return of_triton(traced) if target == "triton" else of_tpu(program, split, target, folder) | {"steps": steps(traced.jaxpr.jaxpr)}


def program_of(op, case, implementation):
    """Return (an op under an implementation, jitted; the shapes it takes: {name: struct} of what is given away, and of the rest)."""
    module, public = OPS[op][:2]
    structs = getattr(module, "structs", kernel_cases.structs)(case)
    given = getattr(module, "GIVEN", ())

    def f(given, kept):
        positional, keys = module.arguments(given | kept)
        return public(*positional, **keys, **module.options(case), implementation=implementation)

    split = {n: s for n, s in structs.items() if n in given}, {n: s for n, s in structs.items() if n not in given}
    return jax.jit(f, donate_argnums=0), split


def on_device(split, device):
    """Return shapes as arrays on one device have them."""
    on = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=on), split)


def of_triton(traced):
    """Return the size of the Triton programs."""
    counts, warps, programs = Counter(), [], 0
    for sizes, module in triton_calls(traced.lower(lowering_platforms=("cuda",))):
        counts.update(count_operations(module))
        warps.append(sizes["num_warps"])
        programs += sizes["grid_x"] * sizes["grid_y"] * sizes["grid_z"]
    kinds = {"products": "tt.dot", "loads": "tt.load", "stores": "tt.store"}
    return {"operations": counts.total(), **{name: counts[kind] for name, kind in kinds.items()}, "warps": max(warps), "programs": programs}


def of_tpu(program, split, target, folder):
    """Compile for a chip that is not here, and return what libtpu tells."""
    from jax.experimental import topologies

    for old in Path(folder).iterdir():
        old.unlink()
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[target]).devices[0]
    compiled = program.lower(*on_device(split, device)).compile()
    memory = compiled.memory_analysis()
    return bundles(Path(folder)) | {"temp_bytes": memory.temp_size_in_bytes, "code_bytes": memory.generated_code_size_in_bytes}


def steps(jaxpr):
    """Return the steps of the grids of all Pallas calls in a program."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            total += math.prod(eqn.params["grid_mapping"].grid)
            continue
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            total += times * steps(inner) if hasattr(inner, "eqns") else 0
    return total


def bundles(folder):
    """Return the bundles of the Mosaic kernels whose files are in a folder, those that do nothing, and the spills in them."""
    total = {"kernels": 0, "bundles": 0, "empty": 0, "spills": 0}
    for path in sorted(folder.glob("*-schedule-analysis_final_bundles.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        kernel = path.name.rpartition("-schedule-analysis")[0].rpartition("-")[0]  # number of its compile, then name of the instruction
        # The program as a whole has a file too, and names the kernels in it.
        if not re.search(rf"%{re.escape(kernel.partition('-')[2])} = .*custom_call_target=\"tpu_custom_call\"", text):
            continue
        total["kernels"] += 1
        for name, words in (("bundles", "total"), ("empty", "empty")):
            total[name] += int(re.findall(rf"{words} scheduled bundles: +(\d+)", text)[0])
        (table,) = folder.glob(f"{kernel}-*-final_hlo-static-per-bundle-utilization.txt")
        total["spills"] += spills(table.read_text(encoding="utf-8"))
    return total


def spills(table):
    """Return how many registers are written to memory and read back in a table of units by bundle."""
    units = next(line for line in table.splitlines() if "VSTORE:SPILL" in line).replace(" ", "").split(",")
    rows = table.split("== UTILIZATION:")[1].split()
    at = [i for i, unit in enumerate(units) if unit in ("VLOAD:FILL", "VSTORE:SPILL")]
    return int(np.array(rows, int).reshape(-1, len(units))[:, at].sum())


def grown(figure, now, before):
    """Return whether a figure grew by more than the margin (spills: by more than that share and by more than 8)."""
    return now > before * (1 + MARGIN) + (8 if figure == "spills" else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
