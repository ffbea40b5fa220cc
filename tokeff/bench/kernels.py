"""`tokeff bench kernels`: each op against plain attention and against the bytes it must move."""

from __future__ import annotations

from typing import Any

from tokeff.bench import common
from tokeff.bench.device import check_names
from tokeff.errors import UserError
from tokeff.kernels import bench


def rows(ops: list[str], cases: list[str] | None = None, implementation: str | None = None, rounds: int = 9) -> list[dict[str, Any]]:
    """One row an op and case: what `tokeff.kernels.bench` returns."""
    found = []
    for op in ops:
        chosen = None if cases is None else [c for c in bench.OPS[op][0].CASES if c.name in cases]
        if chosen != []:
            found += bench.bench(op, chosen, implementation, rounds)
    return found


def main(args: list[str]) -> None:
    """Command line."""
    p = common.parser("kernels", "Each op against plain attention and its bandwidth floor.", rounds=9)
    p.add_argument("--ops", nargs="+", default=sorted(bench.OPS), help="ops (default: all)")
    p.add_argument("--cases", nargs="+", help="names of cases (default: those that fit the device)")
    p.add_argument("--implementation", help="force one, such as xla or pallas_gpu")
    known = p.parse_args(args)
    check_names(known.ops, known.cases)
    common.check_out(known.out)
    try:
        found = rows(known.ops, known.cases, known.implementation, known.rounds)
    except ValueError as error:  # a forced implementation that is unknown or does not support a case
        raise UserError(" ".join(str(error).split())) from error
    common.finish("kernels", found, known.out, args)
