"""A rank of tests/soak.py: it trains a small DDP model, has a fault of its own at a chosen point, and reports.

Started as ``python soak_ranks.py`` it is a template: a process that has imported torch and forks ranks on command,
since imports are most of a rank's start. ``python soak_ranks.py ADDRESS`` is a rank under mpirun.
"""

import contextlib
import faulthandler
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Client
from pathlib import Path

import torch
import torch._dynamo  # DDP imports it when it is first used
import torch.distributed as dist
from ddp_model import exact_mean, inputs, mlp, wrap
from soak_cases import KEY_FILE, Report, StepReport, is_mpi, is_sealed
from soak_points import POINTS, install
from soak_training import Training, full_disk

import qcomm
from qcomm.collectives import two_phase
from qcomm.communicator import is_agreed
from qcomm.recipes import checkpoint
from qcomm.recipes.errors import RecipeError

GROUP_SECONDS = 60.0  # timeout of the default group, which no fault should reach
CLONE_NEWNET = 0x40000000


class Rank:
    """One process of a world, and its conversation with the parent."""

    def __init__(self, rank, size, connection, transport, folder):
        self.rank, self.size, self.connection = rank, size, connection
        self.transport, self.folder = transport, Path(folder)
        self.group = self.over = None  # of DDP, and of the gradients
        self.fired = None

    def renew_groups(self, timeout):
        """Connections of the cases' own; an earlier fault may have ended the last ones."""
        self.close_groups()
        self.group = dist.new_group(timeout=timeout)
        self.over = qcomm.MpiGroup(timeout=timeout) if is_mpi(self.transport) else self.group

    def close_groups(self):
        if self.group is not None:
            if self.over is not self.group:
                self.over.close()
            dist.destroy_process_group(self.group)
        self.group = self.over = None

    def attach(self, case):
        model = wrap(process_group=self.group)
        grid = qcomm.RangeGrid() if case.grid is None else qcomm.SigmaGrid(step=case.grid)
        state = qcomm.attach(
            model,
            process_group=self.over,
            grid=grid,
            strategy=case.strategy,
            verify=case.verify,
            error_feedback=case.error_feedback,
            min_elements=case.min_elements,
            ranks_per_node=case.ranks_per_node,
            secret=self.folder / KEY_FILE if is_sealed(self.transport) else None,
        )
        return model, state

    def run(self, case):
        """The steps of a case; the report has what each of them came to."""
        if case.fresh:
            self.renew_groups(timedelta(seconds=case.timeout))
        two_phase.SLICE_ELEMENTS = case.slice_elements
        self.fired = None
        model, state = self.attach(case)
        steps, passed = [], 0
        for number in range(case.steps):
            before = POINTS.passed[case.points]
            if number == case.step and self.rank == case.rank:
                due = 1 + int(case.fraction * max(passed, 1))
                POINTS.arm(case.points, due, lambda name, value: self.fault(case, name, value))
            steps.append(self.step(model, state, number))
            passed = POINTS.passed[case.points] - before
            # All ranks have an error on which they agreed in the same step, and they take two more.
            shared = [step for step in steps[:-2] if step.error in ("CollectiveError", "DivergenceError")]
            if steps[-1].broken or shared:
                break
        POINTS.disarm()
        return self.report(steps)

    def step(self, model, state, number):
        begin = time.monotonic()
        try:
            model.zero_grad()
            model(inputs(self.rank, number)).square().sum().backward()
        except (RuntimeError, MemoryError, ZeroDivisionError) as error:
            known = state.exception()
            broken = known is None or not is_agreed(known) or "cannot be used further" in str(error)
            text = str(error).split("\nException raised", 1)[0]
            return StepReport(None, type(known).__name__, text[:2000], broken, time.monotonic() - begin)
        return StepReport(digest(model), None, "", False, time.monotonic() - begin)

    def fault(self, case, name, value):
        """Begins the fault of a case, on whatever thread has reached its point."""
        self.fired = name
        if case.kind in ("exception", "memory"):
            raise {"ZeroDivisionError": ZeroDivisionError, "RuntimeError": RuntimeError, "MemoryError": MemoryError}[
                case.error
            ]("boom")
        if case.kind in ("packet", "mean"):
            damaged = value.clone() if case.kind == "packet" else value
            data = damaged.reshape(-1).view(torch.uint8)
            place = int(case.place * data.numel())
            data[place] ^= 1 << case.bit
            self.fired = f"{name}, byte {place} of {data.numel()}, bit {case.bit}"
            return damaged
        self.connection.send(("reached", case.number))
        self.connection.recv()  # the parent stops this process, or takes its time, and says "go"
        return None

    def check(self, case):
        """Two steps without a fault: ranks are equal, and near the exact mean, in the same group or a new one."""
        if case.fresh:
            self.renew_groups(timedelta(seconds=case.timeout))
        model, state = self.attach(case)
        steps = [self.step(model, state, number) for number in range(2)]
        if steps[-1].digest is None:
            return self.report(steps)
        exact = torch.cat([grad.flatten() for grad in exact_mean(self.rank, self.size, 1)])
        got = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        return self.report(steps, float((got - exact).norm() / exact.norm()))

    def save_with_a_full_disk(self, case):
        """Checkpoints of all ranks, the second of which finds the disk full on one rank."""
        folder = self.folder / f"checkpoint-{case.number}"
        shared = {"config": {}, "model": mlp().state_dict()}
        own = {"exchange": {"residual": torch.full((1000,), float(self.rank))}}
        checkpoint.save(folder, 1, shared, own)
        begin, steps = time.monotonic(), []
        sizes = [path.stat().st_size for path in (folder / "epoch-0001").iterdir()]
        limit = int(case.fraction * (max(sizes) if self.rank == 0 else min(sizes)))
        for epoch in (2, 3):
            with full_disk(limit) if epoch == 2 and self.rank == case.rank else contextlib.nullcontext():
                try:
                    checkpoint.save(folder, epoch, shared, own)
                except (RecipeError, OSError, RuntimeError) as error:
                    steps.append(
                        StepReport(None, type(error).__name__, str(error)[:2000], False, time.monotonic() - begin)
                    )
                else:
                    steps.append(StepReport("saved", None, "", False, time.monotonic() - begin))
            dist.barrier()
            left = ",".join(sorted(path.name for path in folder.iterdir()))
            steps[-1].note = left
            dist.barrier()
        self.fired = f"after {limit} bytes"
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(folder)
        return self.report(steps)

    def train(self, job):
        """A training run under faults, see soak_training."""
        return Training(self, job).run()

    def report(self, steps, deviation=None):
        gc.collect()
        status = Path("/proc/self/status").read_text()
        value = dict(line.split(":", 1) for line in status.splitlines())
        return Report(
            steps=steps,
            fired=self.fired,
            deviation=deviation,
            rss_kib=int(value["VmRSS"].split()[0]),
            threads=int(value["Threads"]),
            descriptors=len(list(Path("/proc/self/fd").iterdir())),
        )


def digest(model):
    data = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]


def serve(rank, size, connection, transport, folder):
    """Runs what the parent says until it says None."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    install()
    connection.send(("here", rank, os.getpid()))
    connection.recv()  # all ranks are there
    timeout = timedelta(seconds=GROUP_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timeout)
    process = Rank(rank, size, connection, transport, folder)
    connection.send(("ready",))
    while (message := connection.recv()) is not None:
        name, case = message
        outcome = getattr(process, name)(case)
        connection.send(("done", outcome))
        if getattr(outcome, "lost", ""):
            break  # others may be waiting for this rank in the default group
    process.close_groups()
    dist.destroy_process_group()


def freeze():
    """Spares what is there from later collections, which would copy the memory that ranks share with the template."""
    gc.collect()
    gc.freeze()


def enter_network(name):
    """Moves this process, which has no threads yet, into a network namespace."""
    import ctypes

    descriptor = os.open(f"/var/run/netns/{name}", os.O_RDONLY)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.close(descriptor)


def become_template():
    """Forks a rank for every line of standard input; returns in the rank, with what the line says."""
    freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "end" in order:
            _, status = os.waitpid(order["end"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        if pid := os.fork():
            print(pid, flush=True)
            continue
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, ours in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, ours)
        return order
    os._exit(0)


def main():
    if len(sys.argv) > 1:
        from mpi4py import MPI

        address, folder, transport = sys.argv[1:]
        freeze()
        serve(MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, Client(address), transport, folder)
        return
    order = become_template()
    if order["network"] is not None:
        enter_network(order["network"])
        os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    serve(order["rank"], order["size"], Client(order["address"]), order["transport"], order["folder"])


if __name__ == "__main__":
    main()
