"""Local SGD: weights are averaged every few steps, or broadcast, compressed."""

from qcomm.local_sgd.averager import CompressedModelAverager, HierarchicalCompressedModelAverager
from qcomm.local_sgd.broadcast import broadcast_parameters

__all__ = ["CompressedModelAverager", "HierarchicalCompressedModelAverager", "broadcast_parameters"]
