"""What NVIDIA's assembler says of the kernels for an H200, where no GPU is: python -m tokeff.kernels.ptxas

jax's CUDA plugin compiles for a GPU that is described to it: Triton makes PTX of our kernels, and ptxas machine code, of which it tells the
registers of a thread and what it had to spill to memory. A kernel that wants more shared memory than there is does not compile. It is no
time: registers bound how many blocks an SM holds at once (65,536 of them: 128 threads of 128 are 4 blocks), and spills are to be none.

`make cuda` makes an environment with the plugin and ptxas beside that of the tests. Figures are in kernels/ptxas.json, and a test
holds some of them.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from tokeff.cli import Parser
from tokeff.compat import triton_calls
from tokeff.errors import UserError
from tokeff.kernels import static
from tokeff.kernels.bench import OPS

FILE = Path(__file__).with_name("ptxas.json")
PACKAGES = ("jax", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
HELD = ("registers", "spills", "temp_bytes")  # figures that should not grow
ARCH = "sm_90a"
# The chip as NVIDIA's data sheet and the tables of its programming guide for compute capability 9.0 describe it.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  l2_cache_size: 52428800  memory_bandwidth: 4800000000000  device_memory_size: 141000000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


def main(args):
    """Command line. Figures that are there stay, unless they are named or --fresh is given."""
    p = Parser("python -m tokeff.kernels.ptxas", description="Registers and spills of the kernels for an H200.", allow_abbrev=False)
    p.add_argument("--ops", nargs="+", default=sorted(OPS), help="ops (default: all)")
    p.add_argument("--cases", nargs="+", help="names of cases (default: those made for accelerators)")
    p.add_argument("--out", type=Path, default=FILE, help="file of the figures (default: kernels/ptxas.json)")
    p.add_argument("--fresh", action="store_true", help="make again what is there")
    p.set_defaults(targets=("h200",))
    return static.run(p, args, fill)


def read(path=FILE):
    """Return {versions, entries: {'h200/op/case': figures}}."""
    return static.read(path, PACKAGES)


def fill(known):
    """Make what is missing, one entry after the other, and write the file after each."""
    assembler()
    plugin()
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder)
        static.make(known, PACKAGES, lambda _, op, case: figures(op, case, folder))


def plugin():
    """Raise UserError where jax cannot compile for CUDA."""
    if static.versions(PACKAGES)["jax-cuda13-plugin"] is None:
        raise UserError("jax's CUDA plugin is not installed here; run `make cuda`, and this in its environment")


def device():
    """Return an H200 that exists only for the compiler."""
    from jax.experimental import topologies

    plugin()
    return topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=H200).devices[0]


def called(text):
    """Return the names of our kernels in a compiled program, once a call; XLA's own have none."""
    return re.findall(r'name = "(\w+)"', text)


def assembler():
    """Return the path of ptxas: that of the environment, else the machine's."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) / "cu13" / "bin" for place in (spec.submodule_search_locations if spec else None) or ()]
    for place in (*places, None):
        if found := shutil.which("ptxas", path=place):
            return found
    raise UserError("ptxas is not installed here; run `make cuda`, and this in its environment")


def prepare(folder):
    """Set up this process before jax looks for devices: there is none, and PTX is written to the folder."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text=false".strip()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what is not compiled writes no PTX


def figures(op, case, folder):
    """Return the figures of one case, or {refused: why the kernel does not take it}."""
    program, split = static.program_of(op, case, "pallas_gpu")
    for old in Path(folder).iterdir():
        old.unlink()
    try:
        lowered = program.lower(*static.on_device(split, device()))
    except ValueError as refused:
        return {"refused": " ".join(str(refused).split())}
    warps = [sizes["num_warps"] for sizes, _ in triton_calls(lowered)]
    compiled = lowered.compile()
    names = set(called(compiled.as_text()))
    found = [one for path in sorted(Path(folder).glob("*.ptx")) if path.stat().st_size for one in assembled(path)]
    mine = [one for name, *one in found if name in names]
    registers, spills = (max(column) for column in zip(*mine, strict=True))
    return {"kernels": len(mine), "registers": registers, "spills": spills, "warps": max(warps)} | {
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes
    }


def assembled(path):
    """Return (name, registers of a thread, bytes spilled and read back) of every function of a file of PTX."""
    done = subprocess.run([assembler(), "-v", f"-arch={ARCH}", path, "-o", os.devnull], capture_output=True, text=True, check=True)
    return told(done.stderr)


def told(text):
    """Return the same from what ptxas says."""
    found = []
    for part in text.split("Compiling entry function ")[1:]:
        name = part.split("'")[1]
        (registers,), spills = re.findall(r"Used (\d+) registers", part), re.findall(r"(\d+) bytes spill", part)
        found.append((name, int(registers), sum(map(int, spills))))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
