"""Collectives: every algorithm of the mean over all ranks.

The package knows messages, and imports neither gloo nor DDP.
"""

from qcomm.collectives.cost_model import (
    CodecProfile,
    LinkProfile,
    Profile,
    TwoPhase,
    Workload,
    bytes_sent,
    seconds,
    two_phase_times,
)
from qcomm.collectives.error_feedback import ErrorFeedback
from qcomm.collectives.layout import BucketLayout, Chunk, TensorSpec
from qcomm.collectives.machine import measure_codec, measure_link, slowest
from qcomm.collectives.options import STRATEGIES, ReduceKeywords, ReduceOptions, with_step
from qcomm.collectives.packing import no_bytes
from qcomm.collectives.rank_state import (
    RankState,
    keys_to_resume,
    load_rank_states,
    parts_of,
    states_for_rank,
    without_residuals,
)
from qcomm.collectives.rounds import Rounds, announce_late, refuse, refuse_early
from qcomm.collectives.strategies import average, settled, uncompressed_strategies
from qcomm.collectives.task import MeanTask, Scale
from qcomm.collectives.telemetry import Telemetry
from qcomm.collectives.tuner import Tuner
from qcomm.collectives.uncompressed_values import UNCOMPRESSED, Bypassing, UncompressedValues, count_rings

__all__ = [
    "STRATEGIES",
    "UNCOMPRESSED",
    "BucketLayout",
    "Bypassing",
    "Chunk",
    "CodecProfile",
    "ErrorFeedback",
    "LinkProfile",
    "MeanTask",
    "Profile",
    "RankState",
    "ReduceKeywords",
    "ReduceOptions",
    "Rounds",
    "Scale",
    "Telemetry",
    "TensorSpec",
    "Tuner",
    "TwoPhase",
    "UncompressedValues",
    "Workload",
    "announce_late",
    "average",
    "bytes_sent",
    "count_rings",
    "keys_to_resume",
    "load_rank_states",
    "measure_codec",
    "measure_link",
    "no_bytes",
    "parts_of",
    "refuse",
    "refuse_early",
    "seconds",
    "settled",
    "slowest",
    "states_for_rank",
    "two_phase_times",
    "uncompressed_strategies",
    "with_step",
    "without_residuals",
]
