"""Processes that mpirun, srun or torchrun started find each other; real ones, with MPICH where it is installed."""

import re
import socket
import subprocess
import sys

import pytest
from mpirun import environment, find_mpirun
from processes import is_gone

from qcomm.transport import launchers
from qcomm.transport.launchers import Place, find_place

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1,1",
    "SLURM_STEP_NODELIST": "node[03-07,12]",
    "SLURM_JOB_ID": "71",
    "SLURM_STEP_ID": "2",
}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        (OPEN_MPI, Place("Open MPI", 1, 4, 1, 2)),
        (MPICH, Place("MPICH", 3, 4, 1, 2)),
        (SLURM, Place("SLURM", 5, 8, 1, 2)),
        (TORCHRUN, Place("torchrun", 0, 2, 0, 2)),
        ({**SLURM, "SLURM_NODEID": "3"}, Place("SLURM", 5, 8, 1, 1)),
        # mpirun in a SLURM job, and torchrun in either.
        ({**SLURM, **OPEN_MPI}, Place("Open MPI", 1, 4, 1, 2)),
        ({**SLURM, **MPICH, **TORCHRUN}, Place("torchrun", 0, 2, 0, 2)),
        # What a launcher does not say is not known.
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, Place("MPICH", 0, 1, None, None)),
        # A batch script is one process, though its job has many.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "71"}, None),
        ({"RANK": "0"}, None),
    ],
    ids=[
        "none",
        "open_mpi",
        "mpich",
        "slurm",
        "torchrun",
        "slurm_on_a_smaller_node",
        "open_mpi_in_slurm",
        "torchrun_in_mpich_in_slurm",
        "mpich_without_local_ranks",
        "a_batch_script",
        "a_rank_without_a_size",
    ],
)
def test_every_launcher_is_understood(environment, place):
    assert find_place(environment) == place


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"PMI_RANK": "x"}, "PMI_RANK must be a number, got 'x'"),
        ({"PMI_RANK": "-1"}, "PMI_RANK must be a number, got '-1'"),
        ({"PMI_SIZE": "3"}, "PMI_RANK must be below PMI_SIZE, got 3 and 3"),
        ({"MPI_LOCALNRANKS": ""}, "MPI_LOCALNRANKS must be a number, got ''"),
    ],
    ids=["no_number", "negative", "beyond_the_size", "empty"],
)
def test_nonsense_is_named(change, match):
    with pytest.raises(ValueError, match=match):
        find_place({**MPICH, **change})


def test_a_machine_that_slurm_does_not_list_is_an_error():
    with pytest.raises(ValueError, match="SLURM_NODEID is 5"):
        find_place({**SLURM, "SLURM_NODEID": "5"})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node[03-07,12]", "node03"),
        ("gpu1,gpu2", "gpu1"),
        ("one", "one"),
        ("rack[2-3]n[05,07]-ib,other", "rack2n05-ib"),
        ("a.example.org,b[1-2]", "a.example.org"),
    ],
)
def test_the_first_machine_of_a_slurm_step(hosts, first):
    address, port = launchers._slurm_meeting({**SLURM, "SLURM_STEP_NODELIST": hosts})
    assert address == first and port in launchers.SLURM_PORTS
    assert launchers._slurm_meeting({**SLURM, "SLURM_STEP_ID": "3"}) != (address, port)


PROGRAM = """
import os, sys
import torch, torch.distributed as dist
import qcomm
place = qcomm.init_from_environment()
tensor = torch.full((3000,), float(place.rank))
qcomm.all_reduce(tensor, strategy="two_phase")
if place.rank == int(os.environ.get("FAILING", "-1")):
    if os.environ["WAY"] == "killed":
        os.kill(os.getpid(), 9)
    raise SystemExit(7)
if "FAILING" in os.environ:
    qcomm.all_reduce(torch.zeros(3000), strategy="two_phase")
assert torch.equal(tensor, torch.full((3000,), (place.world_size - 1) / 2)), tensor
assert os.environ["RANK"] == str(dist.get_rank()) and os.environ["WORLD_SIZE"] == str(dist.get_world_size())
here = os.environ.get("LOCAL_WORLD_SIZE")
print(f"rank {place.rank} of {place.world_size} by {place.launcher}, {here} here", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def by_hand(launcher, size, **variables):
    """What a launcher would do: processes with its variables."""
    rank_name, size_name, local_rank_name, local_size_name = launchers.LAUNCHERS[launcher]
    processes = []
    for rank in range(size):
        own = {rank_name: rank, size_name: size, local_rank_name: rank, local_size_name: size, **variables}
        own = {name: str(value) for name, value in own.items()}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                env=environment(**own),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=100) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return [out for out, _ in outputs]


@pytest.mark.world
@pytest.mark.parametrize("launcher", ["Open MPI", "MPICH", "torchrun"])
def test_ranks_meet_at_the_master_address(launcher):
    outputs = by_hand(launcher, 2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    assert outputs == [f"rank {rank} of 2 by {launcher}, 2 here\n" for rank in range(2)]


@pytest.mark.world
def test_ranks_of_a_slurm_step_meet_on_its_first_machine():
    port = next(port for port in iter(free_port, None) if port in launchers.SLURM_PORTS)
    numbers = next(
        (job, step)
        for job in range(1000)
        for step in range(61)
        if launchers.SLURM_PORTS[(job * 61 + step) % len(launchers.SLURM_PORTS)] == port
    )
    names = {
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": 0,
        "SLURM_JOB_ID": numbers[0],
        "SLURM_STEP_ID": numbers[1],
    }
    outputs = by_hand("SLURM", 3, **names)
    assert outputs == [f"rank {rank} of 3 by SLURM, 3 here\n" for rank in range(3)]


def run_program(program, **variables):
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, timeout=100, check=False
    )


def test_without_a_launcher_it_says_so():
    ended = run_program(PROGRAM)
    assert ended.returncode == 1 and "no launcher started this process" in ended.stderr


def test_without_a_way_to_meet_it_says_what_to_do():
    without = "import sys\nsys.modules['mpi4py'] = None\n" + PROGRAM
    ended = run_program(without, PMI_RANK="0", PMI_SIZE="2")
    assert ended.returncode == 1 and "MPICH does not tell where the ranks meet: set MASTER_ADDR" in ended.stderr


def alone():
    """The environment of a rank without others."""
    return {"PMI_RANK": "0", "PMI_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def test_a_process_may_begin_again_after_destroy_process_group():
    ended = run_program(PROGRAM + "\nqcomm.init_from_environment()", **alone())
    assert ended.returncode == 0, ended.stderr


def test_a_process_may_not_begin_twice():
    twice = PROGRAM.replace("tensor = torch.full", "qcomm.init_from_environment(); tensor = torch.full", 1)
    ended = run_program(twice, **alone())
    assert ended.returncode == 1 and "torch.distributed is initialised already" in ended.stderr


@pytest.fixture
def mpirun():
    return find_mpirun()


@pytest.mark.world
@pytest.mark.parametrize("size", [1, 2, 4])
def test_mpirun(mpirun, size):
    ended = mpirun(size, "-c", PROGRAM)
    assert ended.returncode == 0, ended.stderr
    # The launcher may put one rank's line end behind another's line.
    found = re.findall(r"rank (\d+) of (\d+) by [\w ]+, (\d+) here", ended.stdout)
    assert sorted(found) == [(str(rank), str(size), str(size)) for rank in range(size)], ended.stdout


@pytest.mark.world
def test_mpirun_of_a_program_that_uses_mpi_itself(mpirun):
    program = "from mpi4py import MPI\n" + PROGRAM + "\nassert MPI.COMM_WORLD.allreduce(1) == place.world_size\n"
    ended = mpirun(2, "-c", program)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.world
@pytest.mark.parametrize("way", ["killed", "ends"])
def test_a_rank_that_fails_ends_the_launch_with_an_error(mpirun, way):
    ended = mpirun(3, "-c", PROGRAM, FAILING="1", WAY=way)
    assert ended.returncode != 0
    # The launcher may be the first to notice, and then ends the others.
    assert "no answer from rank(s) 1" in ended.stderr or "TERMINATION" in ended.stdout + ended.stderr


IN_THE_MIDDLE = """
import os
from unittest import mock
import torch
import qcomm
from qcomm.collectives import two_phase
from qcomm.collectives.two_phase_steps import MeanSteps
place = qcomm.init_from_environment()
print(f"process {os.getpid()}", flush=True)
qcomm.all_reduce(torch.ones(3000), strategy="two_phase")
if place.rank == 1:
    reduce = MeanSteps.reduce
    def die(self, number, packets):
        return reduce(self, number, packets) if number < 1 else os.kill(os.getpid(), 9)
    mock.patch.object(MeanSteps, "reduce", die).start()
mock.patch.object(two_phase, "SLICE_ELEMENTS", 200).start()
qcomm.all_reduce(torch.ones(3000), strategy="two_phase")
print("went on")
"""


@pytest.mark.world
def test_a_rank_killed_in_the_middle_of_an_all_reduce_leaves_no_process(mpirun):
    ended = mpirun(3, "-c", IN_THE_MIDDLE)
    assert ended.returncode != 0 and "went on" not in ended.stdout
    processes = [int(number) for number in re.findall(r"process (\d+)", ended.stdout)]
    assert len(processes) == 3, ended.stdout
    assert all(is_gone(process, 20) for process in processes)


@pytest.mark.world
def test_trains_under_mpirun(mpirun, tmp_path):
    tiny = ["--epochs", "1", "--train-images", "128", "--batch-size", "32", "--method", "qcomm", "--out", "log"]
    ended = mpirun(2, "-m", "qcomm", "train", *tiny, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "log" / "qcomm-k1.jsonl").exists()
