"""Schedules of the exchange of gradients: DDP's buckets and Horovod's cycles."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qcomm.planner.compute import ComputeTimes
from qcomm.planner.errors import PlanError
from qcomm.planner.profiles import ModelProfile, ParameterTensor

__all__ = ["SCHEDULERS", "Bucket", "Ddp", "Horovod", "Scheduler"]

VALUE_BYTES = 4
MIB = 2**20


@dataclass(frozen=True)
class Bucket:
    """Gradients that are exchanged together.

    Args:
        tensors: parameters in the order of backward.
        ready: seconds of backward after which the last gradient is ready.
        delay: further seconds until the exchange may begin.
    """

    tensors: tuple[ParameterTensor, ...]
    ready: float
    delay: float = 0.0


@dataclass(frozen=True)
class Ddp:
    """torch's DistributedDataParallel: a bucket is full when it has reached its size, and starts at once.

    Args:
        first_mib: size of the first bucket.
        bucket_mib: size of all others.
        overlap: False for frameworks that exchange after backward, such as DeepSpeed and NVIDIA's BERT.

    Raises:
        PlanError: a size is not positive.
    """

    first_mib: float = 1.0
    bucket_mib: float = 25.0
    overlap: bool = True

    def __post_init__(self) -> None:
        for name in ("first_mib", "bucket_mib"):
            if not getattr(self, name) > 0:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be positive, such as 25")

    def buckets(
        self, model: ModelProfile, times: ComputeTimes, ranks: int, nodes: int = 1, network_us: float = 0.0
    ) -> list[Bucket]:
        """Returns the buckets of a step; only ``model`` and ``times`` have an effect here."""
        del ranks, nodes, network_us
        found: list[Bucket] = []
        waiting: list[ParameterTensor] = []
        limit, size = self.first_mib * MIB, 0
        for tensor, ready in zip(model.tensors, times.ready, strict=True):
            waiting.append(tensor)
            size += VALUE_BYTES * tensor.elements
            if size >= limit:
                found.append(Bucket(tuple(waiting), ready if self.overlap else times.backward))
                waiting, size, limit = [], 0, self.bucket_mib * MIB
        if waiting:
            found.append(Bucket(tuple(waiting), times.backward))
        return found


@dataclass(frozen=True)
class Horovod:
    """Horovod: in every cycle all ranks report ready gradients to rank 0, which announces the next exchange.

    A cycle with ready gradients takes the time of a gather and a broadcast: latencies of a tree, and at rank 0 the
    reading of a message from each rank. The reading dominates past a thousand ranks (T. Kurth et al., "Exascale deep
    learning for climate analytics", SC 2018).

    Args:
        cycle_ms: HOROVOD_CYCLE_TIME.
        fusion_mib: HOROVOD_FUSION_THRESHOLD: maximum size of a fused exchange.
        latency_us: latency of a control message, at least; the network's where that is longer.
        rank_us: time that rank 0 spends on one rank's message.

    Raises:
        PlanError: a number is not positive.
    """

    cycle_ms: float = 1.0
    fusion_mib: float = 128.0
    latency_us: float = 30.0
    rank_us: float = 4.0

    def __post_init__(self) -> None:
        for name in ("cycle_ms", "fusion_mib", "latency_us", "rank_us"):
            if not getattr(self, name) > 0:
                raise PlanError(f"{name} is {getattr(self, name)}; it must be positive")

    def negotiation(self, ranks: int, nodes: int = 1, network_us: float = 0.0) -> float:
        """Returns the seconds of one negotiation of ``ranks`` ranks on ``nodes`` nodes."""
        if ranks == 1:
            return 0.0
        away = math.ceil(math.log2(nodes))
        near = math.ceil(math.log2(ranks)) - away
        hops = near * self.latency_us + away * max(self.latency_us, network_us)
        return 1e-6 * (2 * hops + (ranks - 1) * self.rank_us)

    def buckets(
        self, model: ModelProfile, times: ComputeTimes, ranks: int, nodes: int = 1, network_us: float = 0.0
    ) -> list[Bucket]:
        """Returns the buckets of a step of ``ranks`` ranks on ``nodes`` nodes, whose network has that latency."""
        cycle, agree = 1e-3 * self.cycle_ms, self.negotiation(ranks, nodes, network_us)
        found: list[Bucket] = []
        index, now = 0, 0.0
        while index < len(model.tensors):
            # Cycles without a ready gradient are skipped.
            first = times.ready[index]
            now += max(1, math.ceil((first - now) / cycle)) * cycle
            last = index
            while last < len(model.tensors) and times.ready[last] <= now:
                last += 1
            now += agree
            for group in self._fused(model.tensors[index:last]):
                index += len(group)
                ready = times.ready[index - 1]
                found.append(Bucket(group, ready, now - ready))
        return found

    def _fused(self, tensors: Sequence[ParameterTensor]) -> list[tuple[ParameterTensor, ...]]:
        groups: list[list[ParameterTensor]] = [[]]
        size = 0
        for tensor in tensors:
            nbytes = VALUE_BYTES * tensor.elements
            if groups[-1] and size + nbytes > self.fusion_mib * MIB:
                groups.append([])
                size = 0
            groups[-1].append(tensor)
            size += nbytes
        return [tuple(group) for group in groups]


Scheduler = Ddp | Horovod
SCHEDULERS = ("ddp", "horovod")
