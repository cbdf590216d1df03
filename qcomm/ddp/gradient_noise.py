"""Gradient noise: the noise scale and the tail index of a model's gradients, from what the hook has at hand.

Of each bucket a rank has its own gradient g, of b samples, and soon the mean m over W ranks, perhaps with errors q of
quantization. With n = g - m, the expectations are::

    E |n|^2 + E <m, n>  =  (tr S / b) (W - 1) / W        S: covariance of one sample's gradient
    E |m|^2 + E <m, n>  =  |G|^2 + tr S / (W b)          G: the true gradient
            - E <m, n>  =  E |q|^2                       where all ranks have b samples

Three inner products a tensor therefore give ``tr S``, ``|G|^2`` and what quantization adds, without another pass over
the data and without a message. docs/gradient-noise.md derives them; ``qcomm.reference.noise_figures`` is their twin.
"""

import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from qcomm.codec import CPU, sample_indices
from qcomm.ddp.noise_sums import NoiseEstimate, NoiseSums
from qcomm.ddp.tail_index import TailMeter

__all__ = ["GradientNoise"]

# Elements of each tensor that the tail index is measured on, 32 groups of 32; smaller tensors have none.
SAMPLED = 1024

# Three inner products of each tensor, and tail indices by name.
_Measured = tuple[list[list[float]], dict[str, list[float]]]


class GradientNoise:
    """Measures the noise of gradients inside the hook: ``attach(model, noise=qcomm.GradientNoise(batch_size=32))``.

    Each rank measures by itself, exchanges nothing, and keeps 4 bytes per parameter (8 for float64). Ranks may measure
    or not as they like. The estimates are unbiased on every rank, and those of all ranks together are more exact.

    Steps are left out that have no mean (errors), are not finite (as GradScaler skips them), lack a bucket
    (``skip_all_reduce_unused_params``), or run within ``model.join()``, where a rank without data takes part.

    Args:
        batch_size: number of samples over which this rank's gradient is a mean, those of all accumulated micro-batches
            together. It may differ between ranks and be set anew before a step.
        every: measure every so many steps; by default one in four, which keeps the cost below 1 % of training.

    Raises:
        TypeError, ValueError: naming the argument.

    Example:
        >>> GradientNoise(batch_size=32).total().steps
        0
    """

    def __init__(self, batch_size: int, *, every: int = 4) -> None:
        self._batch_size = _positive("batch_size", batch_size)
        self._every = _positive("every", every)
        self._sums = NoiseSums()
        self._forget()

    def _forget(self) -> None:
        """Sets what belongs to this process and a model to its beginning."""
        self._lock = threading.Lock()  # of the sums
        self._model: weakref.ref[DistributedDataParallel] | None = None
        self._world_size = 0
        self._steps = 0
        self._buckets: dict[int, _Bucket] = {}
        self._under_way: list[_Bucket] | None = None
        self._given: _Bucket | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Returns options and sums, without the objects of this process."""
        with self._lock:
            sums = self._sums.to_lists()
        return {"_batch_size": self._batch_size, "_every": self._every, "_sums": sums}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _sums=NoiseSums.from_lists(state["_sums"]))
        self._forget()

    @property
    def batch_size(self) -> int:
        """Number of samples of this rank's gradient; may be set between steps."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        self._batch_size = _positive("batch_size", batch_size)

    def total(self) -> NoiseEstimate:
        """Returns the estimate for the whole gradient, over the steps since :meth:`reset`."""
        with self._lock:
            return self._sums.total()

    def tensors(self) -> dict[str, NoiseEstimate]:
        """Returns the estimate for each parameter by name."""
        with self._lock:
            return self._sums.tensors()

    def stats(self) -> dict[str, Any]:
        """Returns ``total`` and ``tensors`` as dictionaries, as they are in ``CompressionState.stats()["noise"]``."""
        with self._lock:
            total, tensors = self._sums.total(), self._sums.tensors()
        return {"total": asdict(total), "tensors": {name: asdict(estimate) for name, estimate in tensors.items()}}

    def add(
        self,
        gradient: Mapping[str, torch.Tensor],
        mean: Mapping[str, torch.Tensor],
        world_size: int,
        scale: float = 1.0,
    ) -> bool:
        """Measures a step outside of the hook, for instance of another exchange; ``every`` does not apply.

        Args:
            gradient: of this rank by name, of one dtype, on the CPU.
            mean: over all ranks, as the exchange gave it.
            world_size: number of ranks.
            scale: by which both have been multiplied.

        Returns:
            Whether the step counts: it does not where values are not finite.

        Example:
            >>> noise, own = GradientNoise(batch_size=10), torch.tensor([3.0, 1.0])
            >>> noise.add({"w": own}, {"w": torch.tensor([2.0, 1.0])}, world_size=2), noise.total().trace
            (True, 60.0)
        """
        if world_size < 2:
            raise ValueError(f"world_size must be at least 2, got {world_size}")
        if list(gradient) != list(mean):
            raise ValueError(f"mean must have the names of gradient, {list(gradient)}, got {list(mean)}")
        own = torch.cat([tensor.detach().reshape(-1) for tensor in gradient.values()])
        names, sizes = list(gradient), [tensor.numel() for tensor in gradient.values()]
        if self._given is None or not self._given.is_of(names, sizes, own):
            self._given = _Bucket(names, sizes, own)
        self._given.load(own)
        averaged = torch.cat([tensor.detach().reshape(-1) for tensor in mean.values()])
        return self._note([self._given.measure(averaged)], [self._given], world_size, scale)

    def reset(self) -> None:
        """Forgets all measurements."""
        with self._lock:
            self._sums = NoiseSums()

    def state_dict(self) -> dict[str, Any]:
        """Returns the measurements, for a checkpoint. A window of the tail index over steps begins anew after it."""
        with self._lock:
            return self._sums.to_lists()

    def load_state_dict(self, saved: object) -> None:
        """Goes on from a result of :meth:`state_dict`, also of another number of ranks.

        Raises:
            ValueError: it is damaged; nothing has changed then.
        """
        sums = NoiseSums.from_lists(saved)
        with self._lock:
            self._sums = sums

    def check(self, ddp_model: DistributedDataParallel, world_size: int) -> None:
        """Checks that the noise of a model's gradients can be measured.

        Raises:
            ValueError: one rank alone, gradients on a device, or another model that this object serves.
        """
        if world_size < 2:
            raise ValueError(
                "noise needs at least two ranks, whose gradients it compares; got a group of one. Leave it out there"
            )
        for name, parameter in ddp_model.module.named_parameters():
            if parameter.requires_grad and not parameter.is_cpu:
                raise ValueError(f"noise needs gradients on the CPU, got parameter {name!r} on {parameter.device}")
        known = None if self._model is None else self._model()
        if known is not None and known.module is not ddp_model.module:
            raise ValueError("noise serves another model, which is still there: make one GradientNoise for each model")

    def bind(self, ddp_model: DistributedDataParallel, world_size: int) -> None:
        """Measures a model that :meth:`check` has passed, from its next step on."""
        self._forget()
        self._model, self._world_size = weakref.ref(ddp_model), world_size

    def begin(self, bucket: dist.GradBucket, name_of: Callable[[torch.Tensor], str]) -> None:
        """Copies a bucket's gradient before it is averaged, in steps that are measured."""
        if self._model is None:
            raise ValueError("noise needs the parameters' names: use qcomm.attach instead of register_comm_hook")
        index = bucket.index()
        if index == 0:
            self._steps += 1
            measured = self._steps % self._every == 0 and not _is_joining(self._model())
            self._under_way = [] if measured else None
        if self._under_way is None:
            return
        if index != len(self._under_way):  # this step lacks a bucket
            self._under_way = None
            return
        names = [name_of(parameter) for parameter in bucket.parameters()]
        sizes = [parameter.numel() for parameter in bucket.parameters()]
        known = self._buckets.get(index)
        if known is None or not known.is_of(names, sizes, bucket.buffer()):
            known = self._buckets[index] = _Bucket(names, sizes, bucket.buffer())
        known.load(bucket.buffer())
        self._under_way.append(known)

    def has_all(self, bucket: dist.GradBucket, mean: torch.futures.Future[torch.Tensor]) -> bool:
        """Takes the Future of a bucket's mean; returns whether the step is measured and this is its last bucket."""
        if self._under_way is None or len(self._under_way) != bucket.index() + 1:
            return False
        self._under_way[-1].mean = mean
        return bucket.is_last()

    def finish(self, scale: float) -> None:
        """Measures a step whose means are there or about to be; one without them is left out.

        Args:
            scale: by which the gradients have been multiplied.
        """
        buckets, self._under_way = self._under_way or [], None
        try:
            means = [bucket.wait() for bucket in buckets]
        except RuntimeError:  # DDP raises it
            return
        measured = [bucket.measure(mean) for bucket, mean in zip(buckets, means, strict=True)]
        self._note(measured, buckets, self._world_size, scale)

    def _note(self, measured: Sequence[_Measured], buckets: Sequence["_Bucket"], world_size: int, scale: float) -> bool:
        figures: dict[str, list[float]] = {}
        tails: dict[str, list[float]] = {}
        for bucket, (moments, found) in zip(buckets, measured, strict=True):
            for name, row in zip(bucket.names, moments, strict=True):
                figures[name] = noise_figures(row, self._batch_size, world_size, scale)
            tails.update(found)
        if not figures or not all(math.isfinite(value) for row in figures.values() for value in row):
            return False
        with self._lock:
            self._sums.add(figures, tails)
        return True


def noise_figures(moments: Sequence[float], batch_size: int, world_size: int, scale: float) -> list[float]:
    """Returns trace, squared norm and quantization from ``|n|^2``, ``<m, n>`` and ``|m|^2``, see the module.

    Example:
        >>> noise_figures([3.0, -1.0, 5.0], batch_size=10, world_size=2, scale=1.0)
        [40.0, 2.0, 1.0]
    """
    noise, cross, mean = (value / scale / scale for value in moments)
    trace = (noise + cross) * batch_size * world_size / (world_size - 1)
    return [trace, mean + cross - trace / (batch_size * world_size), -cross]


class _Bucket:
    """A bucket's tensors, its gradient of this rank, and the sampled elements.

    Attributes:
        names: of the parameters.
        mean: the Future of the mean.
    """

    def __init__(self, names: list[str], sizes: list[int], buffer: torch.Tensor) -> None:
        self.names, self._sizes = names, sizes
        self._dtype = buffer.dtype
        arithmetic = torch.float64 if buffer.dtype == torch.float64 else torch.float32
        self._noise = torch.empty(buffer.numel(), dtype=arithmetic, device=CPU)
        offsets = [sum(sizes[:number]) for number in range(len(sizes))]
        large = [number for number, size in enumerate(sizes) if size >= SAMPLED]
        self._sampled = [names[number] for number in large]
        self._indices = torch.cat([offsets[number] + _indices(sizes[number]) for number in large]) if large else None
        self._meter = TailMeter(len(large))
        self._buffer: torch.Tensor | None = None
        self.mean: torch.futures.Future[torch.Tensor] | None = None

    def wait(self) -> torch.Tensor:
        """Returns the buffer when it holds the mean; raises the error of the exchange."""
        buffer, future, self._buffer, self.mean = self._buffer, self.mean, None, None
        if buffer is None or future is None:
            raise RuntimeError("the bucket was not exchanged")
        future.wait()
        return buffer

    def is_of(self, names: list[str], sizes: list[int], buffer: torch.Tensor) -> bool:
        """Returns whether a bucket has these parameters still; DDP rebuilds its buckets once."""
        return names == self.names and sizes == self._sizes and buffer.dtype == self._dtype

    def load(self, buffer: torch.Tensor) -> None:
        """Copies this rank's gradient, which the mean will replace."""
        self._buffer, self.mean = buffer, None
        self._noise.copy_(buffer)

    def measure(self, mean: torch.Tensor) -> _Measured:
        """Returns ``|n|^2``, ``<m, n>`` and ``|m|^2`` of each tensor, and tail indices by name."""
        with torch.no_grad():
            mean = mean.to(self._noise.dtype)
            noise = self._noise.sub_(mean)
            parts = zip(mean.split(self._sizes), noise.split(self._sizes), strict=True)
            dots = [torch.dot(a, b) for m, n in parts for a, b in ((n, n), (m, n), (m, m))]
            moments = torch.stack(dots).double().view(-1, 3).tolist()
            tails = {}
            if self._indices is not None and all(math.isfinite(value) for row in moments for value in row):
                sample = noise[self._indices].view(len(self._sampled), SAMPLED)
                tails = dict(zip(self._sampled, self._meter.add(sample), strict=True))
        return moments, tails


def _indices(size: int) -> torch.Tensor:
    """Returns the positions of sampled elements, one from each stride."""
    return sample_indices(size, SAMPLED / size, 0)[:SAMPLED]


def _is_joining(ddp_model: DistributedDataParallel | None) -> bool:
    return bool(getattr(getattr(ddp_model, "_join_config", None), "enable", False))


def _positive(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value
