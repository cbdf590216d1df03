"""Collectives: every algorithm of the mean over all ranks. It knows messages, but neither gloo, DDP nor CUDA."""

from qcomm.collectives.cost_model import (
    CodecProfile,
    Exchange,
    LinkProfile,
    Profile,
    TwoPhase,
    bytes_sent,
    seconds,
    two_phase_steps,
)
from qcomm.collectives.error_feedback import ErrorFeedback
from qcomm.collectives.layout import BucketLayout, Chunk, TensorSpec
from qcomm.collectives.machine import describe, measure_codec, measure_link, resolve_profile, slowest
from qcomm.collectives.options import STRATEGIES, check_exchange, check_grid, check_min_elements, resolve_ranks_per_node
from qcomm.collectives.packing import no_bytes, raise_later, wire_dtype
from qcomm.collectives.strategies import average, plain_ways, settled
from qcomm.collectives.task import MeanTask, Scale
from qcomm.collectives.telemetry import Telemetry
from qcomm.collectives.tuner import Chooser
from qcomm.collectives.two_phase_steps import owner_grid
from qcomm.collectives.uncompressed_values import PLAIN, PlainValues, count_rings

__all__ = [
    "PLAIN",
    "STRATEGIES",
    "BucketLayout",
    "Chooser",
    "Chunk",
    "CodecProfile",
    "ErrorFeedback",
    "Exchange",
    "LinkProfile",
    "MeanTask",
    "PlainValues",
    "Profile",
    "Scale",
    "Telemetry",
    "TensorSpec",
    "TwoPhase",
    "average",
    "bytes_sent",
    "check_exchange",
    "check_grid",
    "check_min_elements",
    "count_rings",
    "describe",
    "measure_codec",
    "measure_link",
    "no_bytes",
    "owner_grid",
    "plain_ways",
    "raise_later",
    "resolve_profile",
    "resolve_ranks_per_node",
    "seconds",
    "settled",
    "slowest",
    "two_phase_steps",
    "wire_dtype",
]
