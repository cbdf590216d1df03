"""Starts a bench's script on every rank and reads the figures of rank 0.

Ranks are hosts of :mod:`netlab` where a rate is named, otherwise processes of this machine, started by torchrun or by
mpirun. In the ranks a script calls ``start_rank``, which initialises ``torch.distributed``, and rank 0 prints one line
of JSON.
"""

import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from netlab import UNAVAILABLE, Netlab, NetlabError, end_cleanly
from wan import Wan

import qcomm
from qcomm.transport.auto_connections import congestion_control
from qcomm.transport.launchers import LAUNCHERS, find_place

LOOPBACK = "none"  # the rate of links that nothing limits
# One thread a rank, and none that spins while it waits: ranks share cores.
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TORCH_CPP_LOG_LEVEL": "ERROR"}


class RanksError(RuntimeError):
    """A rank failed, or the launcher is missing."""


def about(wan: Wan | None = None, **settings: object) -> dict[str, Any]:
    """What makes a result comparable with another machine's, and how busy the machine was."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "congestion_control": (wan.control if wan is not None else "") or congestion_control(),
        **settings,
        **({} if wan is None else {"wan": asdict(wan)}),
    }


def write(path: Path | None, document: Mapping[str, Any]) -> None:
    """The figures as a file, if one is wanted."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


def explain(error: NetlabError | RanksError, script: str, hint: str) -> int:
    """Prints why there are no figures; returns the exit status. ``hint``: what needs no network namespaces."""
    if isinstance(error, NetlabError):
        print(f"{script}: {error}; {hint}", file=sys.stderr)
        return UNAVAILABLE
    print(f"{script}: {error}", file=sys.stderr)
    return 1


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p10 and p90 of at least two values."""
    cuts = statistics.quantiles(values, n=10)
    return {"median": statistics.median(values), "p10": cuts[0], "p90": cuts[-1]}


def is_rank() -> bool:
    """Whether a launcher started this process."""
    return find_place() is not None


def start_rank(threads: int = 1) -> tuple[int, int]:
    """Initialises ``torch.distributed``; (rank, world size)."""
    torch.set_num_threads(threads)
    place = qcomm.init_from_environment()
    return place.rank, place.world_size


def run_ranks(
    script: str | Path,
    options: Sequence[str],
    world_size: int,
    rate: str = LOOPBACK,
    launcher: str = "torchrun",
    timeout: float | None = None,
    wan: Wan | None = None,
) -> Any:
    """What rank 0 printed in its last line, from JSON.

    Args:
        script: run by this interpreter on every rank.
        options: of the script.
        world_size: how many ranks.
        rate: of every host's link, as tc writes it, or "none" for processes of this machine.
        launcher: "torchrun" or "mpirun", for rate "none".
        timeout: seconds after which the ranks are ended.
        wan: delay, jitter and loss of the links between hosts, and other rates.

    Raises:
        NetlabError: the hosts cannot be made; RanksError: a rank failed, there is no such launcher, or ``wan`` is
            given for processes of this machine.
        TimeoutError, subprocess.TimeoutExpired: they are not done in time.
    """
    if wan is not None and rate == LOOPBACK:
        raise RanksError("delay, jitter and loss are of links between hosts: name a rate other than none")
    program = [sys.executable, str(Path(script).resolve()), *options]
    with tempfile.TemporaryFile("w+") as output:
        if rate == LOOPBACK:
            command = launch_command(launcher, world_size) + program[1:]
            status = subprocess.run(
                command, env=clean_environment(), stdout=output, timeout=timeout, check=False
            ).returncode
        else:
            quiet = [f"{name}={value}" for name, value in QUIET.items()]
            end_cleanly()
            with Netlab(world_size, rate, wan) as lab:
                status = lab.run(["env", *quiet, *program], timeout, stdout=output)
        output.seek(0)
        lines = output.read().splitlines()
    if status != 0 or not lines:
        raise RanksError(f"{Path(script).name} on {world_size} ranks, rate {rate}: ended with status {status}")
    return json.loads(lines[-1])


def launch_command(launcher: str, world_size: int) -> list[str]:
    """Starts so many ranks of the Python program whose name and options follow."""
    if launcher == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    if launcher != "mpirun":
        raise ValueError(f"launcher must be torchrun or mpirun, got {launcher!r}")
    found = find_mpirun()
    if found is None:
        raise RanksError("no mpirun beside the interpreter or in PATH: pip install mpich")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout
    open_mpi = ["--allow-run-as-root", "--oversubscribe", "--bind-to", "none"] if "Open MPI" in version else []
    return [found, *open_mpi, "-np", str(world_size), sys.executable]


def find_mpirun() -> str | None:
    """The mpirun that belongs to this interpreter's environment, otherwise any."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def clean_environment() -> dict[str, str]:
    """This process's environment without any launcher's variables."""
    known = {name for names in LAUNCHERS.values() for name in names} | {"MASTER_ADDR", "MASTER_PORT"}
    return {name: value for name, value in os.environ.items() if name not in known} | QUIET
