"""Decode steps of an 8B model compiled for an H200, with no GPU: which kernels run, and that no cache is copied.

    make cuda    # jax's CUDA plugin and ptxas, in .venv-cuda
    PYTHONPATH=$(echo .venv/lib/python*/site-packages) .venv-cuda/bin/python experiments/aot_gpu_decode.py             # about 6 minutes
    PYTHONPATH=... .venv-cuda/bin/python experiments/aot_gpu_decode.py --only SnapKV Quest                            # a quick look

Claim: each cache policy of the listing, under its scaled settings at a tenth of the rows where it has a budget, goes through the compiler
for GPUs with the kernels that it uses by default, and one step makes no copy of an array of keys or values. So do drafts of 15 nodes over
the full cache. Sizes of a layer are those of Llama-3-8B, bfloat16, 4 of its 32 layers, batch 4, 8,192 tokens of context.

Expected: decode_attention in nearly all (policies that add up what each row was attended, that merge rows by weight, or that read a latent
go through XLA), page_scores, lowrank_scores and quant_decode where pages, low-rank keys and codes are read, tree_attention and compact_rows
under drafts. No copies. Caches that no kernel reads as stored are decoded first, a layer at a time: 140 MB for GEAR, MiniCache in 4 bits
and SpAtten's planes, where others have 2 to 20.

Writes experiments/results/aot_gpu_decode.json. Nothing ran: this says nothing of time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import aot_8b_decode as aot  # quiets compilers before jax is loaded
import jax
import numpy as np
from jax.sharding import Mesh

from tokeff.decode.draft import Drafter, Plain
from tokeff.decode.recycling import TREE_16, TokenRecycling
from tokeff.errors import UserError, nearest
from tokeff.kernels import ptxas, static
from tokeff.kv.policy import Full, Policy
from tokeff.kv.pool import KeepByModel
from tokeff.listing import methods
from tokeff.report.environment import describe

RESULTS = Path(__file__).parent / "results" / "aot_gpu_decode.json"
LAYERS, BATCH, CONTEXT, NEW, BUDGET = 4, 4, 8192, 128, 0.1
GIVEN = {"budget": BUDGET, "ends": (198,)}  # where a policy has such settings; any token may end a sentence
TREE = "Full, 15 drafts"


def cases() -> dict[str, tuple[Policy, Drafter]]:
    """Every listed policy by its name, and a tree of drafts."""
    found: dict[str, tuple[Policy, Drafter]] = {}
    for m in methods():
        if m.part == "kv":
            found[m.name] = m.build(**{name: value for name, value in GIVEN.items() if name in m.settings()}), Plain()
    return found | {TREE: (Full(), TokenRecycling(TREE_16))}


def compiled(policy: Policy, drafter: Drafter, mesh: Mesh, layers: int) -> dict[str, Any]:
    """What one step became: calls of our kernels, copies of a cache, MB that live beside weights and state."""
    cfg = dataclasses.replace(aot.LLAMA3_8B, L=layers, windows=(None,) * layers)
    if isinstance(policy, KeepByModel):  # whose pages a prompt decides: here every layer gets the same
        policy = dataclasses.replace(policy, pages=(cfg.K * -(-round(BUDGET * CONTEXT) // policy.page),) * layers)
    start = time.perf_counter()
    program, _, s = aot.compile_step(cfg, policy, mesh, drafter, B=BATCH, S=CONTEXT, new=NEW)
    hlo = program.as_text()
    calls = ptxas.called(hlo)
    return {
        "kernels": {name: calls.count(name) for name in sorted(set(calls))}, "cache_copies": aot.cache_copies(hlo, s),
        "temp_mb": round(program.memory_analysis().temp_size_in_bytes / 1e6, 1), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def main() -> int:
    p = argparse.ArgumentParser(description="Decode steps compiled for an H200.")
    p.add_argument("--only", nargs="+", metavar="NAME", help="these policies alone; writes nothing")
    p.add_argument("--layers", type=int, default=LAYERS, help="of the model (default: %(default)s)")
    known = p.parse_args()
    every, rows = cases(), {}
    if known.only and (unknown := [name for name in known.only if name not in every]):
        raise UserError(f"no policy {unknown[0]!r}; {nearest(unknown[0], every)}")
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = Mesh(np.array([[ptxas.device()]]), ("data", "model"))
    for name in known.only or every:
        rows[name] = compiled(*every[name], mesh, known.layers)
        print(name, json.dumps(rows[name]), flush=True)
    if not known.only:
        about = {"command": "python experiments/aot_gpu_decode.py", "device": "NVIDIA H200, described", "layers": known.layers}
        about |= {"batch": BATCH, "context": CONTEXT, "budget": BUDGET, "versions": static.versions(ptxas.PACKAGES)}
        about |= {"environment": describe([])}
        RESULTS.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return 1 if any(row["cache_copies"] for row in rows.values()) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
