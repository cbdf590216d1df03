"""Ranks started by a real mpirun, where there is one: what tests of launchers and of MPI share."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qcomm
from qcomm.transport import launchers


def environment(**variables):
    """This process's without any launcher's, able to import the package."""
    known = {name for names in launchers.LAUNCHERS.values() for name in names} | {"MASTER_ADDR", "MASTER_PORT"}
    kept = {name: value for name, value in os.environ.items() if name not in known}
    source = os.pathsep.join([str(Path(qcomm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": source, **variables}


def find_mpirun():
    """A function that starts ranks under the mpirun of the MPI that mpi4py uses; without one the test is skipped."""
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("no mpirun: pip install mpich")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    extra = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"] if "Open MPI" in version else []

    def start(size, *arguments, cwd=None, **variables):
        command = [found, *extra, "-np", str(size), sys.executable, *arguments]
        return subprocess.run(
            command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=150, check=False
        )

    return start
