"""The communication in a partitioned program, read from XLA's text of it."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation)=\{?([%\w.\-, ]+)")


class Collective(NamedTuple):
    """Exchanges of one form in one step, as every device takes part in them.

    Attributes:
      kind: one of `KINDS`.
      dtype: of what is exchanged, in XLA's names; "mixed" for several at once.
      group: how many devices exchange with each other.
      spread: the largest distance between the numbers of two devices of a group, plus one.
      count: how many per step, those in loops counted once per iteration.
      bytes: of all of them together, of the whole array on one device: the result of a gather or a reduction, what goes
        into a scatter.
    """

    kind: str
    dtype: str
    group: int
    spread: int
    count: int
    bytes: float

    def sent(self) -> float:
        """Bytes that each device sends in the best known algorithm, a ring."""
        share = (self.group - 1) / self.group
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(
            self.kind, share
        )


class _Instruction(NamedTuple):
    name: str
    type: str
    op: str
    rest: str


def collectives(text: str, devices: int) -> list[Collective]:
    """What one run of the program exchanges, by kind, dtype and group, the most bytes first.

    An all-reduce of which every device keeps only its own slice counts as the reduce-scatter that the compilers of
    accelerators make of it; the CPU's does not. A branch counts as if all of its alternatives ran.

    Args:
      text: an HLO module, after partitioning.
      devices: number of partitions, which make the group of an exchange that names none.
    """
    computations, entry = _computations(text)
    runs = Counter()
    _count_runs(computations, entry, 1, runs)
    found: dict[tuple, list[float]] = {}
    for name, times in runs.items():
        for instruction in computations[name]:
            row = _collective(instruction, computations[name], devices)
            if row is not None:
                key, size = row
                total = found.setdefault(key, [0, 0.0])
                total[0] += times
                total[1] += times * size
    rows = [Collective(*key, int(count), size) for key, (count, size) in found.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        opened = _COMPUTATION.match(line)
        if opened:
            current = computations.setdefault(opened[2], [])
            entry = opened[2] if opened[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))):
            current.append(_Instruction(*found.groups()))
    return computations, entry


def _count_runs(computations: dict, name: str, times: int, runs: Counter) -> None:
    runs[name] += times
    for instruction in computations[name]:
        if instruction.op in ("while", "call", "conditional", "async-start"):
            inner = times * (_trip_count(computations, instruction.rest) if instruction.op == "while" else 1)
            for called in _CALLED.findall(instruction.rest):
                for callee in called.replace("%", "").replace(" ", "").split(","):
                    if callee in computations:
                        _count_runs(computations, callee, inner, runs)


def _trip_count(computations: dict, rest: str) -> int:
    """Of a loop that counts from 0: what XLA says of it, else the one integer that its condition compares with; 1 if
    it is not known."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    inside = computations.get(condition[1], []) if condition else []
    bounds = [row.rest for row in inside if row.op == "constant" and re.match(r"[su](8|16|32|64)\[\]", row.type)]
    return int(bounds[0].split(")")[0]) if len(bounds) == 1 else 1


def _collective(instruction: _Instruction, computation: list, devices: int):
    """`((kind, dtype, group, spread), bytes)` of an exchange, None of any other instruction."""
    kind = instruction.op.removesuffix("-start")
    if kind not in KINDS or instruction.op.endswith("-done"):
        return None
    group, spread = _group(instruction.rest, devices)
    arrays = _ARRAY.findall(instruction.type)
    if instruction.op.endswith("-start") and kind != "all-reduce":
        # The result of a start holds its operand too.
        arrays = arrays[len(arrays) // 2 :]
    size = sum(_bytes(dtype, shape) for dtype, shape in arrays)
    if kind == "reduce-scatter":
        size *= group
    elif kind == "all-reduce" and _scattered(instruction, computation, size, group):
        kind = "reduce-scatter"
    dtypes = {dtype for dtype, _ in arrays}
    return (kind, dtypes.pop() if len(dtypes) == 1 else "mixed", group, spread), size


def _scattered(reduced: _Instruction, computation: list, size: float, group: int) -> bool:
    """Whether all that is used of an all-reduce are slices of one part in `group` at most."""
    operand = re.compile(rf"%?{re.escape(reduced.name)}[,)]")
    users = [row for row in computation if operand.search(row.rest) and row.name != reduced.name]
    return bool(users) and all(
        row.op == "dynamic-slice" and sum(_bytes(*a) for a in _ARRAY.findall(row.type)) * group <= size for row in users
    )


def _bytes(dtype: str, shape: str) -> float:
    bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype) or 8)
    return math.prod(int(n) for n in shape.split(",") if n) * bits / 8


def _group(rest: str, devices: int) -> tuple[int, int]:
    """Size of the groups, and the spread of the device numbers in the widest."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    if pairs:
        ids = [[int(n) for n in re.findall(r"\d+", pair)] for pair in pairs[1].split("},")]
        return 2, 1 + max(abs(a - b) for a, b in ids)
    groups = _groups(rest, devices)
    return len(groups[0]), 1 + max(max(group) - min(group) for group in groups)


def _groups(rest: str, devices: int) -> list:
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
    if listed:
        return [[int(n) for n in re.findall(r"\d+", group)] for group in listed[1].split("},")]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if iota:
        return _iota(iota[3]).reshape(int(iota[1]), int(iota[2])).tolist()
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? ?\{(.*?)\}", rest)
    if axes:
        return _mesh_groups(*axes.groups())
    return [list(range(devices))]


def _iota(text: str) -> np.ndarray:
    """`[4,64]T(1,0)`: the numbers from 0 in that shape, transposed, flat."""
    shape, _, order = text.partition("T")
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(-1)


def _mesh_groups(mesh: str, ids: str | None, used: str) -> list:
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    # An axis may be used in part: 'axis':(2)4 is the middle factor of its 2 x 4 x rest.
    parts = {
        name: (int(a or 1), int(b or sizes[name])) for name, a, b in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", used)
    }
    shape, inside = [], []
    for name, size in sizes.items():
        before, part = parts.get(name, (size, 1))
        inside += [len(shape) + 1] if name in parts else []
        shape += [before, part, size // (before * part)]
    numbers = _iota(ids) if ids else np.arange(math.prod(shape))
    outside = [axis for axis in range(len(shape)) if axis not in inside]
    group = math.prod(shape[axis] for axis in inside)
    return numbers.reshape(shape).transpose(*outside, *inside).reshape(-1, group).tolist()


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
