"""Builds ``emulated_kernels``: the kernels of csrc/cuda, the CPU codec and the tests beside this file, for the host."""

import fcntl
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-Wno-unknown-pragmas", "-DQCOMM_CUDA_EMULATION"]
INCLUDES = [f"-I{ROOT / path}" for path in ("csrc/include", "csrc/cpu", "csrc/cuda", "tests/cuda_emulation")]
MODULE_FLAGS = ["-O1", "-fPIC", "-fvisibility=hidden"]
SANITIZERS = {
    # Not all of UndefinedBehaviorSanitizer: what a GPU is hurt by, too. The rest doubles the time to compile.
    "address": "address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "thread": "thread",
}


def compiler() -> str | None:
    """The system's C++ compiler."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(folder: Path, sanitizer: str, plant: str | None = None) -> Path:
    """The program, in ``folder``; objects that are there and newer than every source are kept.

    Args:
        folder: for objects and programs; shared by all variants.
        sanitizer: a key of ``SANITIZERS``.
        plant: a macro that plants an error. Only the sources that it occurs in, or whose headers it occurs in, differ.
    """
    # ThreadSanitizer's input is tiny, so its program need not be fast.
    flags = [
        "-O0" if sanitizer == "thread" else "-O1",
        f"-fsanitize={SANITIZERS[sanitizer]}",
        "-fno-sanitize-recover=all",
    ]
    mine = sorted((ROOT / "csrc/cuda").glob("*.cu")) + sorted((ROOT / "tests/cuda_emulation").glob("*.cpp"))
    jobs = cpu_jobs(folder)
    for path in mine:
        planted = plant is not None and plant in _with_headers(path)
        variant = f"{sanitizer}-{plant}" if planted else sanitizer
        jobs.append((path, folder / variant / f"{path.name}.o", [*flags, *([f"-D{plant}"] if planted else [])]))
    program = folder / f"emulated_kernels-{sanitizer}{'-' + plant if plant else ''}"
    with locked(folder):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_source, jobs))
        link(program, [target for _, target, _ in jobs], [*flags, "-pthread"])
    return program


def build_module(folder: Path, includes: Sequence[str]) -> Path:
    """``qcomm._cuda`` over the emulation, whose device memory is the host's; ``includes``: of Python and pybind11."""
    jobs = cpu_jobs(folder)
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        jobs.append((path, folder / "module" / f"{path.name}.o", MODULE_FLAGS))
    # Only what a caller hands over goes through the bindings, so they need not be fast.
    flags = [*MODULE_FLAGS, "-O0", *(f"-I{path}" for path in includes)]
    jobs.append((ROOT / "csrc/cuda/bindings.cpp", folder / "module" / "bindings.cpp.o", flags))
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with locked(folder):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_source, jobs))
        link(module, [target for _, target, _ in jobs], ["-shared", "-pthread"])
    return module


def cpu_jobs(folder: Path) -> list[tuple[Path, Path, list[str]]]:
    """The CPU codec, of which the programs and the module have the same objects."""
    sources = [
        path for path in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if "avx" not in path.name and "neon" not in path.name
    ]
    return [(path, folder / "cpu" / f"{path.name}.o", MODULE_FLAGS) for path in sources]


def _with_headers(source: Path) -> str:
    """A source and the headers of its folder that it includes, also by way of others."""
    texts: dict[Path, str] = {}
    pending = [source]
    while pending:
        path = pending.pop()
        if path in texts:
            continue
        texts[path] = path.read_text()
        names = [line.split('"')[1] for line in texts[path].splitlines() if line.startswith('#include "')]
        pending += [source.parent / name for name in names if (source.parent / name).is_file()]
    return "".join(texts.values())


def is_current(source: Path, target: Path, more_folders: Sequence[Path] = ()) -> bool:
    """Whether an object is newer than its source and the headers of its folder, the codec and ``more_folders``."""
    folders = (source.parent, ROOT / "csrc/include/qcomm", ROOT / "csrc/cuda", ROOT / "tests/cuda_emulation")
    headers = [
        path
        for folder in (*folders, *more_folders)
        for path in folder.iterdir()
        if path.suffix in {".h", ".cuh", ".inl"}
    ]
    newest = max(path.stat().st_mtime for path in [source, Path(__file__), *headers])
    return target.exists() and target.stat().st_mtime > newest


def compile_source(job: tuple[Path, Path, list[str]]) -> None:
    """Compiles a source to an object with flags. Folders that these include go before those of the emulation."""
    source, target, flags = job
    if is_current(source, target, [Path(flag[2:]) for flag in flags if flag.startswith("-I")]):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # tests/cuda_ptx has the CPU codec's objects, too, and locks another folder.
    made = target.with_suffix(f".{os.getpid()}")
    run_compiler([*FLAGS, *flags, *INCLUDES, "-x", "c++", "-c", str(source), "-o", str(made)])
    made.replace(target)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits until no other process of tests builds in a folder. What that has built need not be built again."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def link(target: Path, objects: Sequence[Path], flags: Sequence[str]) -> None:
    """Links objects, unless that was done since they were compiled. Others see the whole target, or none."""
    if target.exists() and target.stat().st_mtime > max(path.stat().st_mtime for path in objects):
        return
    made = target.with_name(f"{target.name}.{os.getpid()}")
    run_compiler(["-o", str(made), *map(str, objects), *flags])
    made.replace(target)


def run_compiler(arguments: Sequence[str]) -> None:
    done = subprocess.run([compiler() or "c++", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)}\n{done.stderr}")
