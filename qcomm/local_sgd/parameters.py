"""Parameters by name, from parameters, named parameters, or an optimizer's groups."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from qcomm.codec import DTYPE_NUMBERS, check_floats, check_memory
from qcomm.staging import device_types

__all__ = ["BUFFER", "Params", "check_averageable", "check_writable", "described", "floating_buffers", "named_tensors"]

BUFFER = "buffer "  # before the names of buffers
Params = Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Iterable[Mapping[str, Any]]


def named_tensors(params: Params) -> list[tuple[str, torch.Tensor]]:
    """Returns each parameter once, in the order given, with its name or as ``"parameter <number>"`` without one.

    Args:
        params: ``model.parameters()``, ``model.named_parameters()`` or ``optimizer.param_groups``, which hold names
            where the optimizer was made with named parameters.

    Raises:
        TypeError, ValueError: ``params`` has another type, is empty, or has one name for two parameters.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> [name for name, _ in named_tensors(layer.parameters())]
        ['parameter 0', 'parameter 1']
        >>> [name for name, _ in named_tensors(torch.optim.SGD(layer.named_parameters()).param_groups)]
        ['weight', 'bias']
    """
    if isinstance(params, (torch.Tensor, Mapping, str)) or not isinstance(params, Iterable):
        raise TypeError(
            "params must be an iterable of parameters, of (name, parameter) or of parameter groups, got "
            f"{type(params).__name__}"
        )
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in _flattened(params):
        if id(tensor) in seen:
            continue
        known = f"parameter {len(seen)}" if name is None else name
        if known in found:
            raise ValueError(f"params must have a name for each parameter, got {known!r} twice")
        seen.add(id(tensor))
        found[known] = tensor
    if not found:
        raise ValueError("params must hold at least one parameter; has a generator been used up?")
    return list(found.items())


def _flattened(params: Iterable[Any]) -> Iterable[tuple[str | None, torch.Tensor]]:
    for number, item in enumerate(params):
        if isinstance(item, torch.Tensor):
            yield None, item
        elif isinstance(item, Mapping) and isinstance(item.get("params"), Sequence):
            names = item.get("param_names") or [None] * len(item["params"])
            yield from zip(names, item["params"], strict=True)
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
            yield item
        else:
            raise TypeError(
                f"params must hold parameters, pairs of name and parameter, or parameter groups; number {number} is "
                f"a {type(item).__name__}"
            )


def floating_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Returns a module's buffers that can be averaged, such as BatchNorm's running mean and variance."""
    return [(name, buffer) for name, buffer in module.named_buffers() if buffer.dtype in DTYPE_NUMBERS]


def check_writable(name: str, tensor: object, devices: Sequence[str] = ("cpu",)) -> None:
    """Raises TypeError or ValueError, with ``name``, unless ``tensor`` is dense, on a device, and can be written to.

    Args:
        name: of the tensor.
        tensor: to write to.
        devices: types of devices, beginning with the CPU.

    Example:
        >>> check_writable("weight", torch.zeros(1).expand(3))
        Traceback (most recent call last):
            ...
        ValueError: 'weight' must not be expanded: several of its elements share one place in memory
    """
    if isinstance(tensor, torch.Tensor) and is_lazy(tensor):
        raise ValueError(f"{name!r} has no shape yet: run the model once first")
    tensor = check_memory(repr(name), tensor)
    if tensor.device.type not in devices:
        place = "the CPU" if len(devices) == 1 else f"one of {tuple(devices)}"
        raise ValueError(f"{name!r} must be a dense tensor on {place}, got one on {tensor.device}")
    if tensor.is_inference():
        raise ValueError(f"{name!r} must not be an inference tensor; clone it outside inference mode")
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{name!r} must not be expanded: several of its elements share one place in memory")


def check_averageable(name: str, tensor: torch.Tensor) -> None:
    """Raises TypeError or ValueError, with ``name``, unless ``tensor`` can be averaged in place, on any device."""
    devices = device_types()
    check_writable(name, tensor, devices)
    check_floats(repr(name), tensor, devices)


def described(tensors: Sequence[tuple[str, torch.Tensor]]) -> str:
    """Returns names, dtypes and shapes as one line, for the comparison between ranks."""
    return "; ".join(
        f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in tensors
    )
