"""A stage: one partition with its local head, and its training on one batch.

Source: the thesis behind ``RangeGrid``, on deep partition-wise learning.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from qcomm.partitions.filters import SampleFilter

__all__ = ["Batch", "EpochReport", "LocalStage", "Loss", "StageTrainer", "cross_entropy_of_samples"]

# Scores and labels -> a loss per sample.
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Batch(NamedTuple):
    """Values and labels of the same samples, along the first dimension of each."""

    values: torch.Tensor
    labels: torch.Tensor


class LocalStage(nn.Module):
    """One partition of a model, with the head by which it learns.

    Args:
        partition: takes a batch of samples, and returns their features, whose first dimension is that of the samples.
        head: takes the features, which it must not change in place, and returns scores for the loss.

    Example:
        >>> stage = LocalStage(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), nn.Linear(4, 2))
        >>> features, scores = stage(torch.ones(3, 8))
        >>> features.shape, scores.shape
        (torch.Size([3, 4]), torch.Size([3, 2]))
    """

    def __init__(self, partition: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.partition = partition
        self.head = head

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns features and scores.

        Raises:
            ValueError: the head changed the features in place. The next partition would get what it made of them.
        """
        features = self.partition(values)
        version = features._version
        scores = self.head(features)
        if features._version != version:
            raise ValueError("head must not change its input in place, as ReLU(inplace=True) does at its beginning")
        return features, scores


def cross_entropy_of_samples(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropy of each sample."""
    return functional.cross_entropy(scores, labels, reduction="none")


@dataclass(frozen=True)
class EpochReport:
    """One epoch of one partition.

    Attributes:
        batches: that it trained on.
        samples: in them.
        forwarded_samples: that the next partition got; 0 for the last one.
        loss: mean local loss of a sample; NaN without one.
        sent_bytes: headers, features and labels to the next partition.
        uncompressed_bytes: the features and labels of ``sent_bytes`` as tensors.
        seconds: of the epoch.
        waiting_seconds: of these, waiting for the neighbours: for a batch, for room in the queue, for the epoch's end.
    """

    batches: int
    samples: int
    forwarded_samples: int
    loss: float
    sent_bytes: int
    uncompressed_bytes: int
    seconds: float
    waiting_seconds: float

    @property
    def utilisation(self) -> float:
        """The fraction of the epoch in which the partition did not wait."""
        return 1.0 - self.waiting_seconds / self.seconds if self.seconds > 0 else 0.0


class StageTrainer:
    """Training of one stage, a batch at a time: ``forward``, ``forwarded``, ``learn``.

    Args:
        module: a :class:`LocalStage`, or DDP around one.
        optimizer: of its parameters.
        loss: returns the loss of each sample.
        sample_filter: of the batches that are handed over; None for all samples.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, sample_filter: SampleFilter | None
    ) -> None:
        self._module, self._optimizer, self._loss, self._filter = module, optimizer, loss, sample_filter
        self.batches = self.samples = self.forwarded_samples = 0
        self._losses = 0.0

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns features and losses of the samples.

        Raises:
            ValueError: the loss is not one number per sample.
        """
        features, scores = self._module(batch.values)
        losses = self._loss(scores, batch.labels)
        if losses.shape != (len(batch.labels),):
            raise ValueError(
                f"loss must return one number per sample, of shape ({len(batch.labels)},), got {tuple(losses.shape)}; "
                "torch's losses do so with reduction='none'"
            )
        self.batches += 1
        self.samples += len(batch.labels)
        self._losses += float(losses.detach().double().sum())
        return features, losses

    def forwarded(self, features: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, epoch: int) -> Batch:
        """Returns what the next partition gets: detached features of the samples that the filter keeps, and labels."""
        batch = Batch(features.detach(), labels)
        if self._filter is not None:
            kept = self._filter.kept(losses.detach(), epoch)
            batch = Batch(batch.values[kept], labels[kept])
        self.forwarded_samples += len(batch.labels)
        return batch

    def learn(self, losses: torch.Tensor) -> None:
        """Takes a step on the mean loss of the batch."""
        self._optimizer.zero_grad()
        losses.mean().backward()
        self._optimizer.step()

    def report(self, sent_bytes: int, uncompressed_bytes: int, seconds: float, waiting_seconds: float) -> EpochReport:
        """Returns the report of the batches since the last one."""
        loss = self._losses / self.samples if self.samples else float("nan")
        counts = self.batches, self.samples, self.forwarded_samples
        self.batches = self.samples = self.forwarded_samples = 0
        self._losses = 0.0
        return EpochReport(*counts, loss, sent_bytes, uncompressed_bytes, seconds, waiting_seconds)
