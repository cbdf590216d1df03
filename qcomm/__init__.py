"""Compressed gradient communication for PyTorch: entropy-driven quantization, Huffman coding, and a DDP communication hook."""

from qcomm.codec import PacketInfo, SegmentInfo, compress, decompress, inspect
from qcomm.entropy import estimate_entropy
from qcomm.errors import ConfigMismatchError, PacketError
from qcomm.grids import RangeGrid, SigmaGrid

__version__ = "0.1.0"

__all__ = [
    "ConfigMismatchError",
    "PacketError",
    "PacketInfo",
    "RangeGrid",
    "SegmentInfo",
    "SigmaGrid",
    "compress",
    "decompress",
    "estimate_entropy",
    "inspect",
]
