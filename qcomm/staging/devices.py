"""Devices, their streams and their events, as torch offers them for every kind of accelerator."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

__all__ = ["check_device", "current", "device_types", "event_of"]


def device_types() -> tuple[str, ...]:
    """Returns the types of devices whose tensors can be averaged: the CPU, and the accelerator of this torch.

    Example:
        >>> device_types()[0]
        'cpu'
    """
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


@cache
def has_stream_pool(device: torch.device) -> bool:
    """Returns whether Futures can hand tensors of a device on: their callbacks take a stream of its pool. MPS has none.

    Example:
        >>> has_stream_pool(torch.device("cpu"))
        True
    """
    if device.type == "cpu":
        return True
    future: torch.futures.Future[None] = torch.futures.Future(devices=[device])
    try:
        future.then(lambda done: None)
        future.set_result(None)
    except RuntimeError:
        return False
    return True


def check_device(name: str, device: torch.device) -> None:
    """Raises ValueError, naming the argument, unless tensors on a device can be averaged.

    Example:
        >>> check_device("tensor", torch.device("cpu"))
    """
    if device.type not in device_types():
        raise ValueError(f"{name} must be on one of {device_types()}, got device {device}")
    if not has_stream_pool(device):
        raise ValueError(
            f"{name} must be on a device with a pool of streams, which torch's Futures need, got device {device}; "
            "average a copy on the CPU"
        )


@contextmanager
def current(stream: torch.Stream) -> Iterator[None]:
    """Makes ``stream`` the current one of its device on this thread, inside a ``with`` block."""
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


def event_of(stream: torch.Stream) -> torch.Event:
    """Returns an event that passes when the stream has done all that it has been given until now."""
    # A host thread that waits for it sleeps, where the device offers that.
    event = torch.Event(stream.device, blocking=True)
    event.record(stream)
    return event
