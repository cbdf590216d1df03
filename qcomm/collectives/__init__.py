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
    hierarchical_latencies,
    seconds,
    two_phase_times,
)
from qcomm.collectives.error_feedback import ErrorFeedback
from qcomm.collectives.gather_shards import gather_shards
from qcomm.collectives.hook_options import (
    GradScale,
    check_grad_scale,
    check_hook_options,
    check_scale,
    is_excluded,
)
from qcomm.collectives.layout import BucketLayout, Chunk, TensorSpec
from qcomm.collectives.link_rates import measure_link_rates
from qcomm.collectives.machine import measure_codec, measure_link, slowest
from qcomm.collectives.optimizers import watch_optimizers
from qcomm.collectives.options import STRATEGIES, ReduceKeywords, ReduceOptions, with_step
from qcomm.collectives.packing import no_bytes
from qcomm.collectives.rank_state import (
    RankState,
    check_saved_count,
    check_saved_world_size,
    keys_to_resume,
    load_rank_states,
    parts_of,
    states_for_rank,
    without_residuals,
)
from qcomm.collectives.reduce_scatter import reduce_scatter
from qcomm.collectives.rounds import Rounds, agree_on_smallest, announce_late, end_well, refuse, refuse_early
from qcomm.collectives.run_state import checked_parts, origin_of, residuals_of, run_entries
from qcomm.collectives.shards import ShardedTensor, shard_layout, shard_lengths
from qcomm.collectives.strategies import Settled, average, settled, uncompressed_strategies
from qcomm.collectives.task import MeanTask, Scale
from qcomm.collectives.telemetry import Telemetry
from qcomm.collectives.tuner import Tuner
from qcomm.collectives.uncompressed_values import (
    BYPASSED,
    UNCOMPRESSED,
    Bypassing,
    UncompressedValues,
    count_rings,
    fingerprint,
)

__all__ = [
    "BYPASSED",
    "STRATEGIES",
    "UNCOMPRESSED",
    "BucketLayout",
    "Bypassing",
    "Chunk",
    "CodecProfile",
    "ErrorFeedback",
    "GradScale",
    "LinkProfile",
    "MeanTask",
    "Profile",
    "RankState",
    "ReduceKeywords",
    "ReduceOptions",
    "Rounds",
    "Scale",
    "Settled",
    "ShardedTensor",
    "Telemetry",
    "TensorSpec",
    "Tuner",
    "TwoPhase",
    "UncompressedValues",
    "Workload",
    "agree_on_smallest",
    "announce_late",
    "average",
    "bytes_sent",
    "check_grad_scale",
    "check_hook_options",
    "check_saved_count",
    "check_saved_world_size",
    "check_scale",
    "checked_parts",
    "count_rings",
    "end_well",
    "fingerprint",
    "gather_shards",
    "hierarchical_latencies",
    "is_excluded",
    "keys_to_resume",
    "load_rank_states",
    "measure_codec",
    "measure_link",
    "measure_link_rates",
    "no_bytes",
    "origin_of",
    "parts_of",
    "reduce_scatter",
    "refuse",
    "refuse_early",
    "residuals_of",
    "run_entries",
    "seconds",
    "settled",
    "shard_layout",
    "shard_lengths",
    "slowest",
    "states_for_rank",
    "two_phase_times",
    "uncompressed_strategies",
    "watch_optimizers",
    "with_step",
    "without_residuals",
]
