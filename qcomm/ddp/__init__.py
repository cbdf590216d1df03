"""The DDP communication hook: gradients are averaged by compressed exchange during backward."""

from qcomm.ddp.hook import CompressionState, attach, compression_hook

__all__ = ["CompressionState", "attach", "compression_hook"]
