"""Builds ``ptx_kernels``: the tests of tests/cuda_emulation over kernels that nvcc compiled, and their interpreter.

The host's part of csrc/cuda is in nvcc's objects as it is in the module. The interpreter beside this file takes the
place of the CUDA runtime: ``machine.h`` says how it runs a kernel. Nothing here needs a GPU, and ptxas, which makes a
GPU's instructions of PTX, has no part in it.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_emulation"))

import emulation_build as emulation

ROOT = emulation.ROOT
HERE = Path(__file__).parent
ARCHITECTURES = ("75", "80", "90")
# As CMake compiles the kernels; the host's part is not in a hurry.
NVCC_FLAGS = ["-std=c++17", "-O1", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc/include'}"]
ARITHMETIC = "-fmad=false"
# Products and sums of floating point are not contracted, in PTX as in the core.
INTERPRETER_FLAGS = ["-O3", "-ffp-contract=off", f"-I{HERE}"]
TEST_FLAGS = ["-O1", f"-I{HERE}"]
LINK_FLAGS = ["-fsanitize=address", "-pthread"]  # the runtime alone: memory.cpp asks it
Job = tuple[Path, Path, list[str]]


def reason_to_skip() -> str | None:
    """Why nothing can be built here."""
    if emulation.compiler() is None:
        return "there is no C++ compiler"
    return None if shutil.which("nvcc") else "there is no nvcc on the PATH"


def build(folder: Path, architecture: str) -> tuple[Path, Path]:
    """The program and its folder of PTX, in ``folder``; objects that are newer than every source are kept.

    Args:
        folder: for objects and programs of all architectures; the CPU codec's lie in ``cuda_emulation`` beside it.
        architecture: one of ``ARCHITECTURES``, of whose virtual processor the PTX is.
    """
    jobs = [
        (path, folder / "tests" / f"{path.name}.o", TEST_FLAGS)
        for path in sorted((ROOT / "tests/cuda_emulation").glob("*.cpp"))
        if path.name != "test_emulation.cpp"  # test_interpreter.cpp takes its place
    ]
    return _build(folder, architecture, "ptx_kernels", [*jobs, *_interpreter_jobs(folder, with_tests=True)])


def build_counter(folder: Path, architecture: str) -> tuple[Path, Path]:
    """``count_work``, which runs one operation for its counts, and its folder of PTX; arguments as of ``build``."""
    job = (HERE / "counter/count_work.cpp", folder / "counter/count_work.cpp.o", TEST_FLAGS)
    return _build(folder, architecture, "count_work", [job, *_interpreter_jobs(folder, with_tests=False)])


def _interpreter_jobs(folder: Path, *, with_tests: bool) -> list[Job]:
    return [
        (path, folder / "interpreter" / f"{path.name}.o", INTERPRETER_FLAGS)
        for path in sorted(HERE.glob("*.cpp"))
        if with_tests or not path.name.startswith("test_")
    ]


def _build(folder: Path, architecture: str, name: str, jobs: Sequence[Job]) -> tuple[Path, Path]:
    mine = folder / f"compute_{architecture}"
    kernels = [(path, mine / path.stem) for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    jobs = [*emulation.cpu_jobs(folder.parent / "cuda_emulation"), *jobs]
    program, texts = mine / name, mine / "ptx"
    with emulation.locked(folder):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = [pool.submit(_compile_kernels, source, target, architecture) for source, target in kernels]
            list(pool.map(emulation.compile_source, jobs))
            objects = [future.result() for future in compiled]
        texts.mkdir(exist_ok=True)
        for source, target in kernels:
            shutil.copyfile(target / f"{source.stem}.ptx", texts / f"{source.stem}.ptx")
        emulation.link(program, [*(target for _, target, _ in jobs), *objects], LINK_FLAGS)
    return program, texts


def contracted(source: Path, target: Path, architecture: str) -> None:
    """PTX of one file as the default of nvcc has it, which makes one rounding of a product and a sum."""
    _nvcc(["-fmad=true", "-ptx", f"-arch=compute_{architecture}", "-o", str(target), str(source)])


def _compile_kernels(source: Path, folder: Path, architecture: str) -> Path:
    """An object whose kernels are PTX alone, which nvcc keeps as a text beside it."""
    target = folder / f"{source.stem}.o"
    if emulation.is_current(source, target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    kept = ["--keep", "--keep-dir", str(folder)]
    code = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"
    _nvcc([ARITHMETIC, code, *kept, "-c", "-o", str(target), str(source)])
    return target


def _nvcc(arguments: Sequence[str]) -> None:
    done = subprocess.run(["nvcc", *NVCC_FLAGS, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc {' '.join(arguments)}\n{done.stdout}{done.stderr}")
