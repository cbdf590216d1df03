"""The ways to average one bucket that bench_allreduce compares, and how far off each may be.

A method averages a flat fp32 buffer in place and returns the bytes that this rank sent: of qcomm and of int8 those
handed to the transport, of torch's own all-reduces, and so of PowerSGD's, those of a ring.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from gradient_data import MIN_ELEMENTS, Bucket
from int8_two_phase import Int8
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

import qcomm
from qcomm.codec._native import measure
from qcomm.codec.grids import Grid, SigmaGrid
from qcomm.codec.quantize import plan
from qcomm.collectives import ReduceOptions
from qcomm.collectives.layout import BucketLayout
from qcomm.collectives.packing import gather_runs
from qcomm.collectives.telemetry import Event
from qcomm.collectives.two_phase_schedule import SLICE_ELEMENTS, cut_slices

Method = Callable[[torch.Tensor], int]

GRIDS: dict[str, Grid] = {
    "qcomm k=0.5": qcomm.SigmaGrid(0.5),
    "qcomm k=1": qcomm.SigmaGrid(1.0),
    "qcomm k=2": qcomm.SigmaGrid(2.0),
    "qcomm range c=6": qcomm.RangeGrid(c=6.0),
}
COARSE_GRIDS: dict[str, Grid] = {"qcomm k=3.2": qcomm.SigmaGrid(3.2), "qcomm k=3.4": qcomm.SigmaGrid(3.4)}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
POWER_RANKS = (1, 2, 4)


def ring_bytes(buffer_bytes: int) -> int:
    """What a rank of a ring sends in an all-reduce."""
    world_size = dist.get_world_size()
    return 2 * (world_size - 1) * buffer_bytes // world_size


def plain(dtype: torch.dtype) -> Method:
    """Torch's own all-reduce, in ``dtype``, as its compression hooks do it."""

    def mean(buffer: torch.Tensor) -> int:
        sent = buffer.to(dtype)
        sent.div_(dist.get_world_size())
        dist.all_reduce(sent)
        if sent is not buffer:
            buffer.copy_(sent)
        return ring_bytes(sent.nbytes)

    return mean


@dataclass
class _HookBucket:
    """What hooks ask of DDP's GradBucket, which Python cannot make."""

    bucket: Bucket
    values: torch.Tensor
    owners: Sequence[torch.Tensor] = ()

    def buffer(self) -> torch.Tensor:
        return self.values

    def gradients(self) -> list[torch.Tensor]:
        return views(self.bucket, self.values)

    def parameters(self) -> list[torch.Tensor]:
        return list(self.owners)

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True


def views(bucket: Bucket, buffer: torch.Tensor) -> list[torch.Tensor]:
    """The layers in ``buffer``."""
    return [
        buffer[spec.offset : spec.offset + spec.numel].view(shape)
        for spec, shape in zip(bucket.specs, bucket.shapes, strict=True)
    ]


def power_sgd(rank: int, bucket: Bucket, error_feedback: bool) -> Method:
    """Torch's powerSGD_hook on the layers' own shapes, past its first steps, which do not compress."""
    state = PowerSGDState(
        None, rank, start_powerSGD_iter=2, use_error_feedback=error_feedback, warm_start=True, min_compression_rate=2
    )
    state.iter = state.start_powerSGD_iter

    def mean(buffer: torch.Tensor) -> int:
        before = state.total_numel_after_compression
        powerSGD_hook(state, _HookBucket(bucket, buffer)).wait()  # type: ignore[arg-type]  # stands in
        return ring_bytes(4 * (state.total_numel_after_compression - before))

    return mean


@dataclass
class Compressed:
    """qcomm's hook, for one bucket on one grid.

    Attributes:
        group: of the ranks; by default all.
        secret: key file that seals the messages of the group; None for open ones.
        timeline: of the last call.
    """

    grid: Grid
    bucket: Bucket
    strategy: str = "two_phase"
    error_feedback: bool = False
    num_threads: int = 1
    group: dist.ProcessGroup | None = None
    secret: Path | None = None
    timeline: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._options = ReduceOptions(self.grid, min_elements=MIN_ELEMENTS)
        specs = self._options.merge_small(self.bucket.specs) if self.error_feedback else self.bucket.specs
        self._layout = BucketLayout(specs, dist.get_world_size())
        self._state = qcomm.CompressionState(
            self.group,
            grid=self.grid,
            error_feedback=self.error_feedback,
            min_elements=MIN_ELEMENTS,
            strategy=self.strategy,
            num_threads=self.num_threads,
            secret=self.secret,
        )
        self._state.telemetry.timeline = self.timeline
        # A model's parameters tell the hook their shapes and who they are.
        self._parameters = [torch.empty(shape, device="meta") for shape in self.bucket.shapes]

    def __call__(self, buffer: torch.Tensor) -> int:
        """The mean, and the bytes that this rank sent."""
        self._state.reset_stats()
        self.average(buffer)
        return int(self._state.stats()["bytes_sent"])

    def average(self, buffer: torch.Tensor) -> None:
        """The mean alone: counters are not read at every step, nor is the norm of residuals computed."""
        self.timeline.clear()
        self._state.reducer.reduce(_HookBucket(self.bucket, buffer, self._parameters)).wait()  # type: ignore[arg-type]

    @property
    def chosen(self) -> str:
        """The strategy of the last call."""
        return str(self._state.stats()["strategies"][0])

    def bound(self, values: torch.Tensor, mean: torch.Tensor) -> torch.Tensor | None:
        """Most that each element of the first result may be off, rounding left out.

        Of two_phase: half of the ranks' mean step, and half of the owner's, who measures each part of the mean as it
        arrived. That part's RMS and range are at most those of the exact mean and of the first error together. The
        bound holds for all_gather and none, too; exact_sum and hierarchical have others, which tests check: None. Runs
        of zeros have none: what is beyond three levels is sent later.
        """
        has_runs = isinstance(self.grid, SigmaGrid) and self.grid.codes_runs
        if has_runs or self.strategy in {"exact_sum", "hierarchical"}:
            return None
        steps = torch.zeros(len(self._layout.tensors), dtype=torch.float64)
        for number, spec in enumerate(self._layout.tensors):
            tensor = gather_runs(values, spec.runs)
            if spec.compressed:
                steps[number] = plan(measure(tensor), self._options.grid_of(spec), tensor).step
        dist.all_reduce(steps)
        first = (steps / dist.get_world_size() / 2).tolist()
        bound = torch.zeros_like(values)
        for part in cut_slices(self._layout, SLICE_ELEMENTS):
            for piece in (piece for chunk in part for piece in chunk.pieces):
                grid = self._options.mean_grid_of(self._layout.tensors[piece.tensor])
                owner_step = _largest_step(grid, gather_runs(mean, piece.runs), first[piece.tensor])
                for offset, length in piece.runs:
                    bound[offset : offset + length] = first[piece.tensor] + owner_step / 2
        return bound


def _largest_step(grid: Grid, mean: torch.Tensor, error: float) -> float:
    """Most that the step can be for values within ``error`` of ``mean``."""
    if isinstance(grid, SigmaGrid):
        return grid.step * (float(mean.double().square().mean().sqrt()) + error)
    return (float(mean.max() - mean.min()) + 2 * error) / (2 ** grid.bits_for(0.0) - 1)


def timed(method: Method, values: torch.Tensor) -> float:
    """Seconds of one call on a copy of ``values``: of the slowest rank, all ranks beginning together."""
    buffer = values.clone()
    dist.barrier()
    call = getattr(method, "average", method)  # without the counters, where they cost time
    begin = time.perf_counter()
    call(buffer)
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def make_methods(bucket: Bucket, strategies: list[str], error_feedback: bool, num_threads: int) -> dict[str, Method]:
    """All of them, by the names that the results have; "qcomm k=1" is two_phase, others name their strategy."""
    methods: dict[str, Method] = {name: plain(dtype) for name, dtype in DTYPES.items()}
    for rank in POWER_RANKS:
        methods[f"powersgd r={rank}"] = power_sgd(rank, bucket, error_feedback)
    methods["int8"] = Int8(bucket.values.numel())
    for strategy in strategies:
        # Steps as coarse as that are for error feedback only.
        for name, grid in (GRIDS | (COARSE_GRIDS if error_feedback else {})).items():
            label = name if strategy == "two_phase" else f"{name} {strategy}"
            methods[label] = Compressed(grid, bucket, strategy, error_feedback, num_threads)
    return methods


def allowed_error(name: str, method: Method, values: torch.Tensor, mean: torch.Tensor) -> torch.Tensor | None:
    """Most that each element may differ from the exact mean, rounding counted; None where there is no bound.

    A collective. PowerSGD has none: a matrix of low rank may be off by anything.
    """
    world_size, largest = dist.get_world_size(), values.abs().max()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    found = None
    if name in DTYPES:
        # Each value is divided, then every addition rounds; 16-bit floats also lose what is below the smallest normal.
        limits = torch.finfo(DTYPES[name])
        return torch.full_like(values, (world_size + 1) * limits.eps * (float(largest) + limits.smallest_normal))
    if isinstance(method, Int8):
        found = method.bound(values)
    elif isinstance(method, Compressed):
        found = method.bound(values, mean)
    return None if found is None else found + largest * (10 + world_size) * torch.finfo(values.dtype).eps
