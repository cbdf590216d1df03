"""Ctrl-C while backward waits for a rank that does not come: both processes end, long before the timeout."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import qcomm

SUPPORT = Path(__file__).parents[1] / "support"

# The group's timeout is an hour, so that only the signal can end a wait within the test's.
RANK = """
import signal
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from ddp_model import backward, wrap
import qcomm
from qcomm.ddp import steps

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has jobs in the background ignore it
rank, store, strategy = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(hours=1))
model = wrap()
qcomm.attach(model, strategy=strategy, min_elements=100)
for step in range(4):
    backward(model, rank, step)

class Told:
    # An exchange that tells the test when backward waits for it.
    def __init__(self, exchange):
        self.exchange, self.exception = exchange, exchange.exception
    def join(self, seconds=None):
        if seconds is None:
            print("waiting", flush=True)
        return self.exchange.join(seconds)

add = steps.StepEnd.add
steps.StepEnd.add = lambda self, exchange, give_up: add(self, Told(exchange), give_up)
if rank == 1:
    print("ready", flush=True)
    sys.stdin.readline()
backward(model, rank, 4)
"""


@pytest.mark.world
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["two_phase", "none"])
def test_ctrl_c_ends_backward_and_the_process(strategy, tmp_path):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(qcomm.__file__).parents[1]), str(SUPPORT)]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), f"file://{tmp_path}/store", strategy],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    interrupted, other = ranks
    try:
        assert other.stdout.readline() == "ready\n"
        assert interrupted.stdout.readline() == "waiting\n"
        interrupted.send_signal(signal.SIGINT)
        errors = interrupted.communicate(timeout=60)[1]
        assert interrupted.returncode == -signal.SIGINT, errors
        assert "KeyboardInterrupt" in errors
        # The other rank comes too late, and is told so at once.
        errors = other.communicate("go on\n", timeout=60)[1]
        assert other.returncode == 1 and "was not averaged" in errors, errors
    finally:
        for process in ranks:
            process.kill()
            process.wait()
