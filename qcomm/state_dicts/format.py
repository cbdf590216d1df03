"""The byte format of a state dict: a JSON header, then one packet or the plain bytes of each tensor.

No part of it is ever unpickled.

::

    8 bytes    "QCOMMSD1"
    8          n, the bytes of the header, little-endian
    n          header, JSON: {"tensors": [{"coding", "dtype", "shape", "bytes"}, ...], "state": ...}
    ...        the tensors in that order, each padded with zeros to a multiple of 8 from the beginning
    4          CRC-32 of everything before, little-endian

``coding`` is ``"packet"`` (docs/format.md) or ``"raw"``: little-endian values in row-major order. In ``state`` strings,
integers, booleans, null and finite numbers stand for themselves; everything else is an object with one key: ``tensor``
(its number), ``dict`` (list of [key, value]), ``list``, ``tuple``, ``float`` (``"nan"``, ``"inf"``, ``"-inf"``).
"""

import json
import math
import struct
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from qcomm.codec import CPU, DTYPE_NUMBERS, Grid, check_memory, compress, decode_into
from qcomm.errors import PacketError

__all__ = ["pack_state", "packed_size_limit", "unpack_state"]

MAGIC = b"QCOMMSD1"
PREAMBLE = struct.Struct("<8sQ")
CRC = struct.Struct("<I")
ALIGNMENT = 8
ADDRESSED_DEVICES = ("cpu", "cuda", "meta")
MAX_DEPTH = 64
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *DTYPE_NUMBERS,
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.complex64, torch.complex128),
    )
}
# Maximum number of bytes that a tensor takes in header and packet, beyond its values and its name.
TENSOR_SLACK_BYTES = 1024


def pack_state(
    state: object, grid: Grid, min_elements: int, lossless: Sequence[str] = (), num_threads: int = 1
) -> torch.Tensor:
    """Packs nested dictionaries, lists and tuples of tensors and plain values into a 1-D uint8 tensor.

    Args:
        state: tensors on any device; several that share memory and shape are stored once.
        grid: levels of floating-point tensors.
        min_elements: tensors with fewer elements are stored exactly.
        lossless: patterns of the paths (keys joined by dots) of further tensors that are stored exactly.
        num_threads: maximum number of threads; the result does not depend on it.

    Raises:
        TypeError, ValueError: a value cannot be stored; the message names its path.
    """
    packer = _Packer(grid, min_elements, lossless, num_threads)
    header = {"state": packer.describe(state, ()), "tensors": packer.records}
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii")
    parts = [_bytes(PREAMBLE.pack(MAGIC, len(text)) + text)]
    size = parts[0].numel()
    for payload in packer.payloads:
        padding = -size % ALIGNMENT
        parts += [torch.zeros(padding, dtype=torch.uint8, device=CPU), payload]
        size += padding + payload.numel()
    whole = torch.cat([*parts, torch.zeros(CRC.size, dtype=torch.uint8, device=CPU)])
    whole[size:] = _bytes(CRC.pack(zlib.crc32(whole[:size].numpy().data)))
    return whole


def packed_size_limit(tensors: Sequence[tuple[str, torch.Tensor]]) -> int:
    """Returns the maximum number of bytes that ``pack_state`` makes of a flat dictionary of ``tensors``."""
    # A character takes up to 12 bytes in JSON.
    return TENSOR_SLACK_BYTES + sum(tensor.nbytes + 12 * len(name) + TENSOR_SLACK_BYTES for name, tensor in tensors)


def unpack_state(packed: torch.Tensor, max_bytes: int | None = None, num_threads: int = 1) -> Any:
    """Restores the state that ``pack_state`` packed, with tensors on the CPU.

    Args:
        packed: 1-D uint8, contiguous, on the CPU.
        max_bytes: maximum number of bytes of the tensors; None for no limit.
        num_threads: maximum number of threads; the result does not depend on it.

    Raises:
        PacketError: the bytes are truncated, damaged, or no state dict at all.
    """
    body = packed[: -CRC.size]
    if packed.numel() < PREAMBLE.size + CRC.size:
        raise PacketError(f"{packed.numel()} bytes are too few for a state dict")
    magic, header_bytes = PREAMBLE.unpack(_slice(body, 0, PREAMBLE.size))
    if magic != MAGIC:
        raise PacketError(f"a state dict begins with {MAGIC!r}, this with {magic!r}")
    if CRC.pack(zlib.crc32(body.numpy().data)) != _slice(packed, body.numel(), CRC.size):
        raise PacketError("the checksum does not fit the bytes: they are damaged or truncated")
    at = PREAMBLE.size + header_bytes
    if at > body.numel():
        raise PacketError(f"the header claims {header_bytes} bytes, of {body.numel()} in all")
    try:
        header = json.loads(_slice(body, PREAMBLE.size, header_bytes))
    except (ValueError, RecursionError) as error:
        raise PacketError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict) or set(header) != {"state", "tensors"} or not isinstance(header["tensors"], list):
        raise PacketError("the header must have a state and a list of tensors")
    records = [_Record(number, record) for number, record in enumerate(header["tensors"])]
    total = sum(record.nbytes for record in records)
    if max_bytes is not None and total > max_bytes:
        raise PacketError(f"the tensors take {total} bytes, more than max_bytes={max_bytes}")
    tensors = []
    for record in records:
        at += -at % ALIGNMENT
        if record.stored_bytes > body.numel() - at:
            raise PacketError(f"tensor {record.number} claims {record.stored_bytes} bytes, more than there are")
        tensors.append(record.read(body[at : at + record.stored_bytes], num_threads))
        at += record.stored_bytes
    if at != body.numel():
        raise PacketError(f"{body.numel() - at} bytes follow the last tensor")
    return _restore(header["state"], tensors, 0)


class _Packer:
    """A packer that walks through a state and collects its tensors."""

    def __init__(self, grid: Grid, min_elements: int, lossless: Sequence[str], num_threads: int) -> None:
        self._grid = grid
        self._min_elements = max(min_elements, 1)
        self._lossless = tuple(lossless)
        self._num_threads = num_threads
        self._known: dict[tuple[Any, ...], int] = {}
        self.records: list[dict[str, Any]] = []
        self.payloads: list[torch.Tensor] = []

    def describe(self, value: object, path: tuple[object, ...]) -> Any:
        """Describes a value for the header.

        Subclasses of the stored types are refused, because they may hold more than is stored.
        """
        if len(path) > MAX_DEPTH:
            raise ValueError(f"{_shown(path)} is nested deeper than {MAX_DEPTH} levels; does it contain itself?")
        if value is None or type(value) in (bool, str):
            return value
        if isinstance(value, torch.Tensor):
            return {"tensor": self._add(value, path)}
        if type(value) is int:
            if not -(2**63) <= value < 2**63:
                raise ValueError(f"{_shown(path)} must fit 64 bits, got {value}")
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return {type(value).__name__: [self.describe(item, (*path, index)) for index, item in enumerate(value)]}
        if isinstance(value, dict) and type(value) in (dict, OrderedDict):
            return {"dict": [[_key(key, path), self.describe(item, (*path, key))] for key, item in value.items()]}
        raise TypeError(
            f"{_shown(path)} is a {type(value).__name__}; a state dict may hold tensors, dictionaries, lists, tuples, "
            "strings, numbers, booleans and None"
        )

    def _add(self, tensor: torch.Tensor, path: tuple[object, ...]) -> int:
        """Returns the number of a tensor, new or known, because tied weights occur several times."""
        # Memory of other devices may have no address before it is copied.
        readable = tensor if tensor.device.type in ADDRESSED_DEVICES else tensor.cpu()
        check_memory(_shown(path), readable)
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in DTYPES:
            hint = "; call .dequantize() first" if tensor.is_quantized else ""
            raise TypeError(f"{_shown(path)} must have a dtype among {sorted(DTYPES)}, got {tensor.dtype}{hint}")
        kept = any(fnmatchcase(".".join(map(str, path)), pattern) for pattern in self._lossless)
        identity = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg(), tensor.is_conj()
        if tensor.numel() and identity in self._known:
            number = self._known[identity]
            if not (kept and self.records[number]["coding"] == "packet"):
                return number
        values = readable.detach().resolve_conj().resolve_neg().cpu().contiguous()
        packed = not kept and tensor.dtype in DTYPE_NUMBERS and tensor.numel() >= self._min_elements
        if packed:
            payload = compress(values, self._grid, num_threads=self._num_threads)
        else:
            payload = values.reshape(-1).view(torch.uint8)
        self.records.append(
            {
                "coding": "packet" if packed else "raw",
                "dtype": name,
                "shape": list(tensor.shape),
                "bytes": payload.numel(),
            }
        )
        self.payloads.append(payload)
        self._known[identity] = len(self.records) - 1
        return len(self.records) - 1


class _Record:
    """A tensor as the header describes it, checked."""

    def __init__(self, number: int, record: object) -> None:
        self.number = number
        if not isinstance(record, dict) or set(record) != {"coding", "dtype", "shape", "bytes"}:
            raise PacketError(f"the header describes tensor {number} as {record!r}")
        shape, dtype = record["shape"], record["dtype"]
        if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
            raise PacketError(f"tensor {number} has the shape {shape!r}")
        if not isinstance(dtype, str) or dtype not in DTYPES or record["coding"] not in ("packet", "raw"):
            raise PacketError(f"tensor {number} has the dtype {dtype!r} and the coding {record['coding']!r}")
        if not _is_size(record["bytes"]):
            raise PacketError(f"tensor {number} has {record['bytes']!r} bytes")
        self.shape: list[int] = shape
        self.dtype = DTYPES[dtype]
        self.is_packet = record["coding"] == "packet"
        self.stored_bytes: int = record["bytes"]
        self.nbytes = math.prod(shape) * self.dtype.itemsize
        if self.is_packet and self.dtype not in DTYPE_NUMBERS:
            raise PacketError(f"tensor {number} is {dtype} in a packet")
        if not self.is_packet and self.stored_bytes != self.nbytes:
            raise PacketError(f"tensor {number} takes {self.nbytes} bytes, and the header says {self.stored_bytes}")

    def read(self, payload: torch.Tensor, num_threads: int) -> torch.Tensor:
        """Reads the tensor in ``payload``."""
        try:
            tensor = torch.empty(self.shape, dtype=self.dtype, device=CPU)
        except (RuntimeError, TypeError) as error:  # a constant packet of 80 bytes may claim terabytes
            raise PacketError(f"no memory for tensor {self.number}, which claims the shape {self.shape}") from error
        if not self.is_packet:
            if self.dtype == torch.bool and bool((payload > 1).any()):
                raise PacketError(f"tensor {self.number} is of booleans and holds other bytes than 0 and 1")
            tensor.reshape(-1).view(torch.uint8).copy_(payload)
            return tensor
        try:
            decode_into(payload, tensor, num_threads=num_threads)
        except (TypeError, ValueError) as error:  # the packet is damaged, or of another size or dtype
            raise PacketError(f"tensor {self.number}: {error}") from error
        return tensor


def _restore(described: object, tensors: Sequence[torch.Tensor], depth: int) -> Any:
    """Restores a described value: the inverse of ``_Packer.describe``."""
    if depth > MAX_DEPTH:
        raise PacketError(f"the state is nested deeper than {MAX_DEPTH} levels")
    if described is None or isinstance(described, (bool, str, int)):
        return described
    if isinstance(described, float) and math.isfinite(described):
        return described
    if isinstance(described, dict) and len(described) == 1:
        ((kind, value),) = described.items()
        if kind == "tensor" and _is_size(value) and value < len(tensors):
            return tensors[value]
        if kind == "float" and value in ("nan", "inf", "-inf"):
            return float(value)
        if kind in ("list", "tuple") and isinstance(value, list):
            items = [_restore(item, tensors, depth + 1) for item in value]
            return items if kind == "list" else tuple(items)
        if kind == "dict" and isinstance(value, list):
            return _restore_dict(value, tensors, depth)
    raise PacketError(f"the state holds {str(described)[:80]!r}, which stands for nothing")


def _restore_dict(pairs: Sequence[object], tensors: Sequence[torch.Tensor], depth: int) -> dict[object, Any]:
    restored: dict[object, Any] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (str, int) or pair[0] in restored:
            raise PacketError(f"a dictionary holds {str(pair)[:80]!r}, which is no pair of a new key and a value")
        restored[pair[0]] = _restore(pair[1], tensors, depth + 1)
    return restored


def _key(key: object, path: Sequence[object]) -> object:
    if type(key) is str or (type(key) is int and -(2**63) <= key < 2**63):
        return key
    raise TypeError(f"keys of {_shown(path)} must be strings or integers of 64 bits, got {key!r}")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _shown(path: Sequence[object]) -> str:
    return "state_dict" + "".join(f"[{key!r}]" for key in path)


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _slice(packed: torch.Tensor, start: int, length: int) -> bytes:
    return bytes(packed[start : start + length].numpy().data)
