"""The CUDA kernels as nvcc compiles them: their PTX, executed on the host, gives the CPU codec's bytes.

``tests/cuda_ptx/machine.h`` says how, and what is noticed besides wrong bytes. Nothing here needs a GPU, and nothing
of it has run on one. Without nvcc all of it is skipped. One architecture and the groups that take seconds are tested by
default; ``make cuda-ptx``, which sets QCOMM_PTX=all, tests every architecture and group.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_ptx"))

import ptx_build

pytestmark = pytest.mark.skipif(ptx_build.reason_to_skip() is not None, reason=str(ptx_build.reason_to_skip()))

FORWARD, REVERSE, RANDOM = "0", "1", "2"
ALL = os.environ.get("QCOMM_PTX") == "all"
ARCHITECTURES = ptx_build.ARCHITECTURES if ALL else ("80",)

# The longest first.
SHORT_GROUPS = {
    "runs": [RANDOM],
    "codec": [REVERSE],
    "bucket": [FORWARD],
    "mean": [RANDOM],
    "histogram": [REVERSE],
    "emulator": [FORWARD],
}
LONG_GROUPS = {
    "own": [RANDOM],
    "codec": [RANDOM],
    "damage": [FORWARD],
    "large": [REVERSE],
    "capacity": [REVERSE],
    "runs": [FORWARD, REVERSE, RANDOM],
    "bucket": [FORWARD, REVERSE, RANDOM],
    "mean": [FORWARD, REVERSE, RANDOM],
    "histogram": [FORWARD, REVERSE, RANDOM],
    "emulator": [FORWARD, REVERSE, RANDOM],
}
WARP_BARRIER, FENCE = r"bar\.warp\.sync[^;]*;", r"(?:membar|fence)\.[^;]*;"
BARRIER = r"(?:bar|barrier)\.sync[^;]*;"
GROUPS = LONG_GROUPS if ALL else SHORT_GROUPS
Answer = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kept between runs where the tree has a build folder: nvcc takes most of the time."""
    kept = ptx_build.ROOT / "build"
    return kept / "cuda_ptx" if kept.is_dir() else tmp_path_factory.mktemp("build") / "cuda_ptx"


@pytest.fixture(scope="module", params=ARCHITECTURES)
def built(folder: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """The program and its PTX."""
    return ptx_build.build(folder, request.param)


def run(built: tuple[Path, Path], *arguments: str, races: bool = False, counts: Path | None = None) -> Answer:
    """Runs a group with seeds, in the interpreter with its search for races or without, and writes its counts."""
    program, texts = built
    environment = {
        **os.environ,
        "CUDA_PTX_FILES": str(texts),
        "CUDA_PTX_RACES": "1" if races else "0",
        "CUDA_PTX_COUNTS": str(counts or ""),
    }
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=600, env=environment, check=False
    )


@pytest.fixture(scope="module")
def answers(built: tuple[Path, Path], request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Answer]]]:
    """By group. A group runs on one processor, so as many run at once as there are."""
    selected = {item.callspec.params.get("group") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {group: pool.submit(run, built, group, *GROUPS[group]) for group in GROUPS if group in selected}


@pytest.mark.parametrize("group", GROUPS)
def test_compiled_kernels_agree_with_the_cpu(answers: dict[str, Future[Answer]], group: str) -> None:
    done = answers[group].result()
    assert done.returncode == 0, done.stderr[-3000:]


def test_compiled_kernels_have_no_race(built: tuple[Path, Path]) -> None:
    done = run(built, "race", RANDOM, races=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        ("instruction", "unknown: instruction tanh.approx.f32"),
        ("modifier", "unknown: instruction add.sat.s32"),
        ("division", "division by zero"),
        ("barrier", "a barrier that only some lanes of the warp reach"),
        ("barriers", "warps wait at different barriers"),
        ("lanes", "a warp operation that only some of its lanes reach"),
        ("shuffle", "a shuffle from a lane that takes no part"),
        ("vote", "a vote is undefined"),
        ("branch", "a condition is undefined"),
        ("address", "an address is undefined"),
        ("register", "a value that is stored to global memory is undefined"),
        ("unwritten", "a value that is stored to global memory is undefined"),
        ("shared", "an access outside shared memory: 4 bytes at 64 of 64"),
        ("aligned", "a misaligned access of 8 bytes"),
        ("heap", "an access outside the host's allocations"),
        ("null", "an access outside the host's allocations"),
        ("race-lanes", "race (write after write)"),
        ("race-warps", "race (write after write)"),
    ],
)
def test_a_faulty_kernel_is_noticed(built: tuple[Path, Path], misuse: str, message: str) -> None:
    done = run(built, f"misuse-{misuse}", FORWARD, races=True)
    assert done.returncode == 3
    assert message in done.stderr, done.stderr


def test_counts_are_those_of_the_instructions(built: tuple[Path, Path], tmp_path: Path) -> None:
    # The last kernel of the group has two warps. They store 16 bytes a lane, and their lanes part and meet once.
    file = tmp_path / "counts.json"
    assert run(built, "emulator", FORWARD, counts=file).returncode == 0
    counts = json.loads(file.read_text())["tested"]
    want = {"launches": 1, "warps": 2, "divergent": 2, "shuffles": 2, "votes": 2, "barriers": 4, "store_requests": 2,
            "store_sectors": 32, "store_bytes": 1024, "shared_store_passes": 2, "shared_load_passes": 2}  # fmt: skip
    assert {name: counts[name] for name in want} == want


def planted(built: tuple[Path, Path], folder: Path, file: str, change: Callable[[str], str]) -> tuple[Path, Path]:
    """The program with PTX of which one file is changed."""
    program, texts = built
    shutil.copytree(texts, folder / "ptx")
    text = (texts / file).read_text()
    changed = change(text)
    assert changed != text, f"nothing to change in {file}"
    (folder / "ptx" / file).write_text(changed)
    return program, folder / "ptx"


def without(pattern: str) -> Callable[[str], str]:
    return lambda text: re.sub(pattern, "", text)


def shifted(text: str) -> str:
    """Every store to an address of shared memory goes 64 KiB too far."""
    return re.sub(r"(st\.shared\S*\s+\[%r\d+)[+\d]*\]", r"\1+65536]", text)


@pytest.mark.parametrize(
    ("file", "change", "group", "message"),
    [
        ("payload.ptx", without(WARP_BARRIER), "race", "race (write after read)"),
        ("zero_runs_encode.ptx", without(BARRIER), "race", "a condition is undefined"),
        pytest.param(
            *("encode.ptx", without(WARP_BARRIER), "own", "race (write after write)"),
            marks=pytest.mark.skipif(not ALL, reason="a race that takes half a minute to find: make cuda-ptx"),
        ),
        ("decode.ptx", without(WARP_BARRIER), "codec", "race (read after write)"),
        ("statistics.ptx", without(BARRIER), "race", "race (read after write)"),
        ("statistics.ptx", without(FENCE), "race", "race (read after write)"),
        ("payload.ptx", without(FENCE), "race", "race (read after write)"),
        ("decode.ptx", shifted, "race", "an access outside shared memory"),
        ("sum.ptx", without(r"st\.shared\.f32[^;]*;"), "race", "a value that is stored to global memory is undefined"),
    ],
)
def test_a_planted_fault_shows(
    built: tuple[Path, Path], tmp_path: Path, file: str, change: Callable[[str], str], group: str, message: str
) -> None:
    done = run(planted(built, tmp_path, file, change), group, RANDOM, races=True)
    assert done.returncode == 3
    assert message in done.stderr, done.stderr
    assert f"{file}:" in done.stderr


def test_contracted_arithmetic_shows(built: tuple[Path, Path], tmp_path: Path, request: pytest.FixtureRequest) -> None:
    # The emulation cannot see this flag of nvcc's.
    file = tmp_path / "encode.ptx"
    architecture = request.node.callspec.params["built"]
    ptx_build.contracted(ptx_build.ROOT / "csrc/cuda/encode.cu", file, architecture)
    done = run(planted(built, tmp_path, "encode.ptx", lambda _: file.read_text()), "codec", FORWARD)
    assert done.returncode == 1
    assert "FAILED: " in done.stderr
