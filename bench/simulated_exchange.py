"""Gradient exchanges of W ranks, computed in one process on the buffers of all ranks, with the bytes that each sends.

An exchange replaces the buffers of a bucket by their mean, as far as it gets it across. Each keeps its own memory, and
counts the bytes of its messages: packets with all headers, and for peers that add on the way those of a ring. Of qcomm
the ranks' steps are those of the library (:class:`qcomm.collectives.two_phase_steps.MeanSteps`): only the messages are
handed over without a socket.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy
import torch
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import _orthogonalize, _should_compress

import qcomm
from qcomm.collectives import BucketLayout, ErrorFeedback, MeanTask, ReduceOptions, Telemetry, TensorSpec
from qcomm.collectives.two_phase_schedule import SLICE_ELEMENTS, Step
from qcomm.collectives.two_phase_steps import MeanSteps, plan_slices
from qcomm.communicator import Fields
from qcomm.ddp.warm_up import WarmUp
from qcomm.transport import Traffic

MIN_ELEMENTS = 1024  # as of the hook: smaller tensors travel uncompressed, with peers too
FLOAT_BYTES = 4
POWER_START = 2  # steps that torch's PowerSGD leaves uncompressed: the fewest that it allows
POWER_MIN_RATE = 2  # torch's default: matrices that a factorisation does not halve travel uncompressed
TOP_PART = 0.01
TOP_BYTES = 8  # of a value that is sent: its position and itself


class Bucket(NamedTuple):
    """One of DDP's buckets: its number in the step, and the parameters that lie in its buffer one after the other."""

    index: int
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @property
    def numels(self) -> list[int]:
        """Returns the number of elements of each parameter."""
        return [shape.numel() for shape in self.shapes]


class Exchange(Protocol):
    """An exchange of all ranks."""

    def average(self, bucket: Bucket, buffers: Sequence[torch.Tensor]) -> None:
        """Replaces the flat fp32 buffers, one a rank, by their mean. A step has its buckets in ascending order."""
        ...

    def stats(self) -> dict[str, float]:
        """Returns ``bytes_sent``, the mean over the ranks, and for qcomm the bits of a value in each phase."""
        ...


def ring_bytes(elements: int, ranks: int) -> float:
    """Returns the bytes that a rank of a ring sends to add fp32 values."""
    return 2 * (ranks - 1) / ranks * FLOAT_BYTES * elements


def add_up(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the sum in the order of the ranks."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


@dataclass
class Fp32:
    """Torch's own all-reduce: every rank divides by their number, and the sum is the mean."""

    bytes_sent: float = 0.0

    def average(self, bucket: Bucket, buffers: Sequence[torch.Tensor]) -> None:
        """Replaces the buffers by their mean."""
        mean = add_up([buffer / len(buffers) for buffer in buffers])
        for buffer in buffers:
            buffer.copy_(mean)
        self.bytes_sent += ring_bytes(sum(bucket.numels), len(buffers))

    def stats(self) -> dict[str, float]:
        """Returns the bytes that a rank sent."""
        return {"bytes_sent": self.bytes_sent}


class TwoPhase:
    """qcomm's ``two_phase`` with error feedback: its codec, its residuals, its steps.

    Args:
        grid: of values; of means by the default of ``mean_step``.
        ranks: number of ranks.
        warm_up: number of initial steps on grids that coarsen from step 1 to that of ``grid``.
    """

    def __init__(self, grid: qcomm.SigmaGrid, ranks: int, warm_up: int = 0) -> None:
        self._warm_up, self._step = WarmUp(warm_up, 1.0), 0
        self._options = ReduceOptions(grid, strategy="two_phase", min_elements=MIN_ELEMENTS).for_world(ranks)
        self._options.check_feedback()
        self.feedback = [ErrorFeedback() for _ in range(ranks)]
        self._telemetry = [Telemetry() for _ in range(ranks)]
        self._layouts: dict[Bucket, BucketLayout] = {}

    def average(self, bucket: Bucket, buffers: Sequence[torch.Tensor]) -> None:
        """Replaces the buffers by the mean that all ranks decode."""
        self._step += bucket.index == 0
        options = self._warm_up.options(self._options, self._warm_up.stage(self._step))
        layout = self._layout(bucket, len(buffers))
        plan = plan_slices(layout, SLICE_ELEMENTS, torch.float32)
        tasks = [
            MeanTask(buffer, layout, options, Fields({}), telemetry, feedback, index=bucket.index)
            for buffer, telemetry, feedback in zip(buffers, self._telemetry, self.feedback, strict=True)
        ]
        ranks = [MeanSteps(task, rank, plan) for rank, task in enumerate(tasks)]
        for steps in ranks:
            steps.begin()
        values: dict[int, list[Any]] = {}
        means: dict[int, list[Any]] = {}
        for step, number in plan.order:
            if step is Step.ENCODE:
                values[number] = [steps.encode(number) for steps in ranks]
            elif step is Step.REDUCE:
                for rank, steps in enumerate(ranks):
                    steps.reduce(number, [packets[rank] for packets in values[number]])
                means[number] = [steps.encode_mean(number) for steps in ranks]
            else:
                for steps in ranks:
                    steps.decode(number, means[number])
        for steps in ranks:
            steps.finish()
        for rank, (buffer, telemetry) in enumerate(zip(buffers, self._telemetry, strict=True)):
            telemetry.count_bucket(layout, FLOAT_BYTES)
            sent = sum(_size(packet) for packets in values.values() for packet in packets[rank])
            telemetry.add_traffic("phase1", Traffic(sent, 0))
            sent = sum(_size(packets[rank]) for packets in means.values())
            telemetry.add_traffic("phase2", Traffic((len(buffers) - 1) * sent, 0))
            if not torch.equal(buffer, buffers[0]):
                raise AssertionError(f"rank {rank} decoded another mean than rank 0 in bucket {bucket.index}")

    def _layout(self, bucket: Bucket, ranks: int) -> BucketLayout:
        if bucket not in self._layouts:
            specs, offset = [], 0
            for name, numel in zip(bucket.names, bucket.numels, strict=True):
                specs.append(TensorSpec(name, offset, numel, self._options.is_compressed(numel), may_round=True))
                offset += numel
            self._layouts[bucket] = BucketLayout(self._options.merge_small(specs), ranks)
        return self._layouts[bucket]

    def stats(self) -> dict[str, float]:
        """Returns the bytes of packets, and bits a value, averaged over the ranks."""
        names = ("bytes_sent", "bits_per_element_phase1", "bits_per_element_phase2", "bits_per_element_compressed")
        found = [telemetry.stats() for telemetry in self._telemetry]
        return {name: sum(float(stats[name]) for stats in found) / len(found) for name in names}


def _size(packet: torch.Tensor | None) -> int:
    return 0 if packet is None else packet.numel()


@dataclass
class PowerSgd:
    """Torch's PowerSGD hook, with its defaults: warm start, error feedback, matrices in the order of the bucket.

    T. Vogels, S. P. Karimireddy and M. Jaggi, "PowerSGD", arXiv:1905.13727.

    Attributes:
        rank: of the approximation.
        errors: by bucket, the residual of each rank.
    """

    rank: int
    errors: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    _qs: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    _steps: int = 0
    _fp32: Fp32 = field(default_factory=Fp32)
    _rng: numpy.random.RandomState = field(default_factory=lambda: numpy.random.RandomState(0))

    def average(self, bucket: Bucket, buffers: Sequence[torch.Tensor]) -> None:
        """Replaces the buffers by the approximated mean."""
        self._steps += bucket.index == 0
        if self._steps <= POWER_START:
            self._fp32.average(bucket, buffers)
            return
        errors = self.errors.setdefault(bucket.index, [torch.zeros_like(buffer) for buffer in buffers])
        for buffer, error in zip(buffers, errors, strict=True):
            buffer.add_(error)
            error.copy_(buffer)
        by_tensor = list(zip(*[buffer.split(bucket.numels) for buffer in buffers], strict=True))
        large, small = [], []
        for parts, shape in zip(by_tensor, bucket.shapes, strict=True):
            rows = shape[0]
            rank = min(rows, shape.numel() // rows, self.rank)
            compress = _should_compress(rows, shape.numel() // rows, rank, POWER_MIN_RATE)[0]
            (large if compress else small).append([part.view(1, rows, -1) for part in parts])
        if bucket.index not in self._qs:
            self._qs[bucket.index] = self._random_qs([matrices[0].shape[2] for matrices in large], large)
        sent = 0
        for matrices, q in zip(large, self._qs[bucket.index], strict=True):
            _orthogonalize(q, 0)
            p = add_up([torch.bmm(matrix, q) for matrix in matrices])
            _orthogonalize(p, 0)
            q.copy_(add_up([torch.bmm(matrix.transpose(1, 2), p) for matrix in matrices]).div_(len(buffers)))
            approximation = torch.bmm(p, q.transpose(1, 2))
            for matrix in matrices:
                matrix.copy_(approximation)
            sent += p.numel() + q.numel()
        for parts in small:
            mean = add_up(parts).div_(len(buffers))
            for part in parts:
                part.copy_(mean)
            sent += mean.numel()
        for buffer, error in zip(buffers, errors, strict=True):
            error.sub_(buffer)
        self._fp32.bytes_sent += ring_bytes(sent, len(buffers))

    def _random_qs(self, columns: Sequence[int], large: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._rng.randint(1_000_000_000))
            return [
                torch.randn(1, width, min(matrices[0].shape[1], width, self.rank))
                for width, matrices in zip(columns, large, strict=True)
            ]

    def stats(self) -> dict[str, float]:
        """Returns the bytes that a rank of rings sent."""
        return self._fp32.stats()


class _Gathered(ABC):
    """Peers whose messages are gathered by all ranks, with error feedback; small tensors are averaged exactly."""

    def __init__(self) -> None:
        self.errors: dict[str, list[torch.Tensor]] = {}
        self._bytes_sent = 0.0

    def average(self, bucket: Bucket, buffers: Sequence[torch.Tensor]) -> None:
        """Replaces the buffers by the mean of what the ranks sent."""
        by_tensor = zip(*[buffer.split(bucket.numels) for buffer in buffers], strict=True)
        for name, parts in zip(bucket.names, by_tensor, strict=True):
            if parts[0].numel() < MIN_ELEMENTS:
                sent = list(parts)
                self._bytes_sent += ring_bytes(parts[0].numel(), len(parts))
            else:
                errors = self.errors.setdefault(name, [torch.zeros_like(part) for part in parts])
                sent = []
                for part, error in zip(parts, errors, strict=True):
                    error.add_(part)
                    sent.append(self.keep(error))
                    error.sub_(sent[-1])
                self._bytes_sent += (len(parts) - 1) * self.message_bytes(parts[0].numel())
            mean = add_up(sent).div_(len(parts))
            for part in parts:
                part.copy_(mean)

    @abstractmethod
    def keep(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the part of the values that a rank sends."""

    @abstractmethod
    def message_bytes(self, elements: int) -> int:
        """Returns the bytes of the message of a tensor."""

    def stats(self) -> dict[str, float]:
        """Returns the bytes that a rank sent."""
        return {"bytes_sent": self._bytes_sent}


class TopK(_Gathered):
    """The largest 1 % of each tensor, each as a position and a float (Y. Lin et al., arXiv:1712.01887)."""

    def keep(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the largest values, and zeros."""
        positions = values.abs().topk(_count(values.numel()), sorted=False).indices
        return torch.zeros_like(values).index_copy_(0, positions, values[positions])

    def message_bytes(self, elements: int) -> int:
        """Returns 8 bytes for each value sent."""
        return TOP_BYTES * _count(elements)


def _count(elements: int) -> int:
    return max(1, round(TOP_PART * elements))


class Sign(_Gathered):
    """One bit a value, its sign, times the mean absolute value of the tensor (S. P. Karimireddy, arXiv:1901.09847)."""

    def keep(self, values: torch.Tensor) -> torch.Tensor:
        """Returns plus or minus the mean absolute value."""
        scale = values.abs().mean()
        return torch.where(values >= 0, scale, -scale)

    def message_bytes(self, elements: int) -> int:
        """Returns the bytes of the signs and of the scale."""
        return -(-elements // 8) + FLOAT_BYTES


def build_exchange(method: str, ranks: int) -> Exchange:
    """Returns a new exchange.

    Args:
        method: "fp32", "qcomm k=3.2" (any step), "qcomm k=3.2 after 40" (of any number of steps of warm-up),
            "powersgd r=2" (any rank), "top-k 1%" or "sign".
        ranks: number of ranks.

    Raises:
        ValueError: there is no such method.
    """
    if method == "fp32":
        return Fp32()
    if method == "top-k 1%":
        return TopK()
    if method == "sign":
        return Sign()
    if method.startswith("qcomm k="):
        step, _, warm_up = method.removeprefix("qcomm k=").partition(" after ")
        return TwoPhase(qcomm.SigmaGrid(float(step)), ranks, int(warm_up or 0))
    if method.startswith("powersgd r="):
        return PowerSgd(int(method.removeprefix("powersgd r=")))
    raise ValueError(
        f"method is {method!r}; it must be fp32, qcomm k=K, qcomm k=K after N, powersgd r=R, top-k 1% or sign"
    )
