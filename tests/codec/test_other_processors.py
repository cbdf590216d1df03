"""Other processors write and read the same bytes: golden_check here, and on an emulated 64-bit Arm, where the NEON
loops are compared with the scalar ones, too.
"""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from native_build import ROOT, build, skip_unless_built

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def test_this_processor_writes_and_reads_the_same_bytes() -> None:
    skip_unless_built()
    command = [build("golden_check"), ROOT / "tests" / "golden"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith(" 0 failures")


@pytest.mark.slow
def test_arm64_writes_and_reads_the_same_bytes(tmp_path: Path) -> None:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    for tool in (COMPILER, EMULATOR, "cmake", "ninja"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"{tool} is not installed (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)")
    options = {
        "QCOMM_NATIVE_CHECK": "ON",
        "QCOMM_CUDA": "OFF",
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_EXE_LINKER_FLAGS": "-static",
    }
    commands = (
        ["cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path, *(f"-D{name}={value}" for name, value in options.items())],
        ["cmake", "--build", tmp_path, "--target", "golden_check", "compare_lanes", "compare_zero_runs"],
        [EMULATOR, tmp_path / "compare_lanes", "400", "1"],
        [EMULATOR, tmp_path / "compare_zero_runs", "400", "1"],
        [EMULATOR, tmp_path / "golden_check", ROOT / "tests" / "golden"],
    )
    for command in commands:
        done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "PATH": path})
        assert done.returncode == 0, done.stdout + done.stderr
    assert "neon: checked" in done.stdout and done.stdout.rstrip().endswith(" 0 failures"), done.stdout
