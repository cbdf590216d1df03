"""Compressed gradient communication for PyTorch: quantization by entropy, Huffman coding, a DDP communication hook."""

from qcomm.allreduce import all_reduce
from qcomm.codec import (
    PacketInfo,
    RangeGrid,
    SegmentInfo,
    SigmaGrid,
    compress,
    cpu_features,
    decompress,
    estimate_entropy,
    inspect,
)
from qcomm.collectives import load_rank_states, measure_link_rates
from qcomm.ddp import CompressionState, GradientNoise, NoiseEstimate, attach, compression_hook
from qcomm.errors import CollectiveError, ConfigMismatchError, DivergenceError, PacketError
from qcomm.local_sgd import CompressedModelAverager, DiLoCo, HierarchicalCompressedModelAverager, broadcast_parameters
from qcomm.partitions import KFilter, LocalStage, LossFilter, PartitionPipeline, SequentialPartitions
from qcomm.state_dicts import load, save
from qcomm.transport import MpiGroup, init_from_environment

__version__ = "0.1.0"

__all__ = [
    "CollectiveError",
    "CompressedModelAverager",
    "CompressionState",
    "ConfigMismatchError",
    "DiLoCo",
    "DivergenceError",
    "GradientNoise",
    "HierarchicalCompressedModelAverager",
    "KFilter",
    "LocalStage",
    "LossFilter",
    "MpiGroup",
    "NoiseEstimate",
    "PacketError",
    "PacketInfo",
    "PartitionPipeline",
    "RangeGrid",
    "SegmentInfo",
    "SequentialPartitions",
    "SigmaGrid",
    "all_reduce",
    "attach",
    "broadcast_parameters",
    "compress",
    "compression_hook",
    "cpu_features",
    "decompress",
    "estimate_entropy",
    "init_from_environment",
    "inspect",
    "load",
    "load_rank_states",
    "measure_link_rates",
    "save",
]
