"""Data-parallel training of ResNet-20 with W ranks in one process.

The ranks' gradients are computed one after the other on the same weights, each from its own images and with batch
statistics of its own, as under DDP. They lie in the buckets that DDP makes, in the step of the first buckets and after
their rebuilding. An exchange of :mod:`simulated_exchange` averages them. With two ranks the weights are bit for bit
those of :func:`qcomm.recipes.train.train` over gloo; with more, gloo's ring adds fp32 values in another order.

No postponed annotations in this module: DDP compares a hook's annotations by identity.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from simulated_exchange import Bucket, Exchange
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from qcomm.recipes.config import learning_rate
from qcomm.recipes.datasets import Dataset
from qcomm.recipes.models import build_model

EVALUATION_BATCH = 256
# Of the constant schedule: high enough to learn in these runs, low enough that one batch does not decide a test.
CONSTANT_RATE = 0.02
SCHEDULES = ("falling", "constant")


@dataclass(frozen=True)
class Setting:
    """The setting of a run, all but its exchange; the defaults are those of bench_accuracy.

    Attributes:
        ranks: number of ranks, each with ``batch`` images a step.
        images: number of training images.
        epochs: passes over them.
        schedule: "falling" (a cosine to 0 after a warm-up of one epoch) or "constant" (after the same warm-up).
        seed: determines weights and order.
        batch: images a rank and step.
        amp: whether forward passes run in bfloat16 autocast.
    """

    ranks: int = 4
    images: int = 20_000
    epochs: int = 5
    schedule: str = "falling"
    seed: int = 0
    batch: int = 64
    amp: bool = True

    @property
    def steps_per_epoch(self) -> int:
        """Returns the number of full steps."""
        return self.images // (self.ranks * self.batch)

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step, which is positive."""
        if self.schedule == "falling":
            return learning_rate(step, self.epochs * self.steps_per_epoch, self.steps_per_epoch, 0.1)
        return CONSTANT_RATE * min(1.0, (step + 1) / self.steps_per_epoch)


@dataclass(frozen=True)
class Result:
    """The end of a run.

    Attributes:
        train_losses: of each epoch, the mean over its steps and ranks.
        test_loss, test_accuracy: after the last epoch; the accuracy is 0..1.
        stats: of the exchange.
        seconds: for the whole run.
        model: with averaged running statistics.
    """

    train_losses: list[float]
    test_loss: float
    test_accuracy: float
    stats: dict[str, float]
    seconds: float
    model: nn.Module


def simulate(setting: Setting, data: Dataset, exchange: Exchange, on_epoch: Callable[[int, float], None]) -> Result:
    """Trains one model.

    Args:
        setting: of the run.
        data: the task.
        exchange: averages the gradients; new, without residuals.
        on_epoch: is called with the number of finished epochs and the training loss.
    """
    begin = time.perf_counter()
    run = _Run(setting, data, exchange)
    losses = []
    for epoch in range(setting.epochs):
        losses.append(run.epoch(epoch))
        on_epoch(epoch + 1, losses[-1])
    test_loss, test_accuracy = run.evaluate()
    seconds = time.perf_counter() - begin
    return Result(losses, test_loss, test_accuracy, exchange.stats(), seconds, run.replicas[0])


class _Buffers:
    """Flat buffers of every bucket on every rank, and the view of each parameter's gradient in them."""

    def __init__(self, buckets: Sequence[Bucket], parameters: dict[str, nn.Parameter], ranks: int) -> None:
        self.buckets = buckets
        self.flat = [[torch.zeros(sum(bucket.numels)) for _ in range(ranks)] for bucket in buckets]
        self.parameters = [parameters[name] for bucket in buckets for name in bucket.names]
        self.views: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
        for bucket, flats in zip(buckets, self.flat, strict=True):
            offset = 0
            for name, numel in zip(bucket.names, bucket.numels, strict=True):
                shape, strides = parameters[name].shape, parameters[name].stride()
                for views, flat in zip(self.views, flats, strict=True):
                    views.append(flat.as_strided(shape, strides, offset))  # as DDP's views: in the weights' own order
                offset += numel


class _Run:
    """Model, optimiser, data and exchange of one run."""

    def __init__(self, setting: Setting, data: Dataset, exchange: Exchange) -> None:
        self.setting, self.data, self.exchange = setting, data, exchange
        self.training = data.train.first(setting.images)
        torch.manual_seed(setting.seed)
        model = build_model("resnet20", in_channels=data.channels, stem_stride=2)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this form
        parameters = list(model.parameters())
        shared = {id(parameter): parameter for parameter in parameters}
        # The ranks have the same weights. Running statistics are each rank's own.
        self.replicas = [copy.deepcopy(model, dict(shared)) for _ in range(setting.ranks)]
        self.optimizer = torch.optim.SGD(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 5e-4},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=0.1,
            momentum=0.9,
        )
        self.buffers = [
            _Buffers(buckets, dict(model.named_parameters()), setting.ranks) for buckets in ddp_buckets(model, data)
        ]
        self.steps_done = 0

    @cached_property
    def _samplers(self) -> list[DistributedSampler[int]]:
        setting = self.setting
        return [
            DistributedSampler(
                range(len(self.training)),  # type: ignore[arg-type]  # only its length is asked for
                num_replicas=setting.ranks,
                rank=rank,
                seed=setting.seed,
                drop_last=True,
            )
            for rank in range(setting.ranks)
        ]

    def epoch(self, epoch: int) -> float:
        """Trains one epoch and returns the mean loss."""
        setting, losses = self.setting, [0.0] * self.setting.ranks
        for replica in self.replicas:
            replica.train()
        for batches in self._batches(epoch):
            for rank, loss in enumerate(self._step(batches)):
                losses[rank] += loss
        self._average_buffers()
        return sum(losses) / (setting.steps_per_epoch * setting.ranks)

    def _batches(self, epoch: int) -> Iterator[list[torch.Tensor]]:
        batch, orders = self.setting.batch, []
        for sampler in self._samplers:
            sampler.set_epoch(epoch)
            orders.append(torch.tensor(list(sampler)))
        for step in range(self.setting.steps_per_epoch):
            yield [order[step * batch : (step + 1) * batch] for order in orders]

    def _step(self, batches: Sequence[torch.Tensor]) -> list[float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.rate(self.steps_done)
        buffers = self.buffers[min(self.steps_done, 1)]
        losses = []
        for replica, chosen, views in zip(self.replicas, batches, buffers.views, strict=True):
            self.optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                logits = replica(self._prepare(self.training.images[chosen]))
                loss = functional.cross_entropy(logits, self.training.labels[chosen])
            loss.backward()
            losses.append(loss.item())
            for view, parameter in zip(views, buffers.parameters, strict=True):
                view.copy_(parameter.grad)
        for bucket, flats in zip(buffers.buckets, buffers.flat, strict=True):
            self.exchange.average(bucket, flats)
        for view, parameter in zip(buffers.views[0], buffers.parameters, strict=True):
            parameter.grad = view
        self.optimizer.step()
        self.steps_done += 1
        return losses

    def _average_buffers(self) -> None:
        """Averages the running statistics over the ranks."""
        for same in zip(*[replica.buffers() for replica in self.replicas], strict=True):
            if same[0].is_floating_point():
                mean = sum(same[1:], same[0].clone()) / len(same)
                for buffer in same:
                    buffer.copy_(mean)

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        return self.data.normalise(images).contiguous(memory_format=torch.channels_last)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.setting.amp)

    def evaluate(self) -> tuple[float, float]:
        """Computes loss and accuracy over the test images, in the batches in which the ranks would see them."""
        model, test, ranks = self.replicas[0].eval(), self.data.test, self.setting.ranks
        loss = correct = 0.0
        with torch.no_grad(), self._autocast():
            for rank in range(ranks):
                for chosen in torch.arange(rank, len(test), ranks).split(EVALUATION_BATCH):
                    logits, labels = model(self._prepare(test.images[chosen])).float(), test.labels[chosen]
                    loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
                    correct += int((logits.argmax(1) == labels).sum())
        return loss / len(test), correct / len(test)


def ddp_buckets(model: nn.Module, data: Dataset) -> list[list[Bucket]]:
    """Returns DDP's buckets of the first step, and those of all later ones, from two steps of a DDP of one rank."""
    copied = copy.deepcopy(model)
    names = {id(parameter): name for name, parameter in copied.named_parameters()}
    steps: list[list[Bucket]] = []

    def hook(_state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        parameters = bucket.parameters()
        found = tuple(names[id(parameter)] for parameter in parameters)
        steps[-1].append(Bucket(bucket.index(), found, tuple(parameter.shape for parameter in parameters)))
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(copied, gradient_as_bucket_view=True)
        ddp.register_comm_hook(None, hook)
        images = data.normalise(data.train.images[:2]).contiguous(memory_format=torch.channels_last)
        for _ in range(2):
            steps.append([])
            ddp(images).sum().backward()
    finally:
        dist.destroy_process_group()
    return steps
