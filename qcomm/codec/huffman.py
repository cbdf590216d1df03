"""Canonical, length-limited Huffman codes."""

import torch

from qcomm.codec import _native
from qcomm.codec.checks import check_memory

__all__ = ["MAX_CODE_LENGTH", "canonical_codes", "code_lengths"]

MAX_CODE_LENGTH = 15


def code_lengths(counts: torch.Tensor, limit: int = MAX_CODE_LENGTH) -> torch.Tensor:
    """Returns the codeword lengths of an optimal prefix code whose codewords have at most ``limit`` bits.

    Args:
        counts: frequency of each symbol, a 1-D integer tensor of at most 4096 entries with a sum below 2**48.
        limit: 1..15; at most ``2**limit`` symbols may be in use.

    Returns:
        uint8 tensor: 0 for an unused symbol, 1 for a lone one.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Source: L. Larmore and D. Hirschberg, "A fast algorithm for optimal length-limited Huffman codes", J. ACM 37(3),
    1990 (package-merge).

    Example:
        >>> code_lengths(torch.tensor([8, 4, 2, 1])).tolist()
        [1, 2, 3, 3]
    """
    if (
        not isinstance(counts, torch.Tensor)
        or counts.dtype.is_floating_point
        or counts.dtype.is_complex
        or counts.dim() != 1
    ):
        raise TypeError("counts must be a 1-D integer tensor")
    check_memory("counts", counts)
    if not 1 <= limit <= MAX_CODE_LENGTH:
        raise ValueError(f"limit must be in 1..{MAX_CODE_LENGTH}, got {limit}")
    if not 1 <= counts.numel() <= 4096:
        raise ValueError(f"counts must have 1..4096 entries, got {counts.numel()}")
    if int(counts.min()) < 0 or int(counts.sum()) >= 2**48:
        raise ValueError("counts must not be negative, and their sum must be below 2**48")
    used = int((counts > 0).sum())
    if used > 2**limit:
        raise ValueError(f"limit={limit} leaves room for {2**limit} codewords, but {used} symbols are in use")
    return _native.code_lengths(counts, limit)


def canonical_codes(lengths: torch.Tensor) -> torch.Tensor:
    """Assigns codewords to lengths in order of (length, symbol), bit-reversed so that they are read LSB first.

    Args:
        lengths: 1-D integer tensor, 0..15 each, of at most 4096 symbols; 0 means no codeword.

    Returns:
        int32 tensor of codewords, 0 where there is none.

    Example:
        >>> canonical_codes(torch.tensor([1, 2, 3, 3])).tolist()
        [0, 1, 3, 7]
    """
    if not isinstance(lengths, torch.Tensor) or lengths.dtype.is_floating_point or lengths.dim() != 1:
        raise TypeError("lengths must be a 1-D integer tensor")
    check_memory("lengths", lengths)
    if not 1 <= lengths.numel() <= 4096 or int(lengths.min()) < 0 or int(lengths.max()) > MAX_CODE_LENGTH:
        raise ValueError(f"lengths must be 1..4096 values of 0..{MAX_CODE_LENGTH}")
    kraft = int((2 ** (MAX_CODE_LENGTH - lengths[lengths > 0].long())).sum())
    if kraft > 2**MAX_CODE_LENGTH:
        raise ValueError(
            f"lengths describe no prefix code: their Kraft sum is {kraft / 2**MAX_CODE_LENGTH:.4g}, above 1"
        )
    return _native.canonical_codes(lengths)
