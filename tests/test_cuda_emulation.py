"""The CUDA kernels, unmodified, on the host: the CPU codec's bytes, in several orders of threads, under sanitizers.

``tests/cuda_emulation/scheduler.h`` says how; nothing here needs a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulation"))

import emulation_build as emulation

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason="there is no C++ compiler")

FORWARD, REVERSE, RANDOM = "0", "1", "2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kept between runs where the tree has a build folder, so that a second run compiles what has changed."""
    kept = emulation.ROOT / "build"
    return kept / "cuda_emulation" if kept.is_dir() else tmp_path_factory.mktemp("cuda_emulation")


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    return emulation.build(folder, "address")


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A leak check would only look at the test program's own; a failure's report needs no symbols.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=120, env=environment, check=False
    )


@pytest.mark.parametrize(
    ("group", "seeds"),
    [
        ("emulator", [FORWARD, REVERSE, RANDOM, "3"]),
        ("codec", [RANDOM]),
        ("bucket", [FORWARD, REVERSE, RANDOM]),
        ("damage", [FORWARD, "3"]),
        ("large", [REVERSE]),
    ],
)
def test_kernels_agree_with_the_cpu(program: Path, group: str, seeds: list[str]) -> None:
    done = run(program, group, *seeds)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("misuse", ["barrier", "exit", "mix", "spin"])
def test_what_would_hang_a_gpu_is_noticed(program: Path, misuse: str) -> None:
    done = run(program, f"misuse-{misuse}", RANDOM)
    assert done.returncode != 0
    assert "cuda_emulation:" in done.stderr


def test_a_missing_barrier_shows(folder: Path) -> None:
    planted = emulation.build(folder, "address", "QCOMM_PLANT_MISSING_BARRIER")
    for seed in (FORWARD, REVERSE, RANDOM):
        assert run(planted, "bucket", seed).returncode != 0, f"seed {seed}"


def test_an_access_out_of_bounds_shows(folder: Path) -> None:
    done = run(emulation.build(folder, "address", "QCOMM_PLANT_OUT_OF_BOUNDS"), "codec", FORWARD)
    assert "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]


def test_a_missing_fence_shows(folder: Path) -> None:
    whole = run(emulation.build(folder, "thread"), "race", RANDOM)
    assert whole.returncode == 0, whole.stderr[-3000:]
    planted = run(emulation.build(folder, "thread", "QCOMM_PLANT_MISSING_FENCE"), "race", RANDOM)
    assert "data race" in planted.stderr, planted.stderr[-3000:]
