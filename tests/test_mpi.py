"""qcomm over MPI: the bits of gloo, the same errors, no rank that waits in vain. mpi_cases.py has what ranks do."""

import subprocess
import sys
from pathlib import Path

import pytest
from mpirun import environment, find_mpirun

CASES = str(Path(__file__).with_name("mpi_cases.py"))
HERE = str(Path(__file__).parent)


def mpirun(size, case):
    ended = find_mpirun()(size, CASES, case, PYTHONPATH=environment()["PYTHONPATH"] + f":{HERE}")
    return ended.returncode, ended.stdout + ended.stderr


def python(program):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    return subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.world
@pytest.mark.parametrize(
    ("size", "case"),
    [
        (2, "same_as_gloo"),
        (3, "same_as_gloo"),
        (4, "same_as_gloo"),
        (1, "alone_in_the_world"),
        (3, "alone"),
        (3, "faults"),
    ],
)
def test_over_mpi(size, case):
    code, output = mpirun(size, case)
    assert code == 0, output


@pytest.mark.world
def test_a_silent_rank_is_an_error_after_the_timeout():
    code, output = mpirun(3, "silent")
    assert code == 0 and output.count("is well") == 3, output


@pytest.mark.world
def test_a_rank_that_leaves_is_an_error_on_the_others_and_fails_the_job():
    code, output = mpirun(3, "leaves")
    assert code != 0 and "rank 1 has had enough" in output, output
    # The launcher may be the first to notice, and then ends the others.
    assert output.count("is well") == 2 or "TERMINATION" in output, output


@pytest.mark.world
def test_a_rank_that_dies_ends_the_job():
    code, output = mpirun(3, "killed")
    assert code != 0 and "has ended" not in output, output


def refusal(program):
    ended = python(program + "\nimport qcomm\nqcomm.MpiGroup()")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    return ended.stderr


def test_too_few_threads_are_refused_by_their_level():
    find_mpirun()
    message = refusal("import mpi4py\nmpi4py.rc.thread_level = 'funneled'")
    assert "MPI provides MPI_THREAD_FUNNELED, and MpiGroup needs MPI_THREAD_MULTIPLE" in message
    assert "mpi4py.rc.thread_level" in message


def test_what_mpi_lacks_is_named():
    assert "pip install 'qcomm[mpi]'" in refusal("import sys\nsys.modules['mpi4py'] = None")
    find_mpirun()
    assert "MPI is not initialised" in refusal("import mpi4py\nmpi4py.rc.initialize = False")
