"""Partition-wise training: a model in partitions with local losses, on a line of processes, without backward traffic.

docs/pipeline.md describes it.
"""

from qcomm.partitions.filters import KFilter, LossFilter, SampleFilter
from qcomm.partitions.line import PartitionPipeline
from qcomm.partitions.sequential import SequentialPartitions
from qcomm.partitions.stage import EpochReport, LocalStage

__all__ = [
    "EpochReport",
    "KFilter",
    "LocalStage",
    "LossFilter",
    "PartitionPipeline",
    "SampleFilter",
    "SequentialPartitions",
]
