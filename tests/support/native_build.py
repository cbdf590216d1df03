"""Programs of tests/native, built where and as the extension is."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_emulation"))

from emulation_build import locked

ROOT = Path(__file__).resolve().parents[2]
# Where setup.py builds; a target takes the very objects that are in the module.
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"


def skip_unless_built() -> None:
    """Skips a test in a checkout in which nothing was built."""
    if not (BUILD / "build.ninja").is_file():
        pytest.skip(f"qcomm was not built in this checkout: there is no {BUILD.name} in build")


def build(target: str) -> Path:
    """Builds a program and returns its path."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    command = ["cmake", "--build", str(BUILD), "--target", target]
    with locked(BUILD):  # ninja does not look whether another one is at work
        subprocess.run(command, check=True, env={**os.environ, "PATH": path}, stdout=subprocess.DEVNULL)
    return BUILD / target
