"""A profile measured from any module: the time at which each gradient is ready."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qcomm.planner.errors import PlanError
from qcomm.planner.profiles import ModelProfile, ParameterTensor

__all__ = ["profile"]


def profile(
    model: nn.Module,
    example: Any,
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
    repeats: int = 3,
    name: str | None = None,
) -> ModelProfile:
    """Runs forward and backward, and notes when each parameter's gradient has been made.

    The model's gradients are left as they were. Modes and buffers that forward changes are not restored.

    Args:
        model: any module, on any one device.
        example: a batch: a tensor whose first dimension is the batch, a tuple of such, or a mapping of keyword
            arguments.
        loss: makes a scalar of the model's output; by default the mean of the first floating-point tensor in it.
        repeats: number of timed runs, of which the median counts; an untimed run precedes them.
        name: name in tables; that of the class by default.

    Returns:
        A profile that needs no GPU preset: its times are those of this device and this batch.

    Raises:
        PlanError: the example holds no tensor, the output holds nothing to differentiate, or ``repeats`` is below 1.

    Example:
        >>> found = profile(nn.Linear(8, 4), torch.zeros(16, 8))
        >>> [tensor.shape for tensor in found.tensors], found.measured_batch
        ([(4,), (4, 8)], 16)
    """
    if repeats < 1:
        raise PlanError(f"repeats is {repeats}; it must be at least 1")
    inputs = list(_tensors(example))
    if not inputs or inputs[0].dim() == 0 or len(inputs[0]) == 0:
        raise PlanError("example must hold a tensor whose first dimension is a batch of at least one sample")
    batch = len(inputs[0])
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    kept = {key: value.grad for key, value in parameters.items()}
    ready: dict[str, float] = {}
    clock = _clock(inputs[0].device)

    def note(key: str) -> Callable[[torch.Tensor], None]:
        return lambda _: ready.__setitem__(key, clock())

    hooks = [value.register_post_accumulate_grad_hook(note(key)) for key, value in parameters.items()]
    forward: list[float] = []
    gaps: dict[str, list[float]] = {key: [] for key in parameters}
    order: list[str] = []
    try:
        for run in range(repeats + 1):
            ready.clear()
            model.zero_grad(set_to_none=True)
            begin = clock()
            scalar = (loss or _mean)(_call(model, example))
            middle = clock()
            scalar.backward()
            if run == 0:
                continue  # the first run fills caches and allocates
            forward.append(middle - begin)
            order, before = sorted(ready, key=ready.__getitem__), middle
            for key in order:
                gaps[key].append(ready[key] - before)
                before = ready[key]
    finally:
        for hook in hooks:
            hook.remove()
        for key, value in parameters.items():
            value.grad = kept[key]
    tensors = tuple(
        ParameterTensor(key, tuple(parameters[key].shape), backward_seconds=max(0.0, statistics.median(gaps[key])))
        for key in order
    )
    values = sum(tensor.numel() for tensor in inputs) // batch
    size = sum(tensor.nbytes for tensor in inputs) // batch
    return ModelProfile(
        name or type(model).__name__,
        "measured",
        tensors,
        "samples",
        values,
        size,
        measured_batch=batch,
        measured_forward_seconds=statistics.median(forward),
    )


def _clock(device: torch.device) -> Callable[[], float]:
    """Returns a clock, in seconds, that first waits until the device has finished its work."""
    if device.type == "cpu":
        return time.perf_counter

    def after_device() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return after_device


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _tensors(part)


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def _mean(output: Any) -> torch.Tensor:
    """Returns the mean of the first floating-point tensor; models of transformers return mappings and tuples."""
    for tensor in _tensors(output if not hasattr(output, "to_tuple") else output.to_tuple()):
        if tensor.is_floating_point() and tensor.requires_grad:
            return tensor.mean()
    raise PlanError("the model's output holds no floating-point tensor to differentiate; pass loss=")
