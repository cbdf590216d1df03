"""Cycles of a CUDA kernel's loops on one warp scheduler, replayed from the schedule that ptxas wrote into its output.

Each instruction of sm_70 and later says how long the next one of its warp has to wait, which of six scoreboards it
sets, and for which ones it waits (Jia et al., "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking",
arXiv:1804.06826). A scheduler issues one instruction a cycle, from the warp that has waited longest among those that
can go on. Assumed, not measured: the latency of whatever sets a scoreboard, and the cycles for which an instruction
holds its pipe. No GPU has confirmed any of it. Ratios of two versions of a loop are worth more than cycles.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

__all__ = ["Instruction", "Loop", "cycles", "loops"]

Value = TypeVar("Value")

SCOREBOARDS = 6
READ_CYCLES = 14  # until the operands of a store, or of another instruction that reads them late, may change
WARM_UP, ITERATIONS = 10, 24
LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);\s+/\* 0x[0-9a-f]{16} \*/")
CONTROL = re.compile(r"\s*/\* (0x[0-9a-f]{16}) \*/")
LABEL = re.compile(r"\s*(\.L\w+):")

# Pipes and the cycles for which a warp's instruction holds one, by the first letters of its name.
PIPES = (
    (("POPC", "FLO", "BREV", "MUFU", "I2F", "F2I", "F2F"), ("conversions", 8)),
    (("DADD", "DMUL", "DFMA", "DSETP"), ("float64", 2)),
    (("LDC", "U", "BRA", "BSSY", "BSYNC", "NOP", "S2", "R2UR", "WARPSYNC", "BAR", "EXIT", "CS2R"), ("control", 1)),
    (("LD", "ST", "ATOM", "RED", "SHFL"), ("memory", 2)),
    (("FADD", "FMUL", "FFMA", "FSETP", "FSEL", "FMNMX"), ("float32", 1)),
    (("IMAD",), ("multiplication", 2)),
    (("",), ("integers", 2)),
)
# Cycles until a scoreboard is free again. Global memory's depends on the cache.
LATENCIES = (
    (("LDS",), 30),
    (("POPC", "FLO", "BREV"), 16),
    (("SHFL",), 25),
    (("S2", "R2UR", "LDC"), 30),
    (("D",), 16),
    (("",), 20),
)


class Instruction(NamedTuple):
    """One instruction, and what ptxas says of its place in the schedule."""

    name: str
    stall: int
    sets: int  # the scoreboard that is free when the result is there; SCOREBOARDS for none
    reads: int  # the one that is free when the operands have been read
    waits: int  # a bit for each that must be free


class Loop(NamedTuple):
    """A loop of a kernel as a straight line, without the loops inside it."""

    kernel: str
    body: list[Instruction]

    def count(self, *names: str) -> int:
        """How many instructions begin with one of ``names``."""
        return sum(instruction.name.startswith(names) for instruction in self.body)


def loops(listing: str) -> Iterator[Loop]:
    """The loops of all kernels in what ``nvdisasm -c -hex`` printed."""
    for part in re.split(r"\n\s*\.section\s+\.text\.", listing)[1:]:
        instructions: list[Instruction] = []
        jumps: list[tuple[int, str]] = []
        labels: dict[str, int] = {}
        name, arguments = "", ""
        for line in part.splitlines():
            if found := LABEL.match(line):
                labels[found[1]] = len(instructions)
            elif found := LINE.match(line):
                name, arguments = found[1], found[2]
            elif name and (found := CONTROL.match(line)):
                bits = int(found[1], 16)
                if name.startswith("BRA") and (target := re.search(r"\((\.L\w+)\)", arguments)):
                    jumps.append((len(instructions), target[1]))
                instructions.append(Instruction(name, bits >> 41 & 15, bits >> 46 & 7, bits >> 49 & 7, bits >> 52 & 63))
                name = ""
        found_loops = [(labels[target], at) for at, target in jumps if labels.get(target, at + 1) <= at]
        for begin, end in found_loops:
            inside = [(b, e) for b, e in found_loops if (b, e) != (begin, end) and begin <= b and e <= end]
            nested = {i for b, e in inside for i in range(b, e + 1)}
            yield Loop(part.split(",")[0], [instructions[i] for i in range(begin, end + 1) if i not in nested])


class _Warp:
    def __init__(self, number: int) -> None:
        self.at, self.iteration, self.ready, self.issued = 0, 0, number, 0
        self.free = [0] * SCOREBOARDS
        self.marks: list[int] = []


def cycles(body: list[Instruction], warps: int, memory_cycles: int) -> float:
    """Cycles of an iteration where ``warps`` share a scheduler and a load takes ``memory_cycles``."""
    running = [_Warp(number) for number in range(warps)]
    held: dict[str, int] = {}
    now = 0
    while any(warp.iteration < ITERATIONS for warp in running):
        able = [warp for warp in running if _can_issue(warp, body, held, now)]
        if able:
            _issue(min(able, key=lambda warp: warp.issued), body, held, now, memory_cycles)
        now += 1
    return sum((warp.marks[-1] - warp.marks[WARM_UP - 1]) / (ITERATIONS - WARM_UP) for warp in running) / warps


def _can_issue(warp: _Warp, body: list[Instruction], held: dict[str, int], now: int) -> bool:
    if warp.iteration >= ITERATIONS or warp.ready > now:
        return False
    instruction = body[warp.at]
    if any(instruction.waits >> board & 1 and warp.free[board] > now for board in range(SCOREBOARDS)):
        return False
    return held.get(_first(PIPES, instruction.name)[0], 0) <= now


def _issue(warp: _Warp, body: list[Instruction], held: dict[str, int], now: int, memory_cycles: int) -> None:
    instruction = body[warp.at]
    pipe, busy = _first(PIPES, instruction.name)
    held[pipe], warp.issued = now + busy, now + 1
    latency = memory_cycles if instruction.name.startswith("LDG") else _first(LATENCIES, instruction.name)
    for board, wait in ((instruction.sets, latency), (instruction.reads, READ_CYCLES)):
        if board < SCOREBOARDS:
            warp.free[board] = max(warp.free[board], now + wait)
    warp.ready = now + max(1, instruction.stall)
    warp.at += 1
    if warp.at == len(body):
        warp.at, warp.iteration = 0, warp.iteration + 1
        warp.marks.append(now)


def _first(table: Sequence[tuple[tuple[str, ...], Value]], name: str) -> Value:
    return next(value for names, value in table if name.startswith(names))
