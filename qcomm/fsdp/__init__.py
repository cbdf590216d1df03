"""FSDP2 and HSDP: gradients, and if wanted weights, of sharded models are exchanged compressed."""

from qcomm.fsdp.sharding import attach
from qcomm.fsdp.state import ShardedState

__all__ = ["ShardedState", "attach"]
