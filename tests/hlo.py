"""What a compiled program does in its loops: the text of XLA's optimised module, read."""

import math
import re
from dataclasses import dataclass

# Handing a buffer on, or writing a few rows into one that is there.
FREE = {"parameter", "bitcast", "tuple", "get-tuple-element", "while", "conditional", "scatter", "dynamic-update-slice", "call", "constant"}
MOVING = {"copy", "copy-start", "copy-done", "transpose"}  # the same numbers again, elsewhere or in another order
WRITING = {"scatter", "dynamic-update-slice"}
THROUGH = {"bitcast", "reshape", "tuple", "convert"}  # what may stand between a fusion's result and what made it
MADE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")

Size = tuple[str, int]
TYPES = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "uint8": "u8"}


def size(x) -> Size:
    """What an array has in common with its copies, whatever their shape."""
    return TYPES[x.dtype.name], math.prod(x.shape)


@dataclass(frozen=True)
class Instruction:
    """One line. sizes: type and number of elements of each array that it makes, as of `size`; operands: names of what it is made of; calls:
    computations that it runs."""

    name: str
    operation: str
    sizes: tuple[Size, ...]
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    root: bool
    line: str


def instruction(line: str) -> Instruction | None:
    found = MADE.match(line)
    if found is None:
        return None
    root, name, kind, operation, rest = found.groups()
    sizes = tuple((of, math.prod(map(int, filter(None, dims.split(","))))) for of, dims in re.findall(r"(\w+)\[([\d,]*)\]", kind))
    operands = tuple(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
    calls = re.findall(r"(?:calls|body|condition|true_computation|false_computation|to_apply)=%?([\w.\-]+)", rest)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", rest):
        calls += re.findall(r"%?([\w.\-]+)", branches[1])[1:]  # the first is the condition being false: attention's, which only a NaN takes
    return Instruction(name, operation, sizes, operands, tuple(calls), bool(root), line.strip())


def computations(text: str) -> dict[str, dict[str, Instruction]]:
    """{computation: {name: instruction}}."""
    found: dict[str, dict[str, Instruction]] = {}
    name = ""
    for line in text.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = opened[1]
            found[name] = {}
        elif name and (made := instruction(line)):
            found[name][made.name] = made
    return found


def turning(text: str) -> tuple[list[Instruction], dict[str, dict[str, Instruction]]]:
    """(every instruction that a turn of a loop may run, all computations). Of fused computations there is only what they return."""
    found = computations(text)
    todo, seen = [c for lines in found.values() for made in lines.values() if made.operation == "while" for c in made.calls], set()
    while todo:
        if (name := todo.pop()) in found and name not in seen:
            seen.add(name)
            todo += [called for made in found[name].values() if made.operation != "fusion" for called in made.calls]
    return [made for name in sorted(seen) for made in found[name].values()], found


def makers(made: Instruction, found: dict[str, dict[str, Instruction]]) -> list[Instruction]:
    """What makes the results of an instruction: itself, or in a fusion what its computation returns, seen through changes of form."""
    if made.operation != "fusion":
        return [made]
    lines = found[made.calls[0]]
    todo, out = [next(line for line in lines.values() if line.root)], []
    while todo:
        at = todo.pop()
        if at.operation in THROUGH:
            todo += [lines[name] for name in at.operands if name in lines]
        else:
            out.append(at)
    return out


def moved(text: str, sizes: set[Size]) -> list[str]:
    """Lines in loops that make an array of one of these sizes out of the same numbers: copies and transposes, alone or at the end of a
    fusion, whatever axes are merged or change places."""
    lines, found = turning(text)
    return [line.line for line in lines if any(m.operation in MOVING and sizes & {*m.sizes} for m in makers(line, found))]


def made(text: str, sizes: set[Size]) -> list[str]:
    """Lines in loops that make an array of one of these sizes, in whatever way. A fusion that ends in a scatter writes in place."""
    lines, found = turning(text)
    return [
        line.line
        for line in lines
        if line.operation not in FREE and any(m.operation not in WRITING and sizes & {*m.sizes} for m in makers(line, found))
    ]
