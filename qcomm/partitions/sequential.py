"""Partition-wise training in one process: the weights of a :class:`PartitionPipeline`, bit for bit."""

import time
from collections.abc import Iterable, Sequence

import torch

from qcomm.codec import Grid, RangeGrid
from qcomm.partitions.filters import SampleFilter
from qcomm.partitions.messages import HEADER_BYTES, Kind, batch_bytes, decoded, encoded, parsed
from qcomm.partitions.stage import Batch, EpochReport, LocalStage, Loss, StageTrainer, cross_entropy_of_samples

__all__ = ["SequentialPartitions"]

MOST_BYTES = 1 << 62  # nothing is received


class SequentialPartitions:
    """All partitions in one process, each batch through one after another, with the pipeline's own round trip.

    For debugging, for one machine, and as the specification of :class:`PartitionPipeline`: it makes the same weights
    as long as no module draws random numbers. Processes have a generator each, and here there is one.

    Args:
        stages: in order.
        optimizers: of each of them.
        loss, grid, sample_filter: as of :class:`PartitionPipeline`.

    Raises:
        ValueError: there are not as many optimizers as stages.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> stages = [LocalStage(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)) for _ in range(2)]
        >>> optimizers = [torch.optim.SGD(stage.parameters(), lr=0.1) for stage in stages]
        >>> data = [(torch.randn(4, 8), torch.tensor([0, 1, 1, 0]))]
        >>> reports = SequentialPartitions(stages, optimizers).run_epoch(data)
        >>> [report.samples for report in reports]
        [4, 4]
    """

    def __init__(
        self,
        stages: Sequence[LocalStage],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        loss: Loss = cross_entropy_of_samples,
        grid: Grid | None = RangeGrid(num_bits=6),
        sample_filter: SampleFilter | None = None,
    ) -> None:
        if len(stages) != len(optimizers):
            raise ValueError(f"optimizers must be one per stage, got {len(optimizers)} for {len(stages)} stages")
        self._grid, self._epoch = grid, 0
        self._trainers = [
            StageTrainer(stage, optimizer, loss, sample_filter if not number else None)
            for number, (stage, optimizer) in enumerate(zip(stages, optimizers, strict=True))
        ]

    def run_epoch(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[EpochReport]:
        """Trains all partitions on ``batches``; returns a report of each, whose seconds are its own work."""
        count = len(self._trainers)
        seconds, sent, uncompressed = [0.0] * count, [0] * count, [0] * count
        for number, (values, labels) in enumerate(batches):
            batch = Batch(values, labels)
            for place, trainer in enumerate(self._trainers):
                begin = time.perf_counter()
                features, losses = trainer.forward(batch)
                if place + 1 < count:
                    handed = trainer.forwarded(features, batch.labels, losses, self._epoch)
                    header, payload = encoded(handed, self._grid, self._epoch, number, MOST_BYTES)
                    batch = decoded(parsed(header, (Kind.BATCH,), self._epoch, number, MOST_BYTES), payload)
                    sent[place] += HEADER_BYTES + payload.numel()
                    uncompressed[place] += batch_bytes(handed)
                trainer.learn(losses)
                seconds[place] += time.perf_counter() - begin
        self._epoch += 1
        return [
            trainer.report(sent[place] + (HEADER_BYTES if place + 1 < count else 0), uncompressed[place], each, 0.0)
            for place, (trainer, each) in enumerate(zip(self._trainers, seconds, strict=True))
        ]
