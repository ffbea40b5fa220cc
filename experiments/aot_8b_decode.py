"""A Llama-3-8B decode step fits v5e chips and sends only activations: compiled for a v5e:2x4 slice, with no TPU and no weights.

    python experiments/aot_8b_decode.py              # about 2 minutes on 2 idle cores; needs libtpu: pip install -e '.[tpu]'
    python experiments/aot_8b_decode.py --layers 2   # a quick look, 20 seconds; writes nothing

Claim: with batch 8, 8,192 tokens of context and bfloat16, one decode step needs on each chip the eighth of the cache and the
quarter (data=2 x model=4) or eighth (data=1 x model=8) of the weights that `tokeff.sharding` says, and no copy of a cache. It
sends 64 sums of activations (two a layer), one for the embedding, and the arg-max. Beside that, AdaKV, whose pages cross heads,
sends queries out and partial results back in every layer; StreamingLLM reads the orders of one head; evicting policies ask whether
any sequence is full; all others send nothing.

Expected, GiB on each of 8 chips. data=2 x model=4: weights 3.74; state 1.02 for the full cache and TidalDecode, which reads less
of it, 0.91 for ShadowKV, whose low-rank keys belong to all heads and are whole on every chip of a model group, 0.10 to 0.12 for
the others at 10%; temporaries under 0.2. data=1 x model=8: weights 1.87. A v5e chip has 16.

Writes experiments/results/aot_8b_decode.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

for _name, _value in {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # this and the rest only quiet the log
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
}.items():
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh  # noqa: E402

from tokeff import sharding  # noqa: E402
from tokeff.collectives import collectives, counts  # noqa: E402
from tokeff.decode.draft import Drafter, Plain  # noqa: E402
from tokeff.decode.loop import Decoding, begin, step  # noqa: E402
from tokeff.decode.sample import GREEDY, row_keys  # noqa: E402
from tokeff.kv import methods as kv  # noqa: E402
from tokeff.kv.cache import Room  # noqa: E402
from tokeff.kv.policy import Policy, Prefilled  # noqa: E402
from tokeff.kv.prefill import prefill  # noqa: E402
from tokeff.models.config import Config, Precision  # noqa: E402
from tokeff.models.layout import abstract  # noqa: E402
from tokeff.models.presets import LLAMA3_8B  # noqa: E402
from tokeff.sparse.methods import tidaldecode  # noqa: E402

SLICE = "v5e:2x4"
BFLOAT16 = Precision("bfloat16", "bfloat16", "bfloat16")
BATCH, CONTEXT, NEW = 8, 8192, 128
RESULTS = Path(__file__).parent / "results" / "aot_8b_decode.json"
# (name, policy, data, model)
CASES: tuple[tuple[str, Policy, int, int], ...] = (
    ("Full", kv.full(), 2, 4),
    ("Full", kv.full(), 1, 8),
    ("SnapKV 10%", kv.snapkv(0.1), 2, 4),
    ("StreamingLLM 10%", kv.streaming_llm(0.1), 2, 4),
    ("H2O 10%", kv.h2o(0.1), 2, 4),
    ("AdaKV 10%", kv.adakv(0.1), 2, 4),
    ("TidalDecode 10%", tidaldecode(0.1), 2, 4),
    ("ShadowKV 10%", kv.shadowkv(0.1), 2, 4),
)
GIB = 2**30


def chips(name: str = SLICE) -> list[Any]:
    """The devices of a TPU slice that exists only for the compiler."""
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def prefilled(cfg: Config, policy: Policy, B: int, S: int) -> tuple[Prefilled, ...]:
    """Shapes of a dense prefill of B prompts of S tokens, with what the policy asks of it."""
    tokens, length = jax.ShapeDtypeStruct((B, S), "int32"), jax.ShapeDtypeStruct((B,), "int32")
    return jax.eval_shape(
        lambda params, *text: prefill(params, cfg, *text, evidence=policy.needs(), dtype=BFLOAT16.cache).layers,
        abstract(cfg, BFLOAT16), tokens, length,
    )  # fmt: skip


def state(cfg: Config, policy: Policy, drafter: Drafter, B: int, S: int, new: int) -> Decoding:
    """Shapes of the decode state of B prompts of S tokens with room for `new` more."""

    def build(layers, tokens_BS, length_B, logits_BV):
        packed = policy.pack(layers, Room(new, drafter.nodes if drafter.nodes > 1 else 0), cfg)
        keys, limit = row_keys(0, jnp.arange(B)), jnp.full(B, new, jnp.int32)
        return begin(packed, tokens_BS, length_B, length_B * 0, logits_BV, drafter, keys, limit, GREEDY, ())

    tokens, length = jax.ShapeDtypeStruct((B, S + new), "int32"), jax.ShapeDtypeStruct((B,), "int32")
    logits = jax.ShapeDtypeStruct((B, cfg.V), "float32")
    return jax.eval_shape(build, prefilled(cfg, policy, B, S), tokens, length, logits)


def on_mesh(tree: Any, mesh: Mesh) -> Any:
    """The same shapes with the layout that `tokeff.sharding` gives them."""
    where = sharding.shardings(tree, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)


def share(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device, as the table says."""
    leaves = jax.tree.leaves(tree)
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)


def compile_step(cfg: Config, policy: Policy, mesh: Mesh, drafter: Drafter | None = None, *, B=BATCH, S=CONTEXT, new=NEW):
    """(compiled decode step, placed weights, placed state)."""
    drafter = drafter or Plain()
    params = on_mesh(abstract(cfg, BFLOAT16), mesh)
    s = on_mesh(state(cfg, policy, drafter, B, S, new), mesh)

    def one(params, s):
        return step(params, cfg, s, policy, drafter, GREEDY, ())

    with jax.set_mesh(mesh):
        lowered = jax.jit(one, donate_argnums=1, out_shardings=sharding.shardings(s, mesh)).lower(params, s)
        return lowered.compile(), params, s


def cache_copies(hlo: str, s: Decoding) -> int:
    """How often the step copies a whole array of keys or values to another place or layout."""
    stored = {x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(s.layers) if x.ndim == 4}
    large = max(map(math.prod, stored)) / 4
    shapes = (f"bf16[{','.join(map(str, dims))}]" for dims in stored if math.prod(dims) > large)
    return sum(len(re.findall(rf"= {re.escape(shape)}\S* copy\(", hlo)) for shape in shapes)


def row(name: str, cfg: Config, policy: Policy, data: int, model: int) -> dict[str, Any]:
    """One line of the results: bytes on each chip, and what it sends in a step."""
    begun = time.perf_counter()
    compiled, params, s = compile_step(cfg, policy, sharding.mesh(data, model, chips()))
    m = compiled.memory_analysis()
    return {
        "method": name, "policy": repr(policy), "layers": cfg.L, "data": data, "model": model, "batch": BATCH, "context": CONTEXT,
        "weights_bytes": share(params), "state_bytes": share(s), "argument_bytes": m.argument_size_in_bytes,
        "output_bytes": m.output_size_in_bytes, "alias_bytes": m.alias_size_in_bytes, "temp_bytes": m.temp_size_in_bytes,
        "peak_bytes": m.peak_memory_in_bytes, "code_bytes": m.generated_code_size_in_bytes,
        "cache_copies": cache_copies(compiled.as_text(), s),
        "collectives": counts(collectives(compiled.as_text())),
        "compile_s": round(time.perf_counter() - begun, 1),
    }  # fmt: skip


def show(r: dict[str, Any]) -> None:
    sizes = " ".join(f"{part} {r[f'{part}_bytes'] / GIB:.3f}" for part in ("weights", "state", "argument", "temp", "peak"))
    print(
        f"{r['method']}, data={r['data']} x model={r['model']}, {r['layers']} layers: GiB a chip: {sizes}; {r['compile_s']} s; "
        f"{r['cache_copies']} copies of a cache array"
    )
    for what, n in r["collectives"].items():
        print(f"    {n:3d} x {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--layers", type=int, default=LLAMA3_8B.L, help="compile only so many layers, and write nothing")
    layers = parser.parse_args().layers
    cfg = dataclasses.replace(LLAMA3_8B, L=layers, windows=(None,) * layers)
    rows = []
    for case in CASES:
        rows.append(row(case[0], cfg, *case[1:]))
        show(rows[-1])
    if layers == LLAMA3_8B.L:
        found = {"command": "python experiments/aot_8b_decode.py", "slice": SLICE, "model": cfg.name, "dtype": "bfloat16"}
        text = json.dumps({**found, "jax": jax.__version__, "rows": rows}, indent=1)
        RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
