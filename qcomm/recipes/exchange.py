"""Gradient exchanges of a training run (fp32, bf16, qcomm) with one interface that counts bytes and seconds.

No postponed annotations in this module: DDP compares a hook's annotations by identity.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from qcomm.ddp import attach as attach_hook
from qcomm.recipes.config import TrainConfig


class Exchange(Protocol):
    """The interface of a gradient exchange to a run. ``qcomm.CompressionState`` implements it."""

    def stats(self) -> dict[str, Any]:
        """Returns the counters of this rank since it was attached."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of this rank for a checkpoint."""
        ...

    def load_state_dict(self, state_dict: Sequence[Mapping[str, Any]]) -> None:
        """Continues from the states of the ranks whose part this rank takes."""
        ...


class RingExchange:
    """Torch's own all-reduce, in fp32 or bf16, timed from issue to completion.

    Bytes are those of the ring algorithm, 2 (W - 1) / W times the buffer handed to ``all_reduce``, because gloo does
    not report the bytes that it sends. Seconds are those in which at least one bucket was under way. They include the
    wait for slower ranks.

    Args:
        hook: the communication hook of torch to wrap.
        element_bytes: bytes per element that the hook hands to ``all_reduce``; None for the bucket's own.
    """

    def __init__(
        self,
        hook: Callable[[Any, GradBucket], torch.futures.Future[torch.Tensor]],
        element_bytes: int | None = None,
    ) -> None:
        self._hook = hook
        self._element_bytes = element_bytes
        self._lock = threading.Lock()  # completions arrive on gloo's threads
        self._under_way = 0
        self._busy_since = 0.0
        self._seconds = 0.0
        self._steps = 0
        self._elements = 0
        self._uncompressed_bytes = 0
        self._handed_bytes = 0

    def hook(self, _state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Starts the all-reduce of a bucket: the communication hook to register."""
        buffer = bucket.buffer()
        self._steps += bucket.is_last()
        self._elements += buffer.numel()
        self._uncompressed_bytes += buffer.numel() * buffer.element_size()
        self._handed_bytes += buffer.numel() * (self._element_bytes or buffer.element_size())
        with self._lock:
            if self._under_way == 0:
                self._busy_since = time.perf_counter()
            self._under_way += 1
        return self._hook(None, bucket).then(self._finish)

    def _finish(self, future: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
        with self._lock:
            self._under_way -= 1
            if self._under_way == 0:
                self._seconds += time.perf_counter() - self._busy_since
        return future.value()

    def stats(self) -> dict[str, Any]:
        """Returns the counters in the form of ``qcomm.CompressionState.stats``."""
        ranks = dist.get_world_size()
        sent = round(2 * (ranks - 1) / ranks * self._handed_bytes)
        bits = 8 * self._handed_bytes / self._elements if self._elements else 0.0
        return {
            "bytes_sent": sent,
            "bytes_received": sent,
            "bytes_uncompressed": self._uncompressed_bytes,
            "steps": self._steps,
            "bits_per_element": bits,
            "bits_per_element_compressed": bits,
            "bits_per_element_phase1": bits,
            "bits_per_element_phase2": bits,
            "communication_seconds": self._seconds,
            "encode_seconds": 0.0,
            "decode_seconds": 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state: an all-reduce has no memory."""
        return {}

    def load_state_dict(self, state_dict: Sequence[Mapping[str, Any]]) -> None:
        """Restores nothing: an all-reduce has no memory."""


def attach(ddp_model: DistributedDataParallel, config: TrainConfig, scaler: torch.amp.GradScaler | None) -> Exchange:
    """Registers the gradient exchange that ``config.method`` names.

    Args:
        ddp_model: the wrapped model, without a hook so far.
        config: configuration of the run.
        scaler: the GradScaler of a fp16 run, so that qcomm's error feedback is kept unscaled; otherwise None.
    """
    if config.method == "qcomm":
        return attach_hook(
            ddp_model,
            grid=config.quantization,
            error_feedback=config.error_feedback,
            mean_step=config.mean_step,
            strategy=config.strategy,
            ranks_per_node=config.ranks_per_node,
            min_elements=config.min_elements,
            secret=config.secret,
            warmup_steps=config.compression_warmup_steps,
            warmup_step=config.compression_warmup_step,
            grad_scale=scaler.get_scale if scaler is not None else None,
        )
    if config.method == "bf16":
        ring = RingExchange(default_hooks.bf16_compress_hook, element_bytes=2)
    else:
        ring = RingExchange(default_hooks.allreduce_hook)
    ddp_model.register_comm_hook(None, ring.hook)
    return ring


def restore(exchange: Exchange, saved: Sequence[Mapping[str, Any]], is_new_rank: bool) -> None:
    """Continues from a checkpoint.

    Args:
        exchange: exchange of this run, which has exchanged nothing so far.
        saved: states of the ranks whose part this rank takes: its own and, if fewer ranks resume, those of some
            missing ranks.
        is_new_rank: True if this rank did not write a part of the checkpoint; ``saved`` is then rank 0's.
    """
    if is_new_rank:
        # It counts the steps that were taken, but has lost nothing to quantization so far.
        saved = [{**state, "error_feedback": None} for state in saved]
    exchange.load_state_dict(saved)
