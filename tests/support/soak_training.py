"""Training under faults for tests/soak.py: every step is a checkpoint, and a step that fails is run again.

A rank trains a small network on scikit-learn's digits. After every step the ranks agree whether all are well. If not,
all go back to the last checkpoint, in new connections where the old ones are gone. Where a process is gone the world is
started anew by the parent, and this module goes on from the checkpoint.
"""

import contextlib
import hashlib
import resource
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from soak_cases import Case
from soak_points import POINTS
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import qcomm
from qcomm.communicator import is_agreed
from qcomm.recipes import checkpoint
from qcomm.recipes.config import TrainConfig
from qcomm.recipes.datasets import load_dataset
from qcomm.recipes.errors import RecipeError

BATCH = 32
SAMPLED = 10  # steps between samples of a process


@dataclass(frozen=True)
class Job:
    """A run, or the rest of it.

    Attributes:
        seed: of weights and order.
        strategy: of the mean.
        steps: of the whole run.
        folder: of its checkpoints; a run goes on from the last one there.
        faults: still to come, with their steps.
        timeout: of the groups, in seconds.
    """

    seed: int
    strategy: str
    steps: int
    folder: str
    faults: tuple[Case, ...]
    timeout: float


@dataclass
class Ended:
    """What became of a job on one rank; ``lost`` is the error where another process is gone."""

    lost: str
    redone: int
    accuracy: float
    weights: str
    errors: dict[int, str]


@contextlib.contextmanager
def full_disk(limit):
    """Every write beyond ``limit`` bytes of a file fails, as the kernel has it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Training:
    """One job on one rank; ``process`` has the groups and the conversation with the parent."""

    def __init__(self, process, job):
        self.process, self.job = process, job
        self.config = TrainConfig(
            method="qcomm", strategy=job.strategy, seed=job.seed, out=Path(job.folder), resume=Path(job.folder)
        )
        self.data = load_dataset("digits")
        self.passed, self.redone, self.errors = {}, 0, {}
        self.faults = {fault.step: fault for fault in job.faults}
        self.last = None

    def build(self, groups_are_new):
        """Model, optimizer and exchange, from the last checkpoint or the beginning; the number of steps done."""
        if groups_are_new:
            self.process.renew_groups(timedelta(seconds=self.job.timeout))
        torch.manual_seed(self.job.seed)
        network = nn.Sequential(
            nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10)
        )
        self.model = DistributedDataParallel(network, process_group=self.process.group, bucket_cap_mb=0.01)
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
        self.state = qcomm.attach(
            self.model, process_group=self.process.over, strategy=self.job.strategy, verify="step", min_elements=100,
            ranks_per_node=self.process.size if self.job.strategy == "hierarchical" else None,
        )  # fmt: skip
        loaded = checkpoint.load_on_all_ranks(self.config)
        if loaded is None:
            return 0
        shared, parts = loaded
        network.load_state_dict(shared["model"])
        self.optimizer.load_state_dict(shared["optimizer"])
        self.state.load_state_dict([part["exchange"] for part in parts])
        return int(shared["epoch"])

    def run(self):
        done = self.build(True)
        while done < self.job.steps:
            fault = self.faults.get(done)
            broken = self.step(done, fault)
            verdicts = self.agree(broken)
            if verdicts is None:
                return self.ended(self.last)
            if any(verdict is not None for verdict in verdicts):
                self.redone += 1
                if self.build(any(verdict for verdict in verdicts)) != done:
                    raise AssertionError(f"step {done} failed, and the last checkpoint is another one")
                continue
            done += 1
            if not self.save(done, fault):
                return self.ended(self.last)
            if done % SAMPLED == 0:
                self.process.connection.send(("sample", self.process.report([])))
            if self.process.rank == 0:
                self.process.connection.send(("step", done))
        return self.ended("")

    def step(self, number, fault):
        """None, or where it failed whether the connections are gone."""
        if fault is not None and fault.rank == self.process.rank and fault.kind != "disk":
            self.faults.pop(number)
            due = 1 + int(fault.fraction * self.passed.get(fault.points, 0))
            POINTS.arm(fault.points, due, lambda name, value: self.process.fault(fault, name, value))
        counted = dict(POINTS.passed)
        try:
            self.optimizer.zero_grad()
            images, labels = self.batch(number)
            functional.cross_entropy(self.model(images), labels).backward()
        except (RuntimeError, MemoryError, ZeroDivisionError) as error:
            known = self.state.exception()
            self.errors[number] = self.last = str(error)[:500]
            return known is None or not is_agreed(known) or "cannot be used further" in str(error)
        finally:
            self.passed = {kind: count - counted.get(kind, 0) for kind, count in POINTS.passed.items()}
        return None

    def batch(self, number):
        """Of this rank; a step has the same one whenever it is run."""
        generator = torch.Generator().manual_seed(1_000_003 * self.job.seed + number)
        chosen = torch.randint(len(self.data.train), (self.process.size, BATCH), generator=generator)[self.process.rank]
        return self.data.normalise(self.data.train.images[chosen]), self.data.train.labels[chosen]

    def agree(self, broken):
        """What became of the step on every rank; None where a process is gone."""
        verdicts = [None] * self.process.size
        try:
            dist.all_gather_object(verdicts, broken)
        except RuntimeError as error:
            self.last = f"{self.last}; then {error}"
            return None
        if all(verdict is None for verdict in verdicts):
            self.optimizer.step()
        return verdicts

    def save(self, done, fault):
        """A checkpoint of all ranks, again after a full disk, which is an error on all; False if a rank is gone."""
        own = {"exchange": self.state.state_dict()}
        shared = {
            "config": self.config.to_json(),
            "model": self.model.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        full = fault is not None and fault.kind == "disk" and done - 1 in self.faults
        if full:
            self.faults.pop(done - 1)
            here = fault.rank == self.process.rank
            with full_disk(int(2000 * fault.fraction)) if here else contextlib.nullcontext():
                try:
                    checkpoint.save(self.config.folder, done, shared, own)
                except RecipeError as error:
                    self.errors[done] = str(error)
                else:
                    raise AssertionError("a full disk was not noticed")
        try:
            checkpoint.save(self.config.folder, done, shared, own)
        except RuntimeError as error:
            self.last = str(error)
            return False
        return True

    def ended(self, lost):
        POINTS.disarm()
        if lost:
            return Ended(str(lost)[:2000], self.redone, 0.0, "", self.errors)
        with torch.no_grad():
            logits = self.model.module(self.data.normalise(self.data.test.images))
        accuracy = float((logits.argmax(1) == self.data.test.labels).double().mean())
        data = torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])
        weights = hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]
        return Ended("", self.redone, accuracy, weights, self.errors)
