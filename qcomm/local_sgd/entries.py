"""Entries: the tensors of one exchange of weights, and the flat buffer in host memory in which they travel."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qcomm.codec import CPU, measure
from qcomm.collectives import TensorSpec

__all__ = ["Entry", "flatten", "part_of"]


@dataclass(frozen=True)
class Entry:
    """A tensor that takes part. Its difference is taken to ``anchor``; its values are exchanged if that is None.

    Attributes:
        spec: its place in the flat buffer.
        tensor: on any device.
        anchor: in host memory, of the tensor's dtype or a wider one.
        is_buffer: whether the module computes it, and no optimizer.
    """

    spec: TensorSpec
    tensor: torch.Tensor
    anchor: torch.Tensor | None
    is_buffer: bool


def flatten(entries: Sequence[Entry]) -> torch.Tensor:
    """Returns values or differences in row-major order, whatever the tensors' layout; float64 if one of them is.

    A difference is taken to the anchor in the tensor's dtype, as the tensor held it. Tensors on a device are copied to
    host memory, which waits for what computes them.

    Raises:
        FloatingPointError: naming the tensor with a value that is not finite. Buffers may hold infinities, as masks do.
    """
    wide = any(entry.tensor.dtype == torch.float64 for entry in entries)
    flat = torch.empty(
        sum(entry.spec.numel for entry in entries), dtype=torch.float64 if wide else torch.float32, device=CPU
    )
    with torch.no_grad():
        for entry in entries:
            part = part_of(entry, flat)
            part.copy_(entry.tensor.to(CPU))
            if entry.anchor is not None:
                part.sub_(entry.anchor.to(entry.tensor.dtype))
    if not measure(flat).finite:
        for entry in entries:
            _check_finite(entry, part_of(entry, flat))
    return flat


def part_of(entry: Entry, flat: torch.Tensor) -> torch.Tensor:
    """Returns the part of the flat buffer that belongs to an entry, in the shape of its tensor."""
    spec = entry.spec
    return flat[spec.offset : spec.offset + spec.numel].view(entry.tensor.shape)


def _check_finite(entry: Entry, part: torch.Tensor) -> None:
    bad = part.isnan() if entry.is_buffer else ~part.isfinite()
    if count := int(bad.sum()):
        raise FloatingPointError(
            f"{entry.spec.key!r} has {count} of {part.numel()} values that are not finite, or too far from those of "
            "the last averaging"
        )
