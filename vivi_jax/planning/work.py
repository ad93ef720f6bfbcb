"""Counts the work of a compiled program, because the compiler's own figure has the body of a loop once.

The definitions are those of XLA's cost analysis: two operations a multiplication and addition of products and
convolutions (padding and holes left out), one an element of arithmetic, none of transcendental functions and of moves;
the bytes of what every instruction reads and writes, of a slice only the slice.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from vivi_jax.planning import hlo

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_ARITHMETIC = set(
    "add subtract multiply divide remainder maximum minimum compare select and or xor not negate abs sign clamp "
    "convert floor ceil round-nearest-afz round-nearest-even is-finite "
    "shift-left shift-right-logical shift-right-arithmetic popcnt count-leading-zeros".split()
)
_MOVES_NOTHING = set("parameter constant tuple get-tuple-element bitcast while call conditional after-all".split())


class Work(NamedTuple):
    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":  # pyright: ignore[reportIncompatibleMethodOverride]  a sum, not a join
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, n: int) -> "Work":
        return Work(n * self.flops, n * self.bytes)


class _Instruction(NamedTuple):
    name: str
    type: str
    operation: str
    operands: list[str]
    line: str
    is_root: bool


def of_repetitions(text: str) -> Work:
    """What loops do after their first pass: to be added to the compiler's figures for the program."""
    repeated, once = of_program(text), of_program(text, loops=False)
    return repeated + once.times(-1)


def of_program(text: str, *, loops: bool = True) -> Work:
    """All work of a compiled program's text; with `loops` each as often as it runs, else once."""
    bodies, entry = hlo.computations(text)
    parsed = {name: [found for line in lines if (found := _parsed(line))] for name, lines in bodies.items()}
    known: dict[str, Work] = {}

    def of_computation(name: str) -> Work:
        if name not in known:
            types = {instruction.name: instruction.type for instruction in parsed.get(name, ())}
            known[name] = sum((of_instruction(found, types) for found in parsed.get(name, ())), Work(0, 0))
        return known[name]

    def of_instruction(found: _Instruction, types: dict[str, str]) -> Work:
        if found.operation == "while":
            times = hlo.trips(found.line, bodies) if loops else 1
            return of_computation(hlo.named("body", found.line)).times(times)
        if found.operation == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", found.line)
            names = branches[1] if branches else " ".join(re.findall(r"(?:true|false)_computation=\S+", found.line))
            each = [of_computation(name) for name in re.findall(r"%([\w.\-]+)", names)]
            return Work(max(work.flops for work in each), max(work.bytes for work in each))
        called = re.search(r"(?:to_apply|calls)=%([\w.\-]+)", found.line)
        if found.operation in ("call", "async-start") and called:
            return of_computation(called[1])
        if found.operation == "fusion" and called:
            return Work(of_computation(called[1]).flops, _fusion_bytes(parsed[called[1]], found, types))
        return Work(_flops(found, types), _bytes(found, types))

    return of_computation(entry)


def _parsed(line: str) -> _Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    rest, depth, end = found[5], 1, 0
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    return _Instruction(
        found[2], found[3], found[4], re.findall(r"%([\w.\-]+)", rest[:end]), line.strip(), bool(found[1])
    )


def _shape(type_: str) -> list[int]:
    """Of an array, or of the first of a tuple."""
    found = hlo.ARRAY.search(type_)
    return [int(n) for n in found[2].split(",") if n] if found else []


def _size(type_: str) -> int:
    """Bytes of an array, or of all of a tuple."""
    return sum(hlo.BYTES[d] * math.prod(int(n) for n in shape.split(",") if n) for d, shape in hlo.ARRAY.findall(type_))


def _flops(found: _Instruction, types: dict[str, str]) -> float:
    elements = math.prod(_shape(found.type))
    if found.operation in _ARITHMETIC:
        return elements
    if found.operation in ("reduce", "scatter"):
        return math.prod(_shape(types.get(found.operands[0 if found.operation == "reduce" else -1], "")))
    if found.operation == "reduce-window":
        return elements * math.prod(int(n) for n in _window(found.line, "size", 0))
    if found.operation == "dot":
        lhs = _shape(types[found.operands[0]])
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", found.line)
        return 2 * elements * math.prod(lhs[int(i)] for i in contracted[1].split(",") if i) if contracted else 0
    if found.operation == "convolution":
        return _convolution_flops(found, types)
    return 0


def _convolution_flops(found: _Instruction, types: dict[str, str]) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", found.line)
    assert labels, found.line
    image, kernel, out = (
        dict(zip(names, _shape(type_), strict=True))
        for names, type_ in zip(labels.groups(), (*(types[o] for o in found.operands[:2]), found.type), strict=True)
    )
    spatial = sorted(name for name in kernel if name.isdigit())
    n = len(spatial)
    strides, holes_in, holes = (_window(found.line, key, n) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    pads = _window(found.line, "pad", n)
    pairs = 1
    for i, name in enumerate(spatial):
        low = int(pads[i].split("_")[0]) if "_" in pads[i] else 0
        place = np.arange(out[name])[:, None] * int(strides[i]) + np.arange(kernel[name]) * int(holes[i]) - low
        inside = (place >= 0) & (place <= (image[name] - 1) * int(holes_in[i])) & (place % int(holes_in[i]) == 0)
        pairs *= int(inside.sum())
    groups = re.search(r"batch_group_count=(\d+)", found.line)
    return 2 * pairs * kernel["i"] * kernel["o"] * image["b"] / (int(groups[1]) if groups else 1)


def _window(line: str, key: str, n: int) -> list[str]:
    """One value of a window for each spatial axis; "1" (no padding, no stride) where it is not written."""
    window = re.search(r"window=\{([^}]*)\}", line)
    found = re.search(rf"\b{key}=(\S+)", window[1]) if window else None
    return found[1].split("x") if found else ["1"] * n


def _bytes(found: _Instruction, types: dict[str, str]) -> float:
    if found.operation in _MOVES_NOTHING or found.operation.endswith("-done"):
        return 0
    if found.operation in ("dynamic-slice", "slice", "gather"):
        return 2 * _size(found.type)
    if found.operation == "dynamic-update-slice":
        return 2 * _size(types.get(found.operands[1], ""))
    return _size(found.type) + sum(_size(types.get(operand, "")) for operand in found.operands)


def _fusion_bytes(inside: list[_Instruction], found: _Instruction, types: dict[str, str]) -> float:
    """What a fusion reads of its operands and writes; a slice of an operand, or one that is updated, in place."""
    inner = {instruction.name: instruction for instruction in inside}
    users: dict[str, list[_Instruction]] = {}
    for instruction in inside:
        for operand in instruction.operands:
            users.setdefault(operand, []).append(instruction)

    def read(name: str, size: int) -> int:
        total = 0
        for user in users.get(name, ()):
            if user.operation in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += _size(user.type)
            elif user.operation == "bitcast":
                total += read(user.name, size)
            elif not (user.operation == "dynamic-update-slice" and user.operands[0] == name):
                return size
        return min(total, size)

    def written(name: str) -> int:
        instruction = inner[name]
        if instruction.operation == "tuple":
            return sum(written(operand) for operand in instruction.operands)
        if instruction.operation == "bitcast":
            return written(instruction.operands[0])
        if instruction.operation == "dynamic-update-slice":
            return _size(inner[instruction.operands[1]].type)
        return _size(instruction.type)

    parameters = {
        int(number[1]): instruction
        for instruction in inside
        if (number := re.search(r"parameter\((\d+)\)", instruction.line)) and instruction.operation == "parameter"
    }
    root = next(instruction for instruction in inside if instruction.is_root)
    reads = sum(read(parameter.name, _size(parameter.type)) for parameter in parameters.values())
    return reads + written(root.name)
