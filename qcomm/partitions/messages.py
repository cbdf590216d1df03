"""Messages between neighbouring partitions: a header, and the features and labels of one batch behind it.

A header is 22 int64, little-endian::

    MAGIC, kind, epoch, number of the batch in it,
    dtype of the features, number of dimensions, 6 dimensions,
    dtype of the labels, number of dimensions, 4 dimensions,
    1 if the features are a packet of the codec and 0 if they are raw, their bytes,
    CRC-32 of everything behind the header, CRC-32 of the 21 words before

In a message without a payload the words between are zero, and the number of an END is that of the epoch's batches.
Whatever a header says is checked before memory is asked for.
"""

import math
import struct
import zlib
from enum import IntEnum
from typing import NamedTuple

import torch

from qcomm.codec import CPU, Grid, compress, decompress
from qcomm.errors import PacketError
from qcomm.partitions.stage import Batch

__all__ = ["HEADER_BYTES", "Header", "Kind", "batch_bytes", "control", "decoded", "encoded", "end_header", "parsed"]

# "qcomm", a letter of its own, and the version of this protocol.
MAGIC = 0x71636F6D6D70_01
WORDS = struct.Struct("<22q")
CHECKED = struct.Struct("<21q")
HEADER_BYTES = WORDS.size
MOST_DIMENSIONS, MOST_LABEL_DIMENSIONS = 6, 4
PACKET_OVERHEAD = 128  # of a packet, compared with its tensor
FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32, torch.float64)


class Kind(IntEnum):
    """The meaning of a message."""

    BATCH = 1
    END = 2  # of the epoch
    CREDIT = 3  # back: a batch was taken out of the queue
    DONE = 4  # back: the epoch has ended here and in all partitions behind


class Header(NamedTuple):
    """A checked header of a batch or an END."""

    kind: Kind
    number: int
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    label_shape: tuple[int, ...] = ()
    label_dtype: torch.dtype = torch.int64
    is_packet: bool = False
    feature_bytes: int = 0
    checksum: int = 0

    @property
    def payload_bytes(self) -> int:
        """The bytes behind the header."""
        return self.feature_bytes + math.prod(self.label_shape) * self.label_dtype.itemsize if self.shape else 0


def batch_bytes(batch: Batch) -> int:
    """Returns the bytes of features and labels as tensors."""
    return batch.values.nbytes + batch.labels.nbytes


def check_batch(batch: Batch, max_batch_bytes: int) -> None:
    """Raises TypeError or ValueError for a batch that no message can carry, naming what is wrong."""
    values, labels = batch
    if values.dtype not in FEATURE_DTYPES:
        raise TypeError(f"features must be of one of {FEATURE_DTYPES}, got {values.dtype}")
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"labels must be of one of {LABEL_DTYPES}, got {labels.dtype}")
    if not 1 <= values.dim() <= MOST_DIMENSIONS or not 1 <= labels.dim() <= MOST_LABEL_DIMENSIONS:
        raise ValueError(
            f"features must have 1 to {MOST_DIMENSIONS} dimensions and labels 1 to {MOST_LABEL_DIMENSIONS}, got "
            f"{tuple(values.shape)} and {tuple(labels.shape)}"
        )
    if len(values) != len(labels) or not values.numel():
        raise ValueError(
            f"features and labels must be of equally many samples, at least one, got shapes {tuple(values.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if batch_bytes(batch) > max_batch_bytes:
        raise ValueError(f"max_batch_bytes is {max_batch_bytes}; a batch has {batch_bytes(batch)} bytes: raise it")


def encoded(
    batch: Batch, grid: Grid | None, epoch: int, number: int, max_batch_bytes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns header and payload of a batch, both 1-D uint8, which share no memory with it.

    Args:
        batch: of dtypes and shapes that the header can describe.
        grid: of the features; None sends them raw. Labels are always exact.
        epoch, number: of the batch.
        max_batch_bytes: maximum of its tensors.

    Raises:
        TypeError, ValueError: naming what cannot be sent.
    """
    check_batch(batch, max_batch_bytes)
    values, labels = (tensor.detach().to(CPU).contiguous() for tensor in batch)
    # Without checksums of its own: one covers the whole payload.
    features = _bytes_of(values) if grid is None else compress(values, grid, checksum=False)
    payload = torch.cat([features, _bytes_of(labels)])
    words = [MAGIC, Kind.BATCH, epoch, number]
    words += [FEATURE_DTYPES.index(values.dtype), values.dim(), *_padded(values.shape, MOST_DIMENSIONS)]
    words += [LABEL_DTYPES.index(labels.dtype), labels.dim(), *_padded(labels.shape, MOST_LABEL_DIMENSIONS)]
    words += [int(grid is not None), features.numel(), _checksum(payload)]
    return _sealed(words), payload


def end_header(epoch: int, batches: int) -> torch.Tensor:
    """Returns the message that ends an epoch of ``batches``."""
    return control(Kind.END, epoch, batches)


def control(kind: Kind, epoch: int, number: int) -> torch.Tensor:
    """Returns a message without a payload."""
    return _sealed([MAGIC, kind, epoch, number, *[0] * 17])


def parsed(message: torch.Tensor, kinds: tuple[Kind, ...], epoch: int, number: int, max_batch_bytes: int) -> Header:
    """Returns the header in a message, whose bytes are not trusted.

    Args:
        message: HEADER_BYTES, uint8.
        kinds: that may come.
        epoch, number: that are due.
        max_batch_bytes: maximum of features and labels, as tensors.

    Raises:
        PacketError: it is no such header; the message says why.
    """
    raw = bytes(message.numpy())
    words = WORDS.unpack(raw)
    if words[-1] != zlib.crc32(raw[: CHECKED.size]):
        raise PacketError("a header was damaged on its way (wrong checksum)")
    magic, kind, found_epoch, found_number, dtype, dims = words[:6]
    if magic != MAGIC or kind not in tuple(map(int, kinds)) or (found_epoch, found_number) != (epoch, number):
        due = " or ".join(each.name for each in kinds)
        raise PacketError(f"a header starts with {words[:4]}, where {due} {number} of epoch {epoch} is due")
    if kind != Kind.BATCH:
        return Header(Kind(kind), number)
    label_dtype, label_dims = words[12:14]
    is_packet, feature_bytes, checksum = words[18:21]
    known = 0 <= dtype < len(FEATURE_DTYPES) and 0 <= label_dtype < len(LABEL_DTYPES) and is_packet in (0, 1)
    if not (known and 1 <= dims <= MOST_DIMENSIONS and 1 <= label_dims <= MOST_LABEL_DIMENSIONS):
        raise PacketError(f"a header describes no tensors: {words}")
    shape, label_shape = words[6 : 6 + dims], words[14 : 14 + label_dims]
    header = Header(
        Kind.BATCH,
        number,
        shape,
        FEATURE_DTYPES[dtype],
        label_shape,
        LABEL_DTYPES[label_dtype],
        bool(is_packet),
        feature_bytes,
        checksum,
    )
    if min(*shape, *label_shape) < 0 or shape[0] != label_shape[0] or not math.prod(shape):
        raise PacketError(f"a header has features {shape} and labels {label_shape}, not of equally many samples")
    raw_bytes = math.prod(shape) * header.dtype.itemsize
    label_bytes = math.prod(label_shape) * header.label_dtype.itemsize
    if raw_bytes + label_bytes > max_batch_bytes:
        raise PacketError(f"a batch claims {raw_bytes + label_bytes} bytes, above max_batch_bytes={max_batch_bytes}")
    right = 0 < feature_bytes <= raw_bytes + PACKET_OVERHEAD if is_packet else feature_bytes == raw_bytes
    if not right:
        raise PacketError(f"a header says that features {shape} take {feature_bytes} bytes")
    return header


def decoded(header: Header, payload: torch.Tensor) -> Batch:
    """Returns the batch in a payload, whose bytes are not trusted.

    Raises:
        PacketError: the bytes are damaged, or are not what the header says.
    """
    if _checksum(payload) != header.checksum:
        raise PacketError("a batch was damaged on its way (wrong checksum)")
    part, rest = payload[: header.feature_bytes], payload[header.feature_bytes :]
    if header.is_packet:
        values = decompress(part, max_bytes=math.prod(header.shape) * header.dtype.itemsize)
        if values.shape != header.shape or values.dtype != header.dtype:
            raise PacketError(
                f"a packet holds {values.dtype} of shape {tuple(values.shape)}, its header says {header.dtype} of "
                f"shape {header.shape}"
            )
    else:
        values = part.clone().view(header.dtype).reshape(header.shape)
    return Batch(values, rest.clone().view(header.label_dtype).reshape(header.label_shape))


def _sealed(words: list[int]) -> torch.Tensor:
    raw = CHECKED.pack(*words)
    return torch.frombuffer(bytearray(WORDS.pack(*words, zlib.crc32(raw))), dtype=torch.uint8)


def _padded(shape: torch.Size, count: int) -> list[int]:
    return [*shape, *[0] * (count - len(shape))]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _checksum(payload: torch.Tensor) -> int:
    return zlib.crc32(payload.numpy().data)
