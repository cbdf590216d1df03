"""Checks of the CUDA kernels without a GPU: that they compile, with how many registers and instructions.

Usage: ``python tools/cuda_check.py [--json bench/results/cuda_build.json]``; needs nvcc. ``make cuda-check`` calls it.

- nvcc compiles every kernel for sm_75, sm_80, sm_90 and PTX, all warnings being errors; a spilled register is an error.
- NVRTC 12.9 compiles them for sm_70, which newer toolkits have dropped, where nvidia-cuda-nvrtc-cu12 and
  nvidia-cuda-cccl-cu12 are importable.
- nvdisasm (nvidia-cuda-nvdisasm, or the toolkit's) counts the instructions of the inner loops per symbol for sm_90:
  those between a loop's first and last, without the loops inside it, which are for escapes. Rare branches count. From
  the schedule that ptxas wrote beside them follow cycles (cuda_schedule.py), which assume latencies.
"""

import argparse
import ctypes
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from cuda_schedule import Loop, cycles, loops

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc/cuda"
KERNELS = ("statistics", "sample", "histogram", "code_lengths", "encode", "layout", "payload", "residual",
           "zero_runs_place", "zero_runs_encode", "zero_runs_payload", "read_packets", "decode_tables", "decode",
           "zero_runs_decode", "sum", "account", "runs")  # fmt: skip
HOST = ("encode_plan", "decode_plan")
ARCHITECTURES = (75, 80, 90)
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc/include'}"]
DTYPES = {"0": "float32", "1": "float16", "2": "bfloat16", "3": "float64"}
# NVRTC has no C++ library of its own.
STANDARD_HEADERS = {
    "cstdint": "#include <cuda/std/cstdint>\nnamespace std { using namespace cuda::std; }",
    "cstddef": "#include <cuda/std/cstddef>\nnamespace std { using namespace cuda::std; }",
    "cstring": "",
    "limits": "#include <cuda/std/limits>\nnamespace std { using namespace cuda::std; }",
    "type_traits": "#include <cuda/std/type_traits>\nnamespace std { using namespace cuda::std; }",
    "vector": "#pragma once\nnamespace std { template <class T> class vector { public: bool empty() const; "
    "T operator[](unsigned long) const; }; }",
}
# What the host's compiler, and nvcc with it, has built in.
BUILTINS = [f"-D__builtin_{name}={name}" for name in ("fma", "fmin", "fmax", "floor", "sqrt", "isfinite")]
BUILTINS += ["-D__BYTE_ORDER__=1234", "-D__ORDER_LITTLE_ENDIAN__=1234"]


def run(*command: str | Path) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def kernel_name(mangled: str) -> str:
    """``encode_blocks<float32, adjusted>`` of a kernel's mangled name."""
    found = re.search(r"\d(measure_tensors|sample_tensors|count_segments|make_codes|encode_blocks|layout_packets|"
                      r"write_payload|update_range_residuals|read_packets|check_pieces|make_decode_tables|"
                      r"decode_packets|sum_packets|count_encoding|copy_runs|add_runs|place_runs|"
                      r"encode_run_blocks|write_run_blocks|decode_run_blocks)(.*)",
                      mangled)  # fmt: skip
    if found is None:
        return mangled
    dtype = re.search(r"DTypeE(\d)E", found[2])
    adjusted = ", adjusted" if "Lb1E" in found[2] else ""
    return f"{found[1]}<{DTYPES[dtype[1]]}{adjusted}>" if dtype else found[1]


def resources(log: str) -> Iterator[dict[str, object]]:
    """Of every kernel in ptxas's report."""
    for part in log.split("Compiling entry function '")[1:]:
        numbers = {
            "registers": r"Used (\d+) registers",
            "spill_store_bytes": r"(\d+) bytes spill stores",
            "spill_load_bytes": r"(\d+) bytes spill loads",
        }
        found = {name: re.search(pattern, part) for name, pattern in numbers.items()}
        architecture = re.search(r"for '(sm_\d+)'", part)
        yield {
            "kernel": kernel_name(part.split("'")[0]),
            "architecture": architecture[1] if architecture else "",
            **{name: int(match[1]) if match else 0 for name, match in found.items()},
        }


def compile_all(nvcc: str, folder: Path) -> list[dict[str, object]]:
    """Compiles every file for every architecture."""
    rows: list[dict[str, object]] = []
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    targets.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
    for name in KERNELS + HOST:
        options = [*FLAGS, "-Werror", "all-warnings", "-Xptxas", "-v", "--threads", "2", *targets]
        log = run(nvcc, *options, "-c", CUDA / f"{name}.cu", "-o", folder / f"{name}.o")
        rows += resources(log)
    return rows


def compile_for_volta() -> dict[str, object]:
    """Every kernel through NVRTC 12.9, for sm_70."""
    found = {}
    for package, sub in (("nvidia.cuda_nvrtc", "lib/libnvrtc.so.12"), ("nvidia.cuda_cccl", "include"),
                         ("nvidia.cuda_runtime", "include")):  # fmt: skip
        try:
            spec = find_spec(package)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            return {"skipped": f"{package} is not installed"}
        found[package] = Path(next(iter(spec.submodule_search_locations))) / sub
    nvrtc = ctypes.CDLL(str(found["nvidia.cuda_nvrtc"]))
    options = ["--gpu-architecture=sm_70", "-std=c++17", "-default-device", "--fmad=false", *BUILTINS,
               *(f"-I{path}" for path in (ROOT / "csrc/include", CUDA, *list(found.values())[1:]))]  # fmt: skip
    sizes = {}
    for name in KERNELS:
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        names = (ctypes.c_char_p * len(STANDARD_HEADERS))(*(n.encode() for n in STANDARD_HEADERS))
        texts = (ctypes.c_char_p * len(STANDARD_HEADERS))(*(t.encode() for t in STANDARD_HEADERS.values()))
        source = (CUDA / f"{name}.cu").read_bytes() + INSTANCES.get(name, "").encode()
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, f"{name}.cu".encode(), len(names), texts, names)
        arguments = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), arguments) != 0:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            sys.exit(f"NVRTC, {name}.cu for sm_70:\n{log.value.decode()}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        sizes[name] = size.value
    return {"architecture": "sm_70", "cubin_bytes": sizes}


# Templates are compiled where they are used, which is in launchers that NVRTC does not see.
TRAITS = ("Traits<DType::kFloat32>", "Traits<DType::kFloat16>", "Traits<DType::kBFloat16>", "Traits<DType::kFloat64>")


def _instances(kernel: str, arguments: str, flags: tuple[str, ...]) -> str:
    rows = [f"template __global__ void {kernel}<{t}{flag}>({arguments});" for t in TRAITS for flag in flags
            if flag != ", true" or t in (TRAITS[0], TRAITS[3])]  # fmt: skip
    return "\nnamespace qcomm::cuda { namespace {\n" + "\n".join(rows) + "\n} }\n"


INSTANCES = {
    "statistics": _instances("measure_tensors", "EncodeTables, TileStatistics*", (", false", ", true")),
    "sample": _instances("sample_tensors", "EncodeTables", (", false", ", true")),
    "histogram": _instances("count_segments", "EncodeTables", (", false", ", true")),
    "encode": _instances("encode_blocks", "EncodeTables", (", false", ", true")),
    "payload": _instances("write_payload", "EncodeTables", (", false", ", true")),
    "residual": _instances("update_range_residuals", "EncodeTables", (", false", ", true")),
    "read_packets": _instances("read_packets", "DecodeTables", ("",)),
    "decode": _instances("decode_packets", "DecodeTables, int", ("",)),
    "sum": _instances("sum_packets", "DecodeTables, int, bool", (", false", ", true")),
    "zero_runs_encode": _instances("encode_run_blocks", "EncodeTables", ("",)),
    "zero_runs_payload": _instances("write_run_blocks", "EncodeTables", ("",)),
    "zero_runs_decode": _instances("decode_run_blocks", "DecodeTables, int", ("",)),
    "runs": _instances("copy_runs", "const RunTask*, int, double, const double*, const unsigned*", ("",))
    + _instances("add_runs", "const RunTask*, int, const Quantizer*, const std::uint8_t*, const double*, bool", ("",)),
}


def schedules(nvcc: str, nvdisasm: str, folder: Path) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
    """Of float32's hot loops: instructions a symbol, and cycles of a turn by ptxas's schedule with 1 and 4 warps.

    A turn of `encode_blocks` and `decode_packets` has four steps; `pair` ones treat two symbols a lane and step. A turn
    of the second pass writes 16 rows of residuals.
    """
    instructions: dict[str, float] = {}
    turns: dict[str, dict[str, int]] = {}
    for name in ("encode", "decode"):
        cubin = folder / f"{name}.cubin"
        run(nvcc, *FLAGS, "-gencode=arch=compute_90,code=sm_90", "-cubin", "-o", cubin, CUDA / f"{name}.cu")
        for loop in loops(run(nvdisasm, "-c", "-hex", cubin)):
            kernel = kernel_name(loop.kernel)
            if not kernel.startswith(("encode_blocks<float32", "decode_packets<float32")):
                continue
            what = hot_loop(loop, name, "adjusted" in kernel)
            if not what:
                continue
            if symbols := SYMBOLS.get(what):
                instructions[f"{kernel} {what}"] = round(len(loop.body) / symbols, 1)
            turns[f"{kernel} {what}"] = {
                f"{place}, {warps} warps": round(cycles(loop.body, warps, memory))
                for place, memory in MEMORY_CYCLES.items()
                for warps in (1, 4)
            }
    wanted = [f"{k} {c}" for k in ("encode_blocks<float32>", "encode_blocks<float32, adjusted>",
                                   "decode_packets<float32>") for c in ("pair", "single")]  # fmt: skip
    wanted.append("encode_blocks<float32, adjusted> residual")
    if missing := [name for name in wanted if name not in turns]:
        sys.exit(f"cuda_check: these loops were not found in SASS: {missing}")
    return instructions, turns


STEPS = 4
SYMBOLS = {"single": STEPS, "pair": 2 * STEPS}  # of a lane in a turn
MEMORY_CYCLES = {"L1": 40, "L2": 270, "memory": 600}  # assumed, of an H100


def hot_loop(loop: Loop, file: str, adjusted: bool) -> str:
    """Which loop of a file it is; "" for others."""
    votes, loads, looked_up = loop.count("VOTE"), loop.count("LDG"), loop.count("LDS")
    if file == "encode" and loop.count("DADD", "DMUL", "DFMA") == 0:
        if adjusted and votes == 0 and loads == 32 and loop.count("ST") == 16:
            return "residual"
        if votes == STEPS + 1 and looked_up == STEPS:
            if loop.count("LDG.E.64") == STEPS * (2 if adjusted else 1):
                return "pair"  # where pairs are aligned, so that their two values are one load
            return "single" if loads == STEPS * (2 if adjusted else 1) else ""
    # Words, entries and values are looked up in shared memory; where the latter are computed it is another loop.
    if file == "decode" and votes == STEPS and loads == 0 and loop.count("STG") == STEPS:
        return {4 * STEPS: "pair", 3 * STEPS: "single"}.get(looked_up, "")
    return ""


def main() -> None:
    """Prints a summary and writes it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("cuda_check: nvcc is not on the PATH")
    nvdisasm = shutil.which("nvdisasm")
    if nvdisasm is None and find_spec("nvidia") is not None:
        roots = find_spec("nvidia").submodule_search_locations or []  # type: ignore[union-attr]
        nvdisasm = next((str(p) for r in roots for p in Path(r).glob("*/bin/nvdisasm")), None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kernels = compile_all(nvcc, folder)
        volta = compile_for_volta()
        skipped = {"skipped": "there is no nvdisasm"}
        counts, turns = schedules(nvcc, nvdisasm, folder) if nvdisasm else (skipped, skipped)
    release = re.search(r"release ([\d.]+)", run(nvcc, "--version"))
    report = {
        "nvcc": release[1] if release else "",
        "kernels": kernels,
        "volta": volta,
        "instructions_per_symbol": {"architecture": "sm_90", "goal_encode": 24, "goal_decode": 20, **counts},
        "cycles_per_turn": {"architecture": "sm_90", "cycles_of_loads": MEMORY_CYCLES, **turns},
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    for row in kernels:
        print("{kernel:45} {architecture:7} {registers:4} registers, {spill_store_bytes} bytes spilled".format(**row))
    print("sm_70:", volta)
    print("instructions per symbol:", counts)
    for loop, found in turns.items():
        print("cycles a turn:", loop, found)
    spilled = [row for row in kernels if row["spill_store_bytes"] or row["spill_load_bytes"]]
    if spilled:
        sys.exit(f"cuda_check: {len(spilled)} kernels spill registers")


if __name__ == "__main__":
    main()
