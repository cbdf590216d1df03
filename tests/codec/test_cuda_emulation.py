"""The CUDA kernels, unmodified, on the host: the CPU codec's bytes, in several orders of threads, under sanitizers.

``tests/cuda_emulation/scheduler.h`` says how; nothing here needs a GPU.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_emulation"))

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
        [program, *arguments], capture_output=True, text=True, timeout=300, env=environment, check=False
    )


# The longest first.
GROUPS = {
    "damage": ["3"],
    "runs": [RANDOM],
    "own": [RANDOM],
    "codec": [RANDOM],
    "bucket": [FORWARD, REVERSE, RANDOM],
    "large": [REVERSE],
    "capacity": [REVERSE],
    "histogram": [FORWARD, REVERSE, RANDOM],
    "mean": [FORWARD, RANDOM],
    "emulator": [FORWARD, REVERSE, RANDOM, "3"],
}


@pytest.fixture(scope="module")
def answers(
    program: Path, request: pytest.FixtureRequest
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """By group. A group runs on one processor, so as many run at once as there are."""
    selected = {item.callspec.params.get("group") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {group: pool.submit(run, program, group, *GROUPS[group]) for group in GROUPS if group in selected}


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_agree_with_the_cpu(answers: dict[str, Future[subprocess.CompletedProcess[str]]], group: str) -> None:
    done = answers[group].result()
    assert done.returncode == 0, done.stderr[-3000:]


def fibonacci(n: int) -> list[int]:
    row = [1, 1]
    while len(row) < n:
        row.append(row[-1] + row[-2])
    return row[:n]


COUNTS = st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 1000), st.integers(0, 2**35))
HISTOGRAMS = st.sampled_from([("single", bits) for bits in range(1, 13)] + [("pair", 4)]).flatmap(
    lambda code: st.tuples(st.just(code), st.lists(COUNTS, max_size=256 if code[0] == "pair" else 2 ** code[1]))
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(HISTOGRAMS, min_size=1, max_size=30), st.sampled_from([FORWARD, REVERSE, RANDOM, "7"]))
@example([(("single", 6), fibonacci(40)), (("pair", 4), fibonacci(47)), (("single", 12), fibonacci(47))], RANDOM)
@example([(("single", 12), row) for row in ([1] * 4096, [7, 0] * 2048, [0] * 4000 + [1, 2], [*range(4096)])], REVERSE)
@example([(("single", 4), row) for row in ([], [0, 5], [1, 1], [3] * 16, [2**35, 1, 1])], FORWARD)
@example([(("single", 10), [int(1e6 / (i % 97 + 1)) for i in range(1024)]), (("pair", 4), [1] * 256)], RANDOM)
def test_code_lengths_are_those_of_the_cpu(
    program: Path, folder: Path, histograms: list[tuple[tuple[str, int], list[int]]], seed: str
) -> None:
    numbers = {"single": 3, "pair": 4}
    lines = [f"{numbers[coding]} {bits} {len(row)} {' '.join(map(str, row))}" for (coding, bits), row in histograms]
    file = folder / "histograms.txt"
    file.write_text("\n".join(lines) + "\n")
    done = run(program, f"codes={file}", seed)
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


@pytest.mark.skipif(shutil.which("nvcc") is not None, reason="test_cuda_ptx.py finds races in what nvcc compiles")
def test_a_missing_fence_shows(folder: Path) -> None:
    whole = run(emulation.build(folder, "thread"), "race", RANDOM)
    assert whole.returncode == 0, whole.stderr[-3000:]
    planted = run(emulation.build(folder, "thread", "QCOMM_PLANT_MISSING_FENCE"), "race", RANDOM)
    assert "data race" in planted.stderr, planted.stderr[-3000:]
