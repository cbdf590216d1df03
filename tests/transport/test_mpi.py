"""qcomm over MPI: the bits of gloo, the same errors, no rank that waits in vain. mpi_cases.py has what ranks do."""

import contextlib
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from mpirun import environment, find_mpirun
from processes import is_gone

from qcomm.transport.mpi_library import check_launcher

CASES = str(Path(__file__).parents[1] / "support" / "mpi_cases.py")
HERE = str(Path(__file__).parents[1] / "support")


def mpirun(size, *cases, cwd=None):
    ended = find_mpirun()(size, CASES, *cases, cwd=cwd, PYTHONPATH=environment()["PYTHONPATH"] + f":{HERE}")
    return ended.returncode, ended.stdout + ended.stderr


def python(program, *arguments, **variables):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.world
@pytest.mark.parametrize("size", [2, 4])
def test_the_same_bits_as_over_gloo(size):
    code, output = mpirun(size, "same_as_gloo")
    assert code == 0, output


@pytest.mark.world
def test_without_torch_distributed_and_what_happens_to_faults_and_silent_ranks():
    # One launch for all three: each costs seconds.
    code, output = mpirun(3, "alone", "faults", "silent")
    assert code == 0 and output.count("is well") == 3, output


@pytest.mark.world
def test_one_rank_and_what_is_refused():
    code, output = mpirun(1, "alone_in_the_world")
    assert code == 0, output


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


@pytest.mark.world
def test_a_stopped_rank_ends_the_job(tmp_path):
    try:
        code, output = mpirun(3, "stopped", cwd=tmp_path)
        assert code != 0 and output.count("is well") == 2, output
        assert "MPI_Finalize would wait for ever for rank(s) 1" in output, output
        assert all(is_gone(int((tmp_path / f"rank-{rank}").read_text()), 10) for rank in range(3))
    finally:
        for note in tmp_path.glob("rank-*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(note.read_text()), signal.SIGKILL)


@pytest.mark.world
def test_a_rank_that_was_only_late_does_not_end_the_job():
    code, output = mpirun(3, "late")
    assert code == 0 and output.count("is well") == 3, output


OTHER_LAUNCHER = """
import sys
import qcomm

for _ in range(2):
    try:
        getattr(qcomm, sys.argv[1])()
    except RuntimeError as error:
        print(error)
from mpi4py import MPI
print(MPI.Is_initialized())
"""


@pytest.mark.parametrize("name", ["init_from_environment", "MpiGroup"])
def test_the_mpirun_of_another_mpi_is_named_before_mpi_starts(name):
    find_mpirun()
    probe = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    library = python(probe).stdout
    if library.startswith("Open MPI"):
        launcher, places = "MPICH or Intel MPI", {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
    else:
        launcher, places = "Open MPI", {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    ended = python(OTHER_LAUNCHER, name, **places)
    assert ended.returncode == 0, ended.stderr
    *refusals, initialised = ended.stdout.splitlines()
    assert len(refusals) == 2 and initialised == "False", ended.stdout
    version = " ".join(library.splitlines()[0].split())
    for text in refusals:
        assert text.startswith(f"mpirun is that of {launcher}, and the MPI library of mpi4py is '{version}'"), text
        assert f"start the program with the mpirun of that library, or have mpi4py use {launcher}" in text


@pytest.mark.parametrize(
    ("library", "environment", "fits"),
    [
        ("MPICH Version: 5.0.2", {"MPI_LOCALNRANKS": "2"}, True),
        ("Intel(R) MPI Library 2021.14", {"MPI_LOCALNRANKS": "2"}, True),
        ("IBM Spectrum MPI, v10.4", {"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ("Open MPI v5.0.11", {"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ("Open MPI v5.0.11", {}, True),
        ("Open MPI v5.0.11", {"PMI_SIZE": "2"}, True),  # srun, Flux and PALS speak PMI with every MPI
        ("MPICH Version: 5.0.2\nMPICH configure: --with-pmix", {"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ("Open MPI v5.0.11", {"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, False),
        ("Intel(R) MPI Library 2021.14", {"OMPI_COMM_WORLD_SIZE": "2"}, False),
    ],
)
def test_libraries_that_fit_their_launcher(library, environment, fits):
    with nullcontext() if fits else pytest.raises(RuntimeError, match="mpirun is that of"):
        check_launcher(library, environment)


LACKING = """
import sys
import qcomm

def refusal():
    try:
        qcomm.MpiGroup()
    except RuntimeError as error:
        return str(error)
    return "no error"

sys.modules["mpi4py"] = None
print(refusal())
del sys.modules["mpi4py"]
import mpi4py
mpi4py.rc.initialize = False
print(refusal())
from mpi4py import MPI
MPI.Init_thread(MPI.THREAD_FUNNELED)
print(refusal())
"""


def test_what_mpi_lacks_is_named():
    find_mpirun()
    ended = python(LACKING)
    assert ended.returncode == 0, ended.stderr
    missing, uninitialised, threads = ended.stdout.splitlines()
    assert "pip install 'qcomm[mpi]'" in missing
    assert "MPI is not initialised" in uninitialised and "Init_thread" in uninitialised
    assert "MPI provides MPI_THREAD_FUNNELED, and MpiGroup needs MPI_THREAD_MULTIPLE" in threads
    assert "mpi4py.rc.thread_level" in threads
