"""Reads a compiled program: its collectives, and the cycles the TPU compiler expects."""

import dataclasses
import math
import re

BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_COLLECTIVE = re.compile(r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
# What runs as often as the line: of fusions only those that begin a collective, which others then carry on and end.
_CALL = re.compile(r" call\(| async-start\(|calls=%all-reduce-scatter|%async-collective-start\S* = ")
ARRAY = re.compile(r"\b(" + "|".join(BYTES) + r")\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of traffic in a program, summed."""

    operation: str  # "all-reduce", ...
    origin: str  # "forward", "backward" or "update": where in the step it comes from
    dtype: str
    group: int  # how many devices take part, where they are neighbours in the mesh; 0: all of them, or others
    operations: int  # times a step; those of one type inside a combined operation count once
    bytes: int  # of the results on one device, per step


@dataclasses.dataclass(frozen=True)
class Program:
    cycles: int  # 0 where the compiler gives none
    collectives: list[Collective]


def read(text: str) -> Program:
    """Sums over a compiled program's text, loops counted as often as they run."""
    bodies, entry = computations(text)
    collectives: dict[tuple[str, str, str, int], list[int]] = {}

    def add(name: str, times: int) -> int:
        cycles = 0
        for line in bodies.get(name, ()):
            if found := re.search(r'"estimated_cycles":"(\d+)"', line):
                cycles += times * int(found[1])
            if " while(" in line:
                cycles += add(named("body", line), times * trips(line, bodies))
            elif _CALL.search(line):
                cycles += sum(add(called, times) for called in re.findall(r"(?:to_apply|calls)=%([\w.\-]+)", line))
            elif match := _COLLECTIVE.search(line):
                _count(collectives, match, line, times)
        return cycles

    cycles = add(entry, 1)
    return Program(
        cycles, [Collective(*key, *sums) for key, sums in sorted(collectives.items(), key=lambda item: -item[1][1])]
    )


def _count(collectives: dict, match: re.Match, line: str, times: int) -> None:
    name = re.search(r'op_name="([^"]*)"', line)
    name = name[1] if name else ""
    origin = "backward" if "transpose(" in name else "forward" if "jvp(" in name else "update"
    by_type: dict[str, int] = {}
    arrays = ARRAY.findall(match[1])
    if match[3] and match[2] != "all-reduce":  # (operands, results, semaphores): only the results count
        arrays = [(dtype, shape) for dtype, shape in arrays if shape or dtype != "u32"]
        arrays = arrays[len(arrays) // 2 :]
    for dtype, shape in arrays:
        size = BYTES[dtype]
        for length in filter(None, shape.split(",")):
            size *= int(length)
        by_type[dtype] = by_type.get(dtype, 0) + size
    for dtype, size in by_type.items():
        sums = collectives.setdefault((match[2], origin, dtype, _group(line)), [0, 0])
        sums[0] += times
        sums[1] += times * size


def _group(line: str) -> int:
    """Collective.group, of groups as the TPU compiler writes them: mesh['a'=2,'b'=4] {'b'} are two, of four each."""
    groups = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if not groups or "device_ids" in groups[1]:
        return 0
    sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", groups[1]) if size != "1"}
    taking_part = [name for name in sizes if name in groups[2].split(",")]
    if len(taking_part) == len(sizes) or taking_part != list(sizes)[-len(taking_part) :]:
        return 0
    return math.prod(sizes[name] for name in taking_part)


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies, entry, lines = {}, "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = bodies[match[2]] = []
            entry = match[2] if match[1] else entry
        elif line.startswith("  "):
            lines.append(line)
    return bodies, entry


def named(what: str, line: str) -> str:
    """The computation that a loop's line names as its `what`."""
    found = re.search(rf"{what}=%([\w.\-]+)", line)
    assert found, line
    return found[1]


def trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: what the compiler says, else how far its condition lets it count, from 0; else once."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition, body = ("\n".join(bodies.get(named(name, line), ())) for name in ("condition", "body"))
    stop = max((int(n) for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", condition)), default=1)
    counter = re.search(r"get-tuple-element\([^)]*\), index=(\d+)", condition)
    return -(-stop // (_step(body, int(counter[1])) if counter else 1))


def _step(body: str, index: int) -> int:
    """By how much a loop's body raises element `index` of the loop's state; 1 if that is not plainly said."""
    if state := re.search(r"ROOT \S+ = .* tuple\((.*)\)", body):
        name = re.sub(r"/\*.*?\*/", "", state[1]).split(", ")[index]
        if added := re.search(rf"{re.escape(name)} = \S+ add\((\S+), (\S+)\)", body):
            constants = (re.search(rf"{re.escape(term)} = \S+ constant\((\d+)\)", body) for term in added.groups())
            return next((int(found[1]) for found in constants if found), 1)
    return 1
