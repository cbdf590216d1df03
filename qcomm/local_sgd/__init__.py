"""Local SGD: weights are averaged every few steps, moved by an outer optimizer, or broadcast, compressed."""

from qcomm.local_sgd.averager import CompressedModelAverager, HierarchicalCompressedModelAverager
from qcomm.local_sgd.broadcast import broadcast_parameters
from qcomm.local_sgd.diloco import DiLoCo

__all__ = ["CompressedModelAverager", "DiLoCo", "HierarchicalCompressedModelAverager", "broadcast_parameters"]
