"""Model of the CUDA kernels' times on an A100 and an H100, from their compiled code. Nothing of it has run on a GPU.

Usage: ``python tools/cuda_model.py [--json bench/results/cuda_model.json]``; needs nvcc, nvdisasm and a C++ compiler,
and no GPU. ``make cuda-model`` calls it.

- The interpreter of tests/cuda_ptx runs each operation on Gaussian values and counts instructions of warps, bytes and
  sectors. Counts of two sizes give those of larger tensors.
- ptxas's schedule, replayed by tools/cuda_schedule.py, gives the cycles of a turn of a kernel's hot loops. The
  interpreter counts the turns of the longest warp. Instructions outside these loops, in PTX, get as many cycles as
  those inside, in SASS. Kernels that have no loop of that kind get OTHER_CYCLES.
- A kernel takes the longest of: the instructions of one warp, with those of its scheduler; the sectors that it touches,
  through the first-level cache; the bytes that it must move, through memory. Kernels follow each other.
- Latencies, clocks and bandwidths are data sheets' and guesses. +-30 % is a guess, too.
- V100 is left out: the code of CUDA 13 begins at sm_75, and sm_70's would come from another compiler.

Example::

    $ python tools/cuda_model.py --json build/cuda_model.json
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from cuda_check import CUDA, FLAGS, ROOT, hot_loop, kernel_name, run
from cuda_schedule import Instruction, Loop, cycles, loops

sys.path.insert(0, str(ROOT / "tests/cuda_ptx"))

import ptx_build


class Gpu(NamedTuple):
    """Assumed figures of a GPU."""

    architecture: int  # of the code
    processors: int
    gigahertz: float
    memory_gb_per_s: float
    l2_bytes: float
    l2_cycles: int  # of a load
    memory_cycles: int


class Operation(NamedTuple):
    """Arguments of count_work, the last below and from LARGE_VALUES on, and bytes of a value that kernels must move."""

    operation: str
    coding: str
    packets: int
    steps: tuple[int, int]
    bytes_a_value: dict[str, float]

    @property
    def floor_bytes(self) -> float:
        """The same for the operation, where no byte is moved twice."""
        return max(self.bytes_a_value.values())


class Signature(NamedTuple):
    """What a turn of a loop has in PTX and in SASS alike: votes, and loads and stores of global memory."""

    votes: int
    loads: int
    stores: int


class Turn(NamedTuple):
    """A hot loop's instructions, the values of a lane in a turn, and how the loop is found in PTX."""

    body: list[Instruction]
    values: int
    signature: Signature


class LongestWarp(NamedTuple):
    """PTX instructions of a kernel's longest warp, and of them turns and instructions in loops."""

    instructions: float
    loops: dict[Signature, tuple[float, float]]


GPUS = {
    "A100": Gpu(80, 108, 1.41, 1555, 40e6, 250, 470),
    "H100": Gpu(90, 132, 1.755, 3350, 50e6, 270, 600),
}
LAUNCH_MICROSECONDS = 1.5  # from the end of a kernel to the begin of the next; clears, too
OTHER_CYCLES = 6.0  # of an instruction, in kernels without a hot loop
L1_CYCLES = 40  # of a load that the first-level cache answers
# A checksum is verified before a block is decoded, so its bytes are in the first-level cache then, as are its codes.
READ_FROM_L1 = {"decode_packets", "sum_packets", "decode_run_blocks"}
L1_BYTES = 64  # a cycle, of a processor
ASSUMED = {
    "gpus": {name: gpu._asdict() for name, gpu in GPUS.items()},
    "launch_microseconds": LAUNCH_MICROSECONDS,
    "cycles_of_other_instructions": OTHER_CYCLES,
    "l1_cycles_in_decoding": L1_CYCLES,
    "l1_bytes_a_cycle": L1_BYTES,
}
TOLERANCE = 0.3
LARGE_VALUES = 1 << 24  # LARGE_ELEMENTS of qcomm/codec/packet.py
PAIR_STEPS, RUN_STEPS = (128, 256), (256, 512)  # below it and from it on: _block_steps of the hook
OPERATIONS = {
    "encode": Operation("encode", "pair", 1, PAIR_STEPS, {"measure_tensors": 4, "encode_blocks": 4}),
    "encode, residual": Operation("encode_ef", "pair", 1, PAIR_STEPS, {"measure_tensors": 8, "encode_blocks": 12}),
    "decode": Operation("decode", "pair", 1, PAIR_STEPS, {"decode_packets": 4}),
    "sum of 8 packets": Operation("sum", "pair", 8, PAIR_STEPS, {"sum_packets": 4 / 8}),
    "encode, zero runs, residual": Operation(
        "encode_ef", "runs", 1, RUN_STEPS, {"measure_tensors": 8, "encode_run_blocks": 12}
    ),
    "decode, zero runs": Operation("decode", "runs", 1, RUN_STEPS, {"decode_run_blocks": 4}),
}
MEBIBYTES = (1, 25, 100)
COUNTED_VALUES = (1 << 18, 1 << 20)
COUNT_ARCHITECTURE = "80"
SCHEDULERS = 4  # of a processor
REPLAYED_WARPS = 4  # of a scheduler; more are taken to share it without loss
FILES = ("statistics", "encode", "decode", "sum", "zero_runs_encode", "zero_runs_decode")
CLEAR = "cudaMemsetAsync"  # counted beside the kernels
Counts = dict[str, dict[str, float]]
Longest = dict[str, LongestWarp]
Rate = Callable[[str, int], float]  # cycles of a PTX instruction, by kernel and warps of the scheduler


def count(program: Path, texts: Path, operation: Operation, values: int, steps: int) -> tuple[int, Counts, Longest]:
    """Bytes of the packets, and counts and longest warp by kernel."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "counts.json"
        environment = {**os.environ, "CUDA_PTX_FILES": str(texts), "CUDA_PTX_COUNTS": str(file)}
        words = [operation.operation, operation.coding, str(values), str(steps), str(operation.packets)]
        done = subprocess.run([program, *words], env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{program} {' '.join(words)}\n{done.stderr}")
        found = {kernel_name(name): row for name, row in json.loads(file.read_text()).items()}
    longest: Longest = {}
    for name, row in found.items():
        loops: dict[Signature, tuple[float, float]] = {}
        for loop in row.pop("loops"):
            key = Signature(loop["votes"], loop["loads"], loop["stores"])
            turns, instructions = loops.get(key, (0, 0))
            loops[key] = turns + loop["turns"], instructions + loop["instructions"]
        longest[name] = LongestWarp(row["longest_warp"], loops)
    return int(done.stdout), found, longest


def at_size(small: Counts, large: Counts, sizes: tuple[int, int], values: float) -> Counts:
    """Counts of a size, from those of ``sizes``: on the line through them; the longest warp's by the logarithm."""
    share = (values - sizes[0]) / (sizes[1] - sizes[0])
    slow = math.log(values / sizes[0]) / math.log(sizes[1] / sizes[0])
    return {
        kernel: {
            name: number + (slow if name == "longest_warp" else share) * (large[kernel][name] - number)
            for name, number in row.items()
        }
        for kernel, row in small.items()
    }


def hot_turn(loop: Loop, kernel: str, file: str) -> tuple[str, int]:
    """Which hot loop of a kernel it is, and the values of a lane in a turn; "" for others."""
    votes, loads, stores, looked_up = (loop.count(name) for name in ("VOTE", "LDG", "ST", "LDS"))
    adjusted = "adjusted" in kernel
    if file in {"encode", "decode"}:
        known = hot_loop(loop, file, adjusted)
        return (known, {"pair": 8, "residual": 16}[known]) if known in {"pair", "residual"} else ("", 0)
    if file == "statistics" and loads == (16 if adjusted else 8) and votes + stores + looked_up == 0:
        return "values", 8
    if file == "sum" and votes == stores == 4 and looked_up == 16 and loads == 0 and not adjusted:
        return "pair", 8
    if file == "zero_runs_encode" and votes == 16 and loads == stores == 32:
        return "values", 16
    if file == "zero_runs_encode" and votes == loads == stores == 4 and looked_up == 8:
        return "tokens", 4
    if file == "zero_runs_decode" and votes == 4 and loads == 0 and looked_up == 8:
        return "tokens", 4
    return "", 0


def hot_turns(listing: str, file: str) -> dict[str, dict[str, Turn]]:
    """By kernel of float32, and by name."""
    found: dict[str, dict[str, Turn]] = {}
    for loop in loops(listing):
        kernel = kernel_name(loop.kernel)
        name, values = hot_turn(loop, kernel, file) if "<float32" in kernel else ("", 0)
        if name:
            # Generic loads are of codes, which the first-level cache has: they take as long as shared memory.
            body = [step._replace(name="LDS") if step.name.startswith("LD.") else step for step in loop.body]
            signature = Signature(loop.count("VOTE"), loop.count("LDG"), loop.count("STG"))
            found.setdefault(kernel, {}).setdefault(name, Turn(body, values, signature))
    return found


def compiled_turns(nvcc: str, nvdisasm: str, architecture: int, files: tuple[str, ...]) -> dict[str, dict[str, Turn]]:
    """The hot loops of ``files`` in SASS."""
    turns: dict[str, dict[str, Turn]] = {}
    with tempfile.TemporaryDirectory() as name:
        for file in files:
            cubin = Path(name) / f"{file}.cubin"
            code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
            run(nvcc, *FLAGS, code, "-cubin", "-o", cubin, CUDA / f"{file}.cu")
            found = hot_turns(run(nvdisasm, "-c", "-hex", cubin), file)
            if not found:
                sys.exit(f"cuda_model: no hot loop of {file}.cu was found in SASS for sm_{architecture}")
            turns |= found
    return turns


def rate_of(turns: dict[str, dict[str, Turn]], longest: Longest, load_cycles: int) -> Rate:
    """Cycles of a PTX instruction of one warp, where a load takes ``load_cycles``."""
    known: dict[tuple[str, int], float] = {}

    def rate(kernel: str, warps: int) -> float:
        loops = list(turns.get(kernel, {}).values())
        warp = longest[kernel]
        counted = [warp.loops.get(loop.signature, (0.0, 0.0)) for loop in loops]
        sass = sum(n * len(loop.body) for loop, (n, _) in zip(loops, counted, strict=True))
        if sass == 0:  # it has no hot loop, or nothing to do for it
            return max(OTHER_CYCLES, float(warps))
        if (kernel, warps) not in known:
            load = L1_CYCLES if kernel.split("<", maxsplit=1)[0] in READ_FROM_L1 else load_cycles
            in_loops = sum(n * cycles(loop.body, warps, load) for loop, (n, _) in zip(loops, counted, strict=True))
            others = warp.instructions - sum(instructions for _, instructions in counted)
            known[kernel, warps] = in_loops * (1 + others / sass) / warp.instructions
        return known[kernel, warps]

    return rate


def warp_microseconds(kernel: str, row: dict[str, float], gpu: Gpu, rate: Rate) -> float:
    """Time of the longest warp beside others of its scheduler, and of one wave of them after the other.

    Where it has more to do than the mean warp, it does the rest alone.
    """
    of_block = row["warps"] / row["blocks"]
    warps = max(1, math.ceil(math.ceil(row["blocks"] / gpu.processors) * of_block / SCHEDULERS))
    together = min(warps, REPLAYED_WARPS)
    shared = row["instructions"] / row["warps"] * warps / together
    alone = max(0.0, row["longest_warp"] - shared)
    low, high = rate(kernel, 1), rate(kernel, REPLAYED_WARPS) if together > 1 else 0.0
    each = low if together == 1 else low + (high - low) * (together - 1) / (REPLAYED_WARPS - 1)
    return (shared * each + alone * low) / gpu.gigahertz / 1e3


def kernel_microseconds(kernel: str, row: dict[str, float], moved: float, gpu: Gpu, rate: Rate) -> float:
    """The longest of three bounds; ``moved``: bytes, through memory."""
    l1_gb_per_s = L1_BYTES * gpu.processors * gpu.gigahertz
    sectors = row["load_sectors"] + row["store_sectors"]
    return max(
        warp_microseconds(kernel, row, gpu, rate), 32 * sectors / l1_gb_per_s / 1e3, moved / gpu.memory_gb_per_s / 1e3
    )


def model_row(
    name: str, values: int, packets: float, counts: Counts, gpu: Gpu, rates: dict[int, Rate]
) -> dict[str, object]:
    """One operation on one GPU. ``packets``: their bytes; ``rates``: by a load's cycles."""
    operation = OPERATIONS[name]
    floor_bytes = packets + values * operation.floor_bytes
    rate = rates[gpu.l2_cycles if floor_bytes < gpu.l2_bytes else gpu.memory_cycles]
    times = {}
    for kernel, row in counts.items():
        if kernel == CLEAR:
            continue
        plain = kernel.split("<")[0]
        codes = {"measure_tensors": 0, "write_payload": 2, "write_run_blocks": 2}.get(plain, 1)
        moved = values * operation.bytes_a_value.get(plain, 0)
        if plain in {*operation.bytes_a_value, "write_payload", "write_run_blocks"}:
            moved += codes * packets
        times[kernel] = kernel_microseconds(kernel, row, moved, gpu, rate)
    between = sum(row["launches"] for row in counts.values()) * LAUNCH_MICROSECONDS
    return {
        "microseconds": round(sum(times.values()) + between, 1),
        "memory_floor": round(floor_bytes / gpu.memory_gb_per_s / 1e3, 1),
        "between_kernels": round(between, 1),
        "by_kernel": {kernel: round(time, 1) for kernel, time in times.items()},
    }


def find_nvdisasm() -> str | None:
    """The toolkit's, or that of the package nvidia-cuda-nvdisasm."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = find_spec("nvidia")
    roots = spec.submodule_search_locations if spec else None
    return next((str(path) for root in roots or [] for path in Path(root).glob("*/bin/nvdisasm")), None)


def report(program: Path, texts: Path, turns: dict[str, dict[str, dict[str, Turn]]]) -> dict[str, object]:
    """Everything that the JSON holds. ``turns``: by GPU."""
    rows, per_value = [], {}
    for name, operation in OPERATIONS.items():
        for is_large, steps in enumerate(operation.steps):
            sizes = [mebibytes << 18 for mebibytes in MEBIBYTES]
            (few, small, _), (many, large, longest) = (
                count(program, texts, operation, n, steps) for n in COUNTED_VALUES
            )
            rates = {
                gpu_name: {load: rate_of(turns[gpu_name], longest, load) for load in (gpu.l2_cycles, gpu.memory_cycles)}
                for gpu_name, gpu in GPUS.items()
            }
            if not is_large:
                per_value[name] = {
                    k: round(32 * row["instructions"] / COUNTED_VALUES[1], 2) for k, row in large.items()
                }
            for values in [n for n in sizes if (n >= LARGE_VALUES) == is_large]:
                counts = at_size(small, large, COUNTED_VALUES, values)
                packets = few + (many - few) * (values - COUNTED_VALUES[0]) / (COUNTED_VALUES[1] - COUNTED_VALUES[0])
                for gpu_name, gpu in GPUS.items():
                    row = model_row(name, values, packets, counts, gpu, rates[gpu_name])
                    rows.append({"operation": name, "mebibytes": values >> 18, "gpu": gpu_name, **row})
    kernels = ("csrc", ":!*.md")
    changed = subprocess.run(["git", "-C", ROOT, "diff", "--quiet", "HEAD", "--", *kernels], check=False).returncode
    commit = run("git", "-C", ROOT, "log", "-1", "--format=%h", "--", *kernels).strip()
    return {
        "measured": "nothing: no kernel has run on a GPU",
        "commit": commit + ("-dirty" if changed else ""),  # of the kernels
        "date": datetime.now(timezone.utc).date().isoformat(),
        "tolerance": TOLERANCE,
        "assumed": ASSUMED,
        "left_out": {"V100": "CUDA 13 has no sm_70"},
        "ptx_instructions_of_32_values": per_value,
        "hot_loops": {
            f"sm_{GPUS[gpu].architecture}": {
                f"{kernel} {name}": round(len(turn.body) / turn.values, 1)
                for kernel, named in found.items()
                for name, turn in named.items()
            }
            for gpu, found in turns.items()
        },
        "rows": rows,
    }


def main() -> None:
    """Prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="a file for the table and what it was made from")
    arguments = parser.parse_args()
    nvcc, nvdisasm = shutil.which("nvcc"), find_nvdisasm()
    if reason := ptx_build.reason_to_skip():
        sys.exit(f"cuda_model: {reason}")
    if nvcc is None or nvdisasm is None:
        sys.exit("cuda_model: there is no nvdisasm; pip install nvidia-cuda-nvdisasm")
    turns = {name: compiled_turns(nvcc, nvdisasm, gpu.architecture, FILES) for name, gpu in GPUS.items()}
    program, texts = ptx_build.build_counter(ROOT / "build/cuda_ptx", COUNT_ARCHITECTURE)
    result = report(program, texts, turns)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print("Nothing has run on a GPU. Assumed:", json.dumps(result["assumed"]))
    print(f"Microseconds by the model, +-{TOLERANCE:.0%} by a guess, and those that memory alone takes:")
    for row in result["rows"]:  # type: ignore[attr-defined]
        print("{operation:28} {mebibytes:4} MiB  {gpu}  {microseconds:8.1f}  {memory_floor:8.1f}".format(**row))


if __name__ == "__main__":
    main()
