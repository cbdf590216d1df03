"""Compressed state dicts in files, which are safe to read even from untrusted sources."""

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qcomm.codec import CPU, Grid, RangeGrid
from qcomm.collectives import ReduceOptions
from qcomm.errors import PacketError
from qcomm.state_dicts.format import pack_state, unpack_state

__all__ = ["SENSITIVE", "load", "save"]

# Non-negative values that others are divided by, or by the root of: a uniform grid would round the small ones to the
# minimum, and the quotients would explode. BatchNorm; Adam, AdamW, AMSGrad; RMSprop, Adadelta; Adagrad.
SENSITIVE = ("*running_var", "*exp_avg_sq", "*square_avg", "*acc_delta", "*.sum")


def save(
    state_dict: Mapping[str, Any],
    path: str | os.PathLike[str],
    grid: Grid = RangeGrid(),
    *,
    min_elements: int = 1024,
    lossless: Sequence[str] = SENSITIVE,
    num_threads: int = 1,
) -> None:
    """Writes a state dict to a file with compressed weights. The file appears whole or not at all.

    Floating-point tensors of at least ``min_elements`` elements are compressed. With ``RangeGrid`` a weight takes N
    bits or fewer, N = 6 to 10 by the tensor's entropy. Its error is at most ``(max - min) / (2**N - 1) / 2`` of its
    tensor, plus rounding. With ``SigmaGrid`` the error is at most half a step. Everything else is stored exactly:
    integers, booleans, complex and small tensors, non-finite tensors, numbers and strings.

    Args:
        state_dict: of a model, an optimizer, or a dictionary of those: dictionaries, lists and tuples of tensors,
            strings, finite and other floats, 64-bit integers, booleans and None; keys are strings or integers. An
            ``OrderedDict`` comes back as a dict, a parameter as a tensor. Tensors that share their memory do so again.
        path: path of the file; an existing file is replaced.
        grid: levels of the quantization.
        min_elements: tensors with fewer elements are stored exactly.
        lossless: patterns (``fnmatch``) of tensors that are stored exactly, matched with the keys joined by dots,
            such as ``state.0.exp_avg_sq``. The default is ``qcomm.state_dicts.files.SENSITIVE``: variances and second
            moments, which others are divided by.
        num_threads: maximum number of threads; the result does not depend on it.

    Raises:
        TypeError, ValueError: an argument is invalid, or a value cannot be stored; the message names it.
        OSError: the file cannot be written; an existing file is not modified.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> model = torch.nn.Linear(100, 100)
        >>> save(model.state_dict(), f"{folder}/model.qcomm")
        >>> restored = load(f"{folder}/model.qcomm")
        >>> bool((restored["weight"] - model.weight).abs().max() < 0.001), torch.equal(restored["bias"], model.bias)
        (True, True)
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a dictionary, got {type(state_dict).__name__}")
    ReduceOptions(grid, min_elements=min_elements, num_threads=num_threads)  # checks them
    if isinstance(lossless, str) or not all(isinstance(pattern, str) for pattern in lossless):
        raise TypeError(f"lossless must be a sequence of patterns, such as ['*.bias'], got {lossless!r}")
    packed = pack_state(state_dict, grid, min_elements, lossless, num_threads)
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    file = temporary.open("xb")
    try:
        with file:
            file.write(packed.numpy().data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:  # Ctrl-C must not leave the temporary file behind either
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str], *, max_bytes: int | None = None, num_threads: int = 1) -> dict[str, Any]:
    """Reads a file that ``save`` wrote.

    Nothing in the file is executed, so that it may come from an untrusted source.

    Args:
        path: path of the file.
        max_bytes: maximum number of bytes that its tensors may take together in memory. Set it for untrusted files,
            because a tensor of equal values takes almost no space in a file, however large it is.
        num_threads: maximum number of threads; the result does not depend on it.

    Returns:
        The state dict, its tensors on the CPU.

    Raises:
        PacketError: the file is truncated, damaged, or not from ``save``; the message has its path.
        OSError: the file cannot be read.
    """
    data = bytearray(Path(path).read_bytes())
    packed = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8, device=CPU)
    try:
        state = unpack_state(packed, max_bytes, num_threads)
        if not isinstance(state, dict):
            raise PacketError("it holds no dictionary")
    except PacketError as error:
        raise PacketError(f"{os.fspath(path)}: {error}") from error
    return state
