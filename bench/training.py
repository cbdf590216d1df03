"""A training step of a ResNet under DDP, with any of the compared gradient exchanges, and when what happened in it.

No postponed annotations in this module: DDP compares a hook's annotations by identity.
"""

import inspect
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import qcomm
from qcomm.collectives.telemetry import Event
from qcomm.recipes.datasets import Dataset, load_dataset
from qcomm.recipes.models import build_model
from qcomm.recipes.train import average_buffers

# Without an exchange; with torch's; with qcomm, which compresses even where that is slower, but for "qcomm auto".
LOCAL = "no exchange"
METHODS = (
    *(LOCAL, "fp32", "fp16", "bf16", "powersgd r=1", "powersgd r=2", "powersgd r=4"),
    *("qcomm k=0.5", "qcomm k=1", "qcomm k=2", "qcomm k=3.2", "qcomm k=3.4", "qcomm range c=6", "qcomm auto"),
)
EVALUATION_BATCH = 128
ONE_BUCKET_MB = 4096
POWER_START = 2  # steps that torch's hook leaves uncompressed: the fewest that it allows
# torch 2.13 renamed the option that makes rank 0 broadcast its buffers before every forward pass.
SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)

Hook = Callable[[Any, GradBucket], torch.futures.Future[torch.Tensor]]


@dataclass(frozen=True)
class Task:
    """What is trained: ``batch`` images a rank and step; ``amp`` is bf16 autocast."""

    model: str = "resnet18"
    dataset: str = "digits"
    batch: int = 16
    stem_stride: int | None = None
    amp: bool = True
    learning_rate: float = 0.05
    seed: int = 0


class StepTimes(NamedTuple):
    """Seconds on perf_counter's clock; ``ready`` is when the last bucket's gradients were computed.

    Between ``ready`` and ``backward`` the rank does nothing but wait: that communication is exposed.
    """

    begin: float
    forward: float
    ready: float
    backward: float
    end: float


class RecordedHook:
    """A hook of torch's, with the beginning and the end of each bucket."""

    def __init__(self, hook: Hook, timeline: list[Event]) -> None:
        self._hook, self._timeline = hook, timeline

    def hook(self, state: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """For ``register_comm_hook``."""
        index = bucket.index()
        self._timeline.append((index, "ready", time.perf_counter()))

        def done(future: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
            self._timeline.append((index, "done", time.perf_counter()))
            return future.value()

        return self._hook(state, bucket).then(done)


def grid_of(method: str) -> qcomm.SigmaGrid | qcomm.RangeGrid:
    """Of one of qcomm's METHODS."""
    if method == "qcomm range c=6":
        return qcomm.RangeGrid(c=6.0)
    return qcomm.SigmaGrid(1.0 if method == "qcomm auto" else float(method.removeprefix("qcomm k=")))


class Trainer:
    """Model, data and exchange on one rank. A collective of the ranks of ``group``.

    Args:
        task: what is trained.
        method: one of METHODS.
        group: the default group if None.
        data: the task's data set, where it is loaded already.

    Attributes:
        timeline: what happened to each bucket since it was last cleared: "ready", "done" and, of qcomm, its phases.
        state: qcomm's, None with another exchange.
    """

    def __init__(
        self, task: Task, method: str, group: dist.ProcessGroup | None = None, data: Dataset | None = None
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        self.task, self.method = task, method
        self.timeline: list[Event] = []
        self.state: qcomm.CompressionState | None = None
        self.data = data or load_dataset(task.dataset)
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        torch.manual_seed(task.seed)
        self.model = build_model(task.model, in_channels=self.data.channels, stem_stride=task.stem_stride)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this form
        ddp_options: dict[str, Any] = {SYNC_BUFFERS: False}
        if method.startswith("powersgd"):
            # The hook starts collectives from callbacks, which on gloo have no common order for several buckets.
            ddp_options["bucket_cap_mb"] = ONE_BUCKET_MB
        self.ddp = DistributedDataParallel(self.model, process_group=group, gradient_as_bucket_view=True, **ddp_options)
        self._attach(group)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=task.learning_rate, momentum=0.9)
        self._order = torch.Generator().manual_seed(task.seed + 1)
        self._left = torch.empty(0, dtype=torch.int64)

    def _attach(self, group: dist.ProcessGroup | None) -> None:
        if self.method.startswith("qcomm"):
            strategy = "auto" if self.method == "qcomm auto" else "two_phase"
            self.state = qcomm.attach(self.ddp, grid=grid_of(self.method), strategy=strategy)
            self.state.telemetry.timeline = self.timeline
            return
        state: PowerSGDState | None = None
        hook: Hook = default_hooks.allreduce_hook
        if self.method.startswith("powersgd"):
            rank = int(self.method.removeprefix("powersgd r="))
            state, hook = PowerSGDState(group, rank, start_powerSGD_iter=POWER_START), powerSGD_hook
        elif self.method in {"fp16", "bf16"}:
            hook = default_hooks.fp16_compress_hook if self.method == "fp16" else default_hooks.bf16_compress_hook
        self.ddp.register_comm_hook(state or group, RecordedHook(hook, self.timeline).hook)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next images of this rank: every epoch is another permutation, the same on all ranks, dealt out."""
        together = self.task.batch * self.world_size
        if len(self._left) < together:
            self._left = torch.randperm(len(self.data.train), generator=self._order)
        chosen = self._left[self.rank : together : self.world_size]
        self._left = self._left[together:]
        images = self.data.normalise(self.data.train.images[chosen])
        return images.contiguous(memory_format=torch.channels_last), self.data.train.labels[chosen]

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> StepTimes:
        """Forward, backward with the exchange, and the optimiser's step."""
        self.timeline.clear()
        begin = time.perf_counter()
        with self.ddp.no_sync() if self.method == LOCAL else nullcontext():
            with self.autocast():
                loss = functional.cross_entropy(self.ddp(images), labels)
            forward = time.perf_counter()
            loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        ready = max((at for _, event, at in self.timeline if event == "ready"), default=backward)
        return StepTimes(begin, forward, ready, backward, time.perf_counter())

    def evaluate(self) -> float:
        """Test accuracy, 0..1, each image seen by one rank; running statistics are averaged first.

        A collective of the default group, which must be the trainer's.
        """
        average_buffers(self.model)
        self.model.eval()
        test, totals = self.data.test, torch.zeros(2, dtype=torch.float64)
        mine = torch.arange(self.rank, len(test), self.world_size)
        with torch.no_grad(), self.autocast():
            for chosen in mine.split(EVALUATION_BATCH):
                images = self.data.normalise(test.images[chosen]).contiguous(memory_format=torch.channels_last)
                totals[0] += (self.model(images).argmax(1) == test.labels[chosen]).sum()
                totals[1] += len(chosen)
        self.model.train()
        dist.all_reduce(totals)
        return float(totals[0] / totals[1])

    def autocast(self) -> torch.autocast:
        """Of the forward pass."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.task.amp)
