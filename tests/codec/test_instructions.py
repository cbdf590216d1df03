"""Instructions that each stage of the codec executes, AVX2 as a ratio to scalar code of the same build.

Counted by callgrind, so that other work on the machine does not matter. After a change that is meant to cost more:
``PYTHONPATH=tests/support python tests/codec/test_instructions.py`` writes tests/native/instructions.json anew.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from native_build import BUILD, ROOT, build, skip_unless_built

import qcomm

BASELINE = ROOT / "tests" / "native" / "instructions.json"
GROWTH = 1.10

Counts = dict[str, dict[str, int]]  # version -> stage -> instructions


def compiler() -> str:
    """Its name and version: what absolute counts depend on."""
    cache = (BUILD / "CMakeCache.txt").read_text()
    command = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache, re.MULTILINE)
    assert command is not None
    text = subprocess.run([command[1], "--version"], check=True, capture_output=True, text=True).stdout
    return text.splitlines()[0]


def count(program: Path, folder: Path) -> Counts:
    counts: Counts = {}
    for version in ("scalar", "avx2"):
        report = folder / f"callgrind.{version}"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={report}", str(program), version]
        subprocess.run(command, check=True, capture_output=True)
        command = ["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(report)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = re.findall(r"^\s*([\d,]+) .*:stage_(\w+)", text, re.MULTILINE)
        counts[version] = {stage: int(number.replace(",", "")) for number, stage in sorted(found, key=lambda f: f[1])}
    return counts


def ratios(counts: Counts) -> dict[str, float]:
    return {stage: number / counts["scalar"][stage] for stage, number in counts["avx2"].items()}


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Counts:
    for tool in ("valgrind", "callgrind_annotate"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: apt-get install valgrind)")
    skip_unless_built()
    if "avx2" not in qcomm.cpu_features():
        pytest.skip("this processor has no AVX2")
    return count(build("count_instructions"), tmp_path_factory.mktemp("callgrind"))


def test_vector_code_does_not_need_more_instructions_than_it_did(counts: Counts) -> None:
    known = json.loads(BASELINE.read_text())["ratios"]
    now = ratios(counts)
    assert now.keys() == known.keys()
    grown = {
        stage: f"{ratio:.3f}, was {known[stage]:.3f}" for stage, ratio in now.items() if ratio > GROWTH * known[stage]
    }
    assert not grown


def test_no_stage_needs_more_instructions_than_it_did(counts: Counts) -> None:
    absolute = json.loads(BASELINE.read_text())["absolute"]
    if compiler() not in absolute:
        pytest.skip(f"no counts are known for {compiler()}")
    for version, known in absolute[compiler()].items():
        grown = {
            stage: (number, known[stage]) for stage, number in counts[version].items() if number > GROWTH * known[stage]
        }
        assert not grown, version


if __name__ == "__main__":
    document = json.loads(BASELINE.read_text()) if BASELINE.is_file() else {"absolute": {}}
    new = count(build("count_instructions"), BUILD)
    document["ratios"] = {stage: round(ratio, 4) for stage, ratio in ratios(new).items()}
    document["absolute"][compiler()] = new
    BASELINE.write_text(json.dumps(document, indent=1) + "\n")
