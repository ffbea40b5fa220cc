"""Write the table of kernels/README.md from static.json, ptxas.json and benchmarks/*.json: python -m tokeff.kernels.table"""

import json
from pathlib import Path

from tokeff.kernels import ptxas, static
from tokeff.kernels.bench import OPS
from tokeff.kernels.check import KERNEL

HERE = Path(__file__).resolve().parent
README, BENCHMARKS = HERE / "README.md", HERE.parent / "benchmarks"
BEGIN, END = "<!-- table: python -m tokeff.kernels.table -->", "<!-- end of table -->"
NOTHING = "not measured"
COMPILED = {"pallas_tpu": ("v5e", "v5p", "v6e"), "pallas_gpu": ("triton", "h200")}  # targets of static.json and of ptxas.json
SIZE = {"triton": "operations", "h200": "registers"}  # of a kernel there; bundles on TPUs
# Forms that were chosen by timing them; all other sizes follow from floors and from what compilers accept.
TUNED = {(op, "xla"): "CPU" for op in ("column_mass", "decode_attention", "flash_prefill", "tree_attention")}
HEAD = ("op", "implementation", "proved by", "through compilers", "on devices", "tuned for", "of its floor")


def text():
    """Return the table as it stands between its marks."""
    entries, files = static.read()["entries"] | ptxas.read()["entries"], devices()
    rows = [HEAD, ("---",) * len(HEAD)]
    for op in sorted(OPS):
        for name in ("xla", *COMPILED):
            proved = "tests on CPU" if name == "xla" else "interpretation"
            tuned = TUNED.get((op, name), "—" if name == "xla" else NOTHING)
            rows.append((f"`{op}`", f"`{name}`", proved, compiled(op, name, entries), ran(op, name, files), tuned, floors(op, name, files)))
    return "\n".join([BEGIN, *("| " + " | ".join(row) + " |" for row in rows), END])


def devices():
    """Return [(device kind, its file)] of all that was measured."""
    paths = [path for path in sorted(BENCHMARKS.glob("*.json")) if not path.name.endswith(".parts.json")]
    return [(path.stem, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def compiled(op, name, entries):
    """Return what the compilers said: cases taken of all, bundles or registers and spills, or the size of Triton programs."""
    said = []
    for target in COMPILED.get(name, ()):
        found = [figures for key, figures in entries.items() if key.startswith(f"{target}/{op}/")]
        if not (taken := [figures for figures in found if "refused" not in figures]):
            continue
        what = SIZE.get(target, "bundles")
        sizes = span([figures[what] for figures in taken], "{:,}") + f" {what}"
        spills = "" if target == "triton" else f", {span([figures['spills'] for figures in taken], '{:,}')} spills"
        said.append(f"{target} {len(taken)}/{len(found)}: {sizes}{spills}")
    return "; ".join(said) or ("—" if name == "xla" else NOTHING)


def ran(op, name, files):
    """Return how many cases passed `tokeff.kernels.check` on each device."""
    said = []
    for kind, found in files:
        rows = [row for row in found.get("checks", {}).get("rows", ()) if row["op"] == op and implementation(row, found, "checks") == name]
        if rows:
            said.append(f"{kind} {sum(row['passed'] for row in rows)}/{len(rows)}")
    return ", ".join(said) or NOTHING


def floors(op, name, files):
    """Return the range of floor / time over the cases timed on each device."""
    said = []
    for kind, found in files:
        rows = found.get("kernels", {}).get("rows", ())
        ratios = [row["of_floor"] for row in rows if row["op"] == op and implementation(row, found, "kernels") == name]
        if ratios:
            said.append(f"{kind} {span(ratios, '{:.2f}')}")
    return ", ".join(said) or NOTHING


def implementation(row, found, entry):
    """Return which implementation made a row: the kernel of the device where none was named, unless the check says it refused the case."""
    if row["implementation"] != "auto":
        return row["implementation"]
    checks = found.get("checks", {}).get("rows", ())
    refused = any(other["refusal"] for other in checks if (other["op"], other["case"]) == (row["op"], row["case"]))
    return "xla" if refused else KERNEL.get(found[entry]["environment"]["backend"], "xla")


def span(numbers, form):
    """Return 'lowest to highest', or the one number there is."""
    low, high = (form.format(f(numbers)) for f in (min, max))
    return low if low == high else f"{low} to {high}"


def replaced(page):
    """Return a page with the table of today between its marks."""
    before, rest = page.split(BEGIN)
    return before + text() + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(replaced(README.read_text(encoding="utf-8")), encoding="utf-8")
