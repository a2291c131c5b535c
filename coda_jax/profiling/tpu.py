"""What a program costs on TPUs that are not there, by the TPU compiler's own estimates.

libtpu compiles for chips and pods that the machine does not have. In the program it writes the
cycles that it expects of most instructions; they are added up here along the flow of control. It
writes none on asynchronous copies, which wait in a queue at the rate of the chip's memory here, and
none on gathers, scatters, sorts and custom calls (XLA puts dense attention into one), which are
guessed here and reported as guessed. So compare programs of one topology with little guessed.

Cycles are those of the core that the estimates are for, one of two on v4 and v5p; it is given all
of the chip's memory and bandwidth. What chips send each other has no cycles either; it is counted
in bytes, apart.
"""

import base64
from collections import Counter
import dataclasses
import math
import re

import jax

from coda_jax.objectives.decoding import most_steps

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_ROW_CYCLES = 8  # of a gathered or scattered row: a guess
_SOFTMAX_CYCLES = 4  # of a register of 8 x 128 in a custom call's softmax: a guess
WAITING = "wait for a copy"
_COLLECTIVE = re.compile(
    r"= (\S.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|"
    r"collective-permute|collective-broadcast)(-start)?\("
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU.

    Attributes:
        clock: cycles a second.
        bandwidth: bytes a second between the chip's memory and the core.
        flops: operations of the matrix units in a cycle.
        memory: bytes.
    """

    clock: float
    bandwidth: float
    flops: int
    memory: float

    @property
    def bytes_a_cycle(self) -> float:
        """Between memory and core."""
        return self.bandwidth / self.clock


CHIPS = {
    "v4": Chip(1.05e9, 1228e9, 131072, 32e9),
    "v5e": Chip(1.5e9, 819e9, 131072, 16e9),
    "v5p": Chip(1.75e9, 2765e9, 131072, 95e9),
    "v6e": Chip(1.75e9, 1640e9, 524288, 32e9),
}


@dataclasses.dataclass
class Cost:
    """What one run of a program costs.

    Attributes:
        cycles: {path of scopes: cycles}.
        guessed: the part of these that the compiler does not estimate.
        flops: of custom calls, which XLA does not count.
        loops: {scope: cycles of a round} of loops whose length is not in the program.
        collectives: {(kind, scope): number} of what chips reduce or exchange.
        collective_bytes: {(kind, scope): bytes} of these on each chip, as they come out.
        total: all cycles.
    """

    cycles: Counter = dataclasses.field(default_factory=Counter)
    guessed: Counter = dataclasses.field(default_factory=Counter)
    flops: float = 0.0
    loops: dict[str, float] = dataclasses.field(default_factory=dict)
    collectives: Counter = dataclasses.field(default_factory=Counter)
    collective_bytes: Counter = dataclasses.field(default_factory=Counter)
    total: float = 0.0

    @property
    def guessed_share(self) -> float:
        """Of all cycles."""
        return sum(self.guessed.values()) / self.total

    def add(self, other: "Cost", times: int = 1) -> None:
        """Adds so many runs of another part."""
        for name in ("cycles", "guessed", "collectives", "collective_bytes"):
            for key, value in getattr(other, name).items():
                getattr(self, name)[key] += value * times
        self.loops |= other.loops
        self.flops += other.flops * times
        self.total += other.total * times

    def charge(self, scope: str, cycles: float, guessed: bool = False) -> None:
        """Adds cycles to a scope."""
        self.cycles[scope] += cycles
        self.total += cycles
        if guessed:
            self.guessed[scope] += cycles


def cost(compiled: jax.stages.Compiled, chip: Chip) -> Cost:
    """The cost of a program that was compiled for a TPU.

    Args:
        compiled: the program.
        chip: what it was compiled for.

    Raises:
        ValueError: it was compiled for something else.
    """
    text = compiled.as_text()
    if "estimated_cycles" not in text:
        raise ValueError("the program has no cycles: it was not compiled for a TPU")
    return _Program(text, chip).run()


def rounds_of(scope: str) -> int:
    """How often a loop counts whose length is not in the program: a decoder's with its limit."""
    return most_steps(scope) or 1


class _Program:
    """The instructions of an optimised program, by computation."""

    def __init__(self, text: str, chip: Chip):
        self.chip = chip
        self.computations: dict[str, list[str]] = {}
        name = ""
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
            if head:
                name = head.group(2)
                self.computations[name] = []
                self.entry = name if head.group(1) else getattr(self, "entry", name)
            elif name and line.startswith("  "):
                self.computations[name].append(line)

    def run(self, name: str | None = None) -> Cost:
        """The cost of one run of a computation; what it copies has arrived at its end."""
        found, free, arrival = Cost(), 0.0, {}
        types: dict[str, str] = {}
        seen: set[str] = set()
        for line in self.computations[name or self.entry]:
            parsed = re.match(r"\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)", line)
            if not parsed:
                continue
            me, kind, op, rest = parsed.groups()
            types[me] = kind
            self._count_collectives(found, line, seen)
            if op == "while":
                body = self.run(_named(line, "body"))
                rounds = self._rounds(line)
                if rounds is None:
                    rounds = rounds_of(_scope(line))
                    found.loops[_scope(line)] = body.total
                found.add(body, rounds)
            elif op in ("conditional", "call"):
                branches = [self.run(called) for called in self._called(line)]
                if branches:
                    found.add(max(branches, key=lambda branch: branch.total))
            elif op in ("copy-start", "slice-start", "async-start"):
                # Of the next program's weights some are fetched under this one.
                if "cross_program_prefetch" not in line:
                    free = max(free, found.total) + self._copied(kind)
                    arrival[me] = free
            elif op in ("copy-done", "slice-done", "async-done"):
                started = re.search(r"%([\w.\-]+)", rest).group(1)
                wait = arrival.get(started, 0.0) - found.total
                if wait > 0:
                    found.charge(WAITING, wait)
            else:
                self._instruction(found, line, kind, op, rest, types)
        return found

    def _instruction(self, found, line, kind, op, rest, types):
        estimated = re.search(r'"estimated_cycles":"(\d+)"', line)
        if estimated:
            found.charge(_scope(line), int(estimated.group(1)))
            return
        cycles = 0.0
        if op == "custom-call" and "tpu_custom_call" in line:
            cycles, flops = _custom_call(line, self.chip)
            found.flops += flops
        elif op == "sort":
            cycles = _sort(line, kind)
        elif op == "fusion" and "kind=kCustom" in line:
            cycles = self._rows(line, kind, rest, types)
        elif op == "reduce-window":
            cycles = 1000 + _size(kind) / 32
        if cycles:
            found.charge(_scope(line), cycles, guessed=True)

    def _count_collectives(self, found: Cost, line: str, seen: set[str]) -> None:
        """What an instruction, or one that it fuses or starts, reduces or exchanges.

        One that runs under several others is in all of them, by its channel.
        """
        fused = re.search(r"\bcalls=%([\w.\-]+)", line)
        if fused and fused.group(1).startswith("all-reduce-scatter"):  # TPUs' reduce-scatter
            line = line.replace(" fusion(", " reduce-scatter(", 1)
        elif fused:
            for inner in self.computations.get(fused.group(1), ()):
                self._count_collectives(found, inner, seen)
        sent = _COLLECTIVE.search(line)
        channel = re.search(r"channel_id=\d+", line)
        if not sent or (channel and channel.group() in seen):
            return
        seen.add(channel.group() if channel else line)
        kind, name, starts = sent.groups()
        arrays = re.findall(r"\b[a-z]+\d*\[[\d,]*\]", kind)
        if starts and name != "all-reduce":  # operands come first, results behind them
            arrays = [array for array in arrays if not array.endswith("[]")]
            arrays = arrays[len(arrays) // 2 :]
        found.collectives[name, _scope(line)] += 1
        found.collective_bytes[name, _scope(line)] += sum(map(_size, arrays))

    def _copied(self, kind: str) -> float:
        """Cycles of an asynchronous copy, none within the core's own memory, S(1)."""
        parts = re.findall(r"\b[a-z]+\d*\[[\d,]*\](?:\{[^}]*\})?", kind)
        sizes = [_size(part) for part in parts if not re.match(r"[us]32\[\]", part)]
        if not sizes or all("S(1)" in part for part in parts[:2]):
            return 0.0
        return min(sizes) / self.chip.bytes_a_cycle

    def _rows(self, line, kind, rest, types) -> float:
        """Rows gathered or scattered, read and written."""
        shape = _dimensions(kind)
        columns = max(shape[-1], 1) if len(shape) > 1 else 1
        rows = math.prod(shape) / columns
        if "scatter" in line and len(shape) > 1:
            operands = re.findall(r"%([\w.\-]+)", rest.split(")")[0])
            indices = (types[name] for name in operands if "s32[" in types.get(name, ""))
            rows = next((math.prod(_dimensions(index)) for index in indices), rows)
        width = _BYTES.get(kind.split("[")[0], 4) * -(-columns // 128) * 128
        return max(2 * rows * width / self.chip.bytes_a_cycle, _ROW_CYCLES * rows) + 500

    def _rounds(self, line: str) -> int | None:
        known = re.search(r"known_trip_count[^0-9]*(\d+)", line)
        if known:
            return int(known.group(1))
        condition = self.computations.get(_named(line, "condition"), [])
        root = next((other for other in condition if "ROOT" in other), "")
        constants = re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", "\n".join(condition))
        if "direction=LT" in root and len(constants) == 1:
            return int(constants[0])
        return None

    def _called(self, line: str) -> list[str]:
        names = re.findall(r"(?:to_apply|true_computation|false_computation)=%([\w.\-]+)", line)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
            names += re.findall(r"%([\w.\-]+)", group)
        return [name for name in names if name in self.computations]


def _named(line: str, role: str) -> str:
    return re.search(rf"{role}=%([\w.\-]+)", line).group(1)


def _scope(line: str) -> str:
    found = re.search(r'op_name="([^"]*)"', line)
    return found.group(1) if found else ""


def _dimensions(kind: str) -> list[int]:
    return [int(n) for n in re.search(r"\[([\d,]*)\]", kind).group(1).split(",") if n]


def _size(text: str) -> int:
    """Bytes of all arrays that a text names."""
    return sum(
        _BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
        if dtype in _BYTES
    )


def _sort(line: str, kind: str) -> float:
    """A bitonic sort passes log(n) (log(n) + 1) / 2 times over keys and values."""
    axis = int(re.search(r"dimensions=\{(\d+)", line).group(1))
    steps = math.ceil(math.log2(_dimensions(kind)[axis]))
    return _size(kind) / 1024 * steps * (steps + 1) / 2


def _custom_call(line: str, chip: Chip) -> tuple[float, float]:
    """(cycles, operations) of a kernel, by the products and exponentials in its text."""
    results = _size(line.split("custom-call(")[0])
    body = re.search(r'"body":"([^"]*)"', line)
    text = base64.b64decode(body.group(1)).decode(errors="replace") if body else ""
    bounds = re.search(r"iteration_bounds = array<i64: ([\d, ]+)>", text)
    if not bounds:
        return 2 * results / chip.bytes_a_cycle, 0.0
    rounds = math.prod(int(n) for n in bounds.group(1).split(","))
    matrix = flops = 0.0
    product = r"tpu\.matmul.*: vector<([^>]*)>, vector<[^>]*>, vector<[^>]*> -> vector<([^>]*)>"
    for left, out in re.findall(product, text):
        rows, columns = _vector(out)[-2:]
        inner = math.prod(_vector(left)) // rows
        flops += 2 * rows * columns * inner
        matrix += 2 * rows * -(-columns // 128) * 128 * -(-inner // 128) * 128 / chip.flops
    exponentials = (
        math.prod(_vector(v)) for v in re.findall(r"math\.exp .*: vector<([^>]*)>", text)
    )
    vectors = max(exponentials, default=0) / 1024 * _SOFTMAX_CYCLES
    operands = re.search(r"operand_layout_constraints=\{((?:[^{}]|\{[^{}]*\})*)\}", line)
    memory = (results + _size(operands.group(1) if operands else "")) / chip.bytes_a_cycle
    return max(memory, rounds * (max(matrix, vectors) + 100)), flops * rounds


def _vector(text: str) -> list[int]:
    return [int(n) for n in text.split("x")[:-1]]
