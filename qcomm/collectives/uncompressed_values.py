"""Terms of a mean without compression: the buffer itself, or its values mostly rounded to bfloat16."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from qcomm.codec import divide_to_bfloat, is_on_device
from qcomm.collectives.layout import BucketLayout, Chunk
from qcomm.collectives.packing import scatter_chunk
from qcomm.collectives.telemetry import Telemetry
from qcomm.transport import Traffic

__all__ = ["BYPASSED", "UNCOMPRESSED", "Bypassing", "UncompressedValues", "count_rings", "fingerprint", "is_rounded"]

UNCOMPRESSED = ("none", "bf16")


def is_rounded(strategy: str, layout: BucketLayout, dtype: torch.dtype) -> bool:
    """Returns whether an uncompressed strategy rounds: "bf16" does float32 values, where it saves bytes.

    Values that must not be rounded travel a second time, beside the others, which costs messages. So tensors too small
    to be compressed are rounded, and only excluded ones are not.

    Example:
        >>> from qcomm.collectives.layout import TensorSpec
        >>> tensors = [TensorSpec("weight", 0, 100, True), TensorSpec("bias", 100, 10, False, may_round=True)]
        >>> layout = BucketLayout(tensors, world_size=2)
        >>> is_rounded("bf16", layout, torch.float32), is_rounded("bf16", layout, torch.float16)
        (True, False)
    """
    return strategy == "bf16" and dtype == torch.float32 and 2 * layout.exact_elements < layout.elements


class UncompressedValues:
    """Tensors that are summed over all ranks in place of a buffer; their memory may serve one buffer after another.

    Args:
        strategy: ``"none"``: the buffer itself. ``"bf16"``: its values rounded to bfloat16, and in a separate tensor
            the values that must not be rounded.
        layout: of the buffers.
        dtype: of the buffers.
        device: of the buffers; None for the CPU.
    """

    def __init__(
        self, strategy: str, layout: BucketLayout, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        self._layout = layout
        self._rounded: torch.Tensor | None = None
        if is_rounded(strategy, layout, dtype):
            self._rounded = torch.empty(layout.elements, dtype=torch.bfloat16, device=device)
            self._exact = torch.empty(layout.exact_elements, dtype=dtype, device=device)

    def load(self, buffer: torch.Tensor) -> Sequence[torch.Tensor]:
        """Returns a buffer's values as this rank's share of the mean.

        The values are divided first, so that 16-bit sums do not overflow.

        Returns:
            The tensors to be summed, each in place. Without rounding that is the buffer.
        """
        if self._rounded is None:
            return [buffer.div_(self._layout.world_size)]
        if is_on_device(buffer):
            self._rounded.copy_(buffer).div_(self._layout.world_size)
        else:
            divide_to_bfloat(buffer, self._layout.world_size, self._rounded)
        if not self._layout.exact_runs:
            return [self._rounded]
        torch.cat([buffer[offset : offset + length] for offset, length in self._layout.exact_runs], out=self._exact)
        return [self._rounded, self._exact.div_(self._layout.world_size)]

    def fingerprint(self, buffer: torch.Tensor) -> int:
        """Returns the :func:`fingerprint` of the sums of the buffer that was loaded."""
        if self._rounded is None:
            return fingerprint([buffer])
        return fingerprint([self._rounded, self._exact] if self._layout.exact_runs else [self._rounded])

    def store(self, buffer: torch.Tensor) -> None:
        """Copies the sums into the buffer that was loaded."""
        if self._rounded is not None:
            buffer.copy_(self._rounded)
            if self._layout.exact_runs:
                scatter_chunk(self._exact, Chunk((), self._layout.exact_runs), buffer)


# Collectives of a kind between two agreements, which cost up to a tenth of an all-reduce. A difference between ranks is
# not noticed before. With the agreement they are a prime number: a model that alternates between kinds of steps is not
# always agreed on at the same kind.
BYPASSED = 30


@dataclass
class Bypassing:
    """Collectives of a caller that run without an agreement: the caller sums the values itself.

    Attributes:
        count: number of them since the last agreement.
        memory: of the values that are summed, by strategy; agreed collectives use it as well.
        means: their fingerprints, by collective, for the agreement to compare.
    """

    count: int = 0
    memory: dict[str, UncompressedValues] = field(default_factory=dict)
    means: Mapping[str, int] = field(default_factory=dict)


def fingerprint(tensors: Sequence[torch.Tensor]) -> int:
    """Returns a number that changes with any one bit of some contiguous tensors: the sum of their words of 64 bits.

    Example:
        >>> mean = torch.tensor([1.0, 2.0, 3.0])
        >>> fingerprint([mean]) == fingerprint([mean.nextafter(torch.tensor(0.0))])
        False
    """
    total = 0
    for tensor in tensors:
        if _is_whole_words(tensor):  # as nearly all means are; the other way takes many more calls of torch
            total += int(tensor.view(torch.int64).sum())
            continue
        data = tensor.reshape(-1).view(torch.uint8)
        whole = data.numel() // 8 * 8
        # A view of words needs their alignment, in memory and in its storage.
        aligned = data.data_ptr() % 8 == 0 and data.storage_offset() % 8 == 0
        words = data[:whole] if aligned else data[:whole].clone()
        total += int(words.view(torch.int64).sum()) + int.from_bytes(bytes(data[whole:].tolist()), "little")
    return total & (2**64 - 1)


def _is_whole_words(tensor: torch.Tensor) -> bool:
    """Returns whether a contiguous tensor may be viewed as words of 64 bits."""
    if tensor.dim() != 1 or tensor.nbytes % 8 or tensor.data_ptr() % 8 or not tensor.numel():
        return False
    return tensor.storage_offset() * tensor.element_size() % 8 == 0


def count_rings(telemetry: Telemetry, strategy: str, layout: BucketLayout, dtype: torch.dtype, times: int = 1) -> None:
    """Counts the bytes of gloo's rings: each of two phases carries every element once."""
    rounded = is_rounded(strategy, layout, dtype)
    item, more = (torch.bfloat16.itemsize, layout.exact_elements * dtype.itemsize) if rounded else (dtype.itemsize, 0)
    sizes = [size * (layout.world_size - 1) // layout.world_size for size in (layout.elements * item, more)]
    for phase in (1, 2):
        telemetry.add_traffic(f"phase{phase}", Traffic(times * sum(sizes), times * sum(sizes)))
        telemetry.count_uncompressed(phase, layout, item, more, times)
