"""The one place for jax names that move between releases (written for 0.10.2 and 0.11), and for its private ones.

Everything else in tokeff imports `pl`, `pltpu`, `triton`, `shard_map` and the helpers below from here.
"""

import importlib

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton

__all__ = [
    "context_mesh",
    "count_operations",
    "forget_programs",
    "interpret_tpu",
    "pl",
    "pltpu",
    "races_found",
    "shard_map",
    "tpu_params",
    "triton",
    "triton_calls",
    "triton_params",
]


def shard_map(f, mesh, in_specs, out_specs):
    """Return f run once per device on its shards. Replication of outputs is taken on trust, as Pallas needs."""
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def context_mesh():
    """Return the mesh set by `jax.set_mesh`, or None where none is set or the caller is already inside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def tpu_params(*dimension_semantics):
    """Return Mosaic compiler parameters: one of 'parallel' or 'arbitrary' (carries scratch) for each grid axis."""
    return pltpu.CompilerParams(dimension_semantics=dimension_semantics)


def triton_params(num_warps, num_stages):
    """Return Triton compiler parameters. Without them a Pallas call on CUDA goes to Mosaic-GPU, another language."""
    return triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)


def interpret_tpu():
    """Return `interpret=` for a TPU kernel on CPU that detects races, unfinished DMAs and reads out of bounds."""
    return pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")


def races_found():
    """Return whether the last kernel run under `interpret_tpu` raced (jax prints races; the flag is private)."""
    return bool(importlib.import_module("jax._src.pallas.mosaic.interpret.interpret_pallas_call").races.races_found)


def triton_calls(lowered):
    """Return (parameters, module) of each Triton kernel in a program lowered for CUDA (jaxlib's own bindings, not public)."""
    ir = importlib.import_module("jaxlib.mlir.ir")
    context = importlib.import_module("jax._src.interpreters.mlir").make_ir_context()
    importlib.import_module("jaxlib.triton.dialect").register_dialect(context)
    found = []

    def visit(op):
        if op.name == "stablehlo.custom_call" and "triton" in str(op.attributes["call_target_name"]):
            given = ir.DictAttr(op.attributes["mhlo.backend_config"])
            sizes = {name: ir.IntegerAttr(given[name]).value for name in ("num_warps", "num_stages", "grid_x", "grid_y", "grid_z")}
            with context:
                found.append((sizes, ir.Module.parse(ir.StringAttr(given["ir"]).value_bytes)))
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return found


def count_operations(module):
    """Return the names of all operations in a module of MLIR, once for each time one stands there."""
    result, names = importlib.import_module("jaxlib.mlir.ir").WalkResult.ADVANCE, []

    def visit(op):
        names.append(op.name)
        return result

    module.operation.walk(visit)
    return names


def forget_programs(most: int = 30_000) -> bool:
    """Drop every compiled program when this process has more than `most` memory maps; whether it did.

    XLA:CPU maps several pieces of memory for each program, and Linux kills a process that asks for more than 65,530 of them
    (vm.max_map_count). Some forty methods on one model come to that. With a compile cache on disk, dropped programs come back fast.
    """
    try:
        with open("/proc/self/maps", "rb") as maps:
            many = sum(1 for _ in maps) > most
    except OSError:  # not Linux
        return False
    if many:
        jax.clear_caches()
    return many
