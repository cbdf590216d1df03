"""Readers for the two file formats that the image data sets come in: idx and CIFAR's pickled batches.

Neither trusts its input: sizes are checked before memory is allocated, and a pickle can name nothing but byte arrays.
"""

import gzip
import math
import pickle
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qcomm.recipes.errors import RecipeError

_GZIP_MAGIC = b"\x1f\x8b"
_IDX_UINT8 = 0x08
_MAX_IDX_BYTES = 1 << 31  # far above any data set read here; a corrupt size field must not ask for terabytes


def read_idx(path: Path) -> Tensor:
    """Reads an idx file of unsigned bytes, gzip-compressed or not (told by content, not by name).

    Layout: two zero bytes, the type (8: unsigned byte), the number of dimensions, each dimension as a big-endian u32,
    the values in row-major order. Source: yann.lecun.com/exdb/mnist.

    Args:
        path: the file.

    Returns:
        A uint8 tensor of the shape that the file names.

    Raises:
        RecipeError: the file is not an idx file of bytes, its length contradicts its sizes, or gzip data is damaged.
    """
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            if not compressed:
                return _parse_idx(raw, path)
            with gzip.GzipFile(fileobj=raw) as unpacked:
                return _parse_idx(unpacked, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise RecipeError(f"{path} is damaged gzip data: {error}") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error


def _parse_idx(stream: BinaryIO | gzip.GzipFile, path: Path) -> Tensor:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _IDX_UINT8 or not 1 <= magic[3] <= 4:
        raise RecipeError(
            f"{path} is not an idx file of unsigned bytes: it starts with {magic.hex(' ') or 'nothing'}, "
            "not with 00 00 08 and 1 to 4 dimensions"
        )
    sizes = stream.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise RecipeError(f"{path} ends inside its header")
    shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4)]
    count = math.prod(shape)
    if count > _MAX_IDX_BYTES:
        raise RecipeError(f"{path} says it holds {count} bytes (shape {shape}); more than {_MAX_IDX_BYTES} is refused")
    data = bytearray(stream.read(count + 1))
    if len(data) != count:
        held = "more" if len(data) > count else f"{len(data)} bytes"
        raise RecipeError(f"{path} says it holds {count} bytes (shape {shape}) but holds {held}")
    return torch.frombuffer(data, dtype=torch.uint8).reshape(shape) if count else torch.empty(shape, dtype=torch.uint8)


class _Dtype:
    """A stand-in for numpy.dtype while a pickle is read."""

    def __init__(self, name: object, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Ignores byte order and alignment, which are meaningless for single bytes."""


class _Array:
    """A stand-in for numpy.ndarray while a pickle is read, which keeps its state and runs none of numpy's code."""

    shape: tuple[int, ...] = ()
    data: bytes = b""
    valid = False

    def __setstate__(self, state: object) -> None:
        match state:
            case (int(), tuple() as shape, _Dtype(name="u1" | b"u1"), False | 0, bytes() as data) if all(
                isinstance(size, int) and size >= 0 for size in shape
            ):
                self.shape, self.data = shape, data
                self.valid = len(data) == math.prod(shape)


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _latin1(text: object, encoding: object = "latin1") -> bytes:
    """Replaces ``_codecs.encode``, by which Python 3 writes bytes into protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError("only latin1 text can become bytes")
    return text.encode("latin1")


_ALLOWED_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}


class ByteArrayUnpickler(pickle.Unpickler):
    """A reader of pickles of dicts, lists, tuples, numbers, text, bytes and numpy byte arrays.

    It refuses every other name.

    A pickle can otherwise call any function that is importable. The names that numpy's arrays need map to stand-ins, so
    that no code outside this module runs.
    """

    def find_class(self, module: str, name: str) -> Any:
        """Returns the stand-in for a name that numpy's byte arrays need; any other name is an error."""
        try:
            return _ALLOWED_GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the pickle names {module}.{name}, which image data does not need") from None

    def persistent_load(self, pid: Any) -> Any:
        """Refuses references to objects outside the pickle."""
        raise pickle.UnpicklingError("the pickle refers to an object outside itself")


# The exceptions that pickle's documentation names for damaged input, and those of malformed opcodes and sizes.
DAMAGED_PICKLE = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    MemoryError,
)


def read_cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Reads one file of CIFAR-10's python version. Source: www.cs.toronto.edu/~kriz/cifar.html.

    Args:
        path: the file, a pickled dict with ``data`` (n x 3072 bytes: red, green, blue planes) and ``labels``.

    Returns:
        Images, uint8 ``[n, 3, 32, 32]``, and labels, int64 ``[n]`` in 0..9.

    Raises:
        RecipeError: not such a pickle, or a pickle that names anything but byte arrays.
    """
    try:
        with path.open("rb") as stream:
            batch = ByteArrayUnpickler(stream, encoding="bytes").load()
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error
    except DAMAGED_PICKLE as error:
        raise RecipeError(f"{path} is not a CIFAR-10 batch: {type(error).__name__}: {error}") from error
    if not isinstance(batch, dict):
        raise RecipeError(f"{path} is not a CIFAR-10 batch: it holds a {type(batch).__name__}, not a dict")
    data = batch.get(b"data", batch.get("data"))
    labels = batch.get(b"labels", batch.get("labels"))
    if not isinstance(data, _Array) or not data.valid or data.shape[1:] != (3 * 32 * 32,) or data.shape[0] == 0:
        raise RecipeError(f"{path} is not a CIFAR-10 batch: 'data' is not an array of n x 3072 unsigned bytes")
    if not isinstance(labels, list) or len(labels) != data.shape[0] or not _are_labels(labels, 10):
        raise RecipeError(f"{path} is not a CIFAR-10 batch: 'labels' is not a list of {data.shape[0]} numbers in 0..9")
    images = torch.frombuffer(bytearray(data.data), dtype=torch.uint8).reshape(-1, 3, 32, 32)
    return images, torch.tensor(labels, dtype=torch.int64)


def _are_labels(labels: Iterable[object], num_classes: int) -> bool:
    return all(isinstance(label, int) and 0 <= label < num_classes for label in labels)
