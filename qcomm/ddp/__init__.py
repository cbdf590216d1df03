"""The DDP communication hook: gradients are averaged by compressed exchange during backward."""

from qcomm.ddp.gradient_noise import GradientNoise
from qcomm.ddp.hook import CompressionState, attach, compression_hook
from qcomm.ddp.noise_sums import NoiseEstimate
from qcomm.ddp.tail_index import tail_index

__all__ = ["CompressionState", "GradientNoise", "NoiseEstimate", "attach", "compression_hook", "tail_index"]
