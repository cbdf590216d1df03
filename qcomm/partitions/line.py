"""``PartitionPipeline``: the partitions of a model, each on a process, learn locally and pass activations on, one way.

``torch.distributed.pipelining`` sends gradients back through all stages, and computes the model's own gradient. Here
each partition has a loss of its own, and nothing goes back but credits: another algorithm, with other weights.

Source: the thesis behind ``RangeGrid``, on deep partition-wise learning.
"""

import json
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from qcomm.codec import Grid, RangeGrid, SigmaGrid
from qcomm.communicator import resolve_group
from qcomm.errors import CollectiveError, ConfigMismatchError
from qcomm.partitions.filters import SampleFilter
from qcomm.partitions.links import Inbox, Outbox, Wire
from qcomm.partitions.messages import MAGIC, batch_bytes, encoded
from qcomm.partitions.stage import Batch, EpochReport, LocalStage, Loss, StageTrainer, cross_entropy_of_samples
from qcomm.transport import ConnectionOptions, GlooTransport, KeyFile, MpiGroup, TransportError, secure

__all__ = ["PartitionPipeline"]

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
FIELDS_BYTES = 512


class PartitionPipeline:
    """Trains one partition of a model on this process, between those before and behind it.

    Rank r of W has partition ``r // (W / partitions)``. With several processes per partition, each of them belongs to
    a line of its own, with data of its own, and DDP averages gradients inside a partition: ``module`` is wrapped then,
    and takes a communication hook (``qcomm.attach``). All lines need equally many batches.

    A collective: all ranks make their pipelines at the same point, and call :meth:`run_epoch` equally often, within the
    group's timeout of each other. Beside the batch that it trains on, this process has at most ``2 * queue_batches``
    batches in memory, and one more that it decodes.

    Args:
        stage: this rank's partition and head.
        optimizer: of the stage's parameters.
        partitions: number of them, at least 2; divides the number of ranks.
        loss: takes scores and labels, and returns the loss of each sample.
        grid: of the features that are sent on; None sends them uncompressed. Labels are always exact.
        queue_batches: maximum number of batches on their way between two partitions.
        sample_filter: of what the first partition hands over, which trains on all samples; None keeps all. The others
            pass None.
        max_batch_bytes: maximum of features and labels in a batch, as tensors. A larger one is refused before memory is
            asked for.
        process_group: over gloo or with it; by default the default group.
        secret: a key file that seals the messages, see :class:`qcomm.collectives.ReduceOptions`. DDP inside a partition
            is not sealed.

    Attributes:
        module: the stage, in DDP if a partition has several processes.
        partition: of this rank, counted from 0.
        is_first, is_last: place of the partition.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.
        ConfigMismatchError: ranks passed different options; the message names the option.
        CollectiveError: a rank does not answer.

    Example, on every rank (:class:`SequentialPartitions` has one for a single process)::

        line = PartitionPipeline(stage, optimizer, partitions=2)
        report = line.run_epoch(loader if line.is_first else None)
    """

    def __init__(
        self,
        stage: LocalStage,
        optimizer: torch.optim.Optimizer,
        partitions: int,
        *,
        loss: Loss = cross_entropy_of_samples,
        grid: Grid | None = RangeGrid(num_bits=6),
        queue_batches: int = 4,
        sample_filter: SampleFilter | None = None,
        max_batch_bytes: int = 1 << 28,
        process_group: dist.ProcessGroup | None = None,
        secret: KeyFile | Path | str | None = None,
    ) -> None:
        group = resolve_group(process_group)
        if isinstance(group, MpiGroup):
            raise TypeError("process_group must be a group of torch.distributed, got an MpiGroup")
        _check_options(stage, grid, queue_batches, max_batch_bytes)
        replicas = _replicas(partitions, dist.get_world_size(group))
        key_file = KeyFile.of(secret)
        self._transport = secure(GlooTransport(group), ConnectionOptions(key_file))
        rank = self._transport.rank
        self.partition = rank // replicas
        self.is_first, self.is_last = self.partition == 0, self.partition == partitions - 1
        if sample_filter is not None and not self.is_first:
            self._transport.close()
            raise ValueError(f"sample_filter must be None in partition {self.partition}; the first one filters")
        self._agree({"partitions": str(partitions), "queue_batches": str(queue_batches)})
        starting = threading.Lock()
        self._before = None if self.is_first else Wire(self._transport, rank - replicas, starting)
        self._behind = None if self.is_last else Wire(self._transport, rank + replicas, starting)
        self._grid, self._queue_batches, self._max_batch_bytes = grid, queue_batches, max_batch_bytes
        self.module: nn.Module = stage if replicas == 1 else _replicated(stage, group, replicas)
        self._trainer = StageTrainer(self.module, optimizer, loss, sample_filter)
        self._epoch = 0
        self._broken: str | None = None

    def run_epoch(self, batches: Batches | None = None) -> EpochReport:
        """Trains this partition for one epoch, and returns when those behind have finished it.

        Args:
            batches: of values and labels, in the first partition; None in all others.

        Returns:
            The report of this partition.

        Raises:
            CollectiveError: a partition failed or died. The message names its rank, on all ranks, and the error where
                it could be told. The pipeline cannot be used further; weights are those after the last whole step.
        """
        if self._broken is not None:
            raise CollectiveError(f"an earlier failure left this pipeline without connections: {self._broken}")
        links: list[Inbox | Outbox] = []
        try:
            report = self._run(batches, links)
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}"
            self._give_up(error)
            for link in links:
                link.stop()
            if isinstance(error, TransportError) or not isinstance(error, Exception):
                raise
            raise CollectiveError(
                f"partition {self.partition} (rank {self._name}) failed in epoch {self._epoch}: {self._broken}"
            ) from error
        self._epoch += 1
        return report

    def close(self) -> None:
        """Closes the connections. Ranks that wait for this one get an error."""
        self._broken = self._broken or "it was closed"
        self._transport.close()

    @property
    def _name(self) -> int:
        return self._transport.ranks[self._transport.rank]

    def _run(self, batches: Batches | None, links: list[Inbox | Outbox]) -> EpochReport:
        if (batches is not None) != self.is_first:
            raise ValueError(
                f"batches must be {'given' if self.is_first else 'None'} in partition {self.partition}: the first one "
                "reads the data, and the others get it"
            )
        begin, uncompressed = time.perf_counter(), 0
        inbox = self._opened_inbox(links)
        outbox = self._opened_outbox(links)
        for number, batch in enumerate(_batches(batches, inbox)):
            features, losses = self._trainer.forward(batch)
            if outbox is not None:
                handed = self._trainer.forwarded(features, batch.labels, losses, self._epoch)
                outbox.wait_for_room()
                outbox.put(*encoded(handed, self._grid, self._epoch, number, self._max_batch_bytes))
                uncompressed += batch_bytes(handed)
            self._trainer.learn(losses)
        if outbox is not None:
            outbox.end()
        if inbox is not None:
            inbox.done()
            inbox.stop()
        waiting = sum(link.waiting_seconds for link in links)
        sent = 0 if outbox is None else outbox.sent_bytes
        return self._trainer.report(sent, uncompressed, time.perf_counter() - begin, waiting)

    def _opened_inbox(self, links: list[Inbox | Outbox]) -> Inbox | None:
        if self._before is None:
            return None
        links.append(inbox := Inbox(self._before, self._queue_batches, self._epoch, self._max_batch_bytes))
        return inbox

    def _opened_outbox(self, links: list[Inbox | Outbox]) -> Outbox | None:
        if self._behind is None:
            return None
        links.append(outbox := Outbox(self._behind, self._queue_batches, self._epoch))
        return outbox

    def _give_up(self, error: BaseException) -> None:
        """Ends the connections, so that no other rank waits; says why, unless another rank is the reason."""
        if isinstance(error, TransportError):
            self._transport.abandon([])
            self._transport.close()
        else:
            self._transport.fail(f"partition {self.partition} failed in epoch {self._epoch}: {self._broken}")

    def _agree(self, fields: dict[str, str]) -> None:
        """Raises ConfigMismatchError on all ranks that have other options than some rank."""
        text = json.dumps({"protocol": f"{MAGIC:x}", **fields}).encode()
        message = torch.frombuffer(bytearray(text.ljust(FIELDS_BYTES)), dtype=torch.uint8)
        told = self._transport.exchange_small([message] * self._transport.world_size, "comparing options")
        if all(torch.equal(other, message) for other in told):
            return
        self._transport.close()
        shown = ", ".join(
            f"rank {rank} has {bytes(other.tolist()).rstrip().decode(errors='replace')}"
            for rank, other in zip(self._transport.ranks, told, strict=True)
        )
        raise ConfigMismatchError(f"ranks are configured differently: {shown}")


def _batches(batches: Batches | None, inbox: Inbox | None) -> Iterator[Batch]:
    if inbox is not None:
        while (batch := inbox.take()) is not None:
            yield batch
    for values, labels in batches or ():
        yield Batch(values, labels)


def _check_options(stage: object, grid: object, queue_batches: object, max_batch_bytes: object) -> None:
    if not isinstance(stage, LocalStage):
        raise TypeError(f"stage must be a LocalStage, got {type(stage).__name__}")
    if not isinstance(grid, RangeGrid | SigmaGrid | None):
        raise TypeError(f"grid must be a RangeGrid, a SigmaGrid or None, got {type(grid).__name__}")
    for name, value in (("queue_batches", queue_batches), ("max_batch_bytes", max_batch_bytes)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _replicas(partitions: object, world_size: int) -> int:
    """Returns the number of processes in a partition."""
    if isinstance(partitions, bool) or not isinstance(partitions, int):
        raise TypeError(f"partitions must be an int, got {type(partitions).__name__}")
    if partitions < 2 or world_size % partitions:
        raise ValueError(f"partitions must be at least 2 and divide the {world_size} ranks, got {partitions}")
    return world_size // partitions


def _replicated(stage: LocalStage, group: dist.ProcessGroup, replicas: int) -> nn.Module:
    """Returns the stage in DDP over the ranks of its partition. A collective of the whole group."""
    ranks = dist.get_process_group_ranks(group)
    own = dist.get_rank(group)
    firsts = range(0, len(ranks), replicas)
    groups = [dist.new_group(ranks[first : first + replicas], backend="gloo") for first in firsts]
    return nn.parallel.DistributedDataParallel(stage, process_group=groups[own // replicas])
