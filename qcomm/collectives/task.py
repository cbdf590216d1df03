"""The task of a collective: what to average, and how."""

from dataclasses import dataclass, field

import torch

from qcomm.codec import Grid
from qcomm.collectives.cost_model import Profile
from qcomm.collectives.error_feedback import ErrorFeedback
from qcomm.collectives.layout import BucketLayout
from qcomm.collectives.telemetry import Telemetry
from qcomm.collectives.uncompressed_values import PlainValues
from qcomm.communicator import UNTIMED, Fault, Fields, Took

__all__ = ["MeanTask", "Scale"]

# What gradients have been multiplied by: a number, or a tensor of one element that stays on its device.
Scale = float | torch.Tensor


@dataclass
class MeanTask:
    """One collective: what to average, and how.

    Attributes:
        buffer: flat and contiguous, float32, float16, bfloat16 or float64; holds the result in the end.
        layout: of the buffer; None where finding it out failed (then there is a fault).
        grid: of the first phase.
        fields: the configuration, which has to be equal on all ranks.
        telemetry: counts what happens.
        feedback: residuals, or None for none.
        scale: the buffer holds values times this factor, and the result will; residuals are kept without it.
        index: number of the bucket for the timeline.
        fault: what went wrong before the task was queued; it is announced to the other ranks in place of the exchange.
        strategy: one of ``qcomm.collectives.strategies.STRATEGIES``.
        ranks_per_node: of the strategy hierarchical; a divisor of the number of ranks.
        profile: the machine, by which the strategy auto leaves out what cannot be fast on it; None for any machine.
        own_time: of this rank's last collective of the kind, for the headers (see :mod:`qcomm.collectives.tuner`).
        bypassed: how many collectives of the kind have run since its last agreement without one.
        can_bypass: whether further ones may (see :mod:`qcomm.ddp.bypass`).
        memory: of earlier collectives on this buffer, by strategy (see
        :class:`qcomm.collectives.uncompressed_values.PlainValues`).
        num_threads: most that encode and decode at once; need not be equal on all ranks.
    """

    buffer: torch.Tensor
    layout: BucketLayout | None
    grid: Grid
    fields: Fields
    telemetry: Telemetry
    feedback: ErrorFeedback | None = None
    scale: float = 1.0
    index: int = 0
    fault: Fault | None = None
    strategy: str = "two_phase"
    ranks_per_node: int = 1
    profile: Profile | None = None
    own_time: Took = UNTIMED
    bypassed: int = 0
    can_bypass: bool = False
    memory: dict[str, PlainValues] = field(default_factory=dict)
    num_threads: int = 1

    @property
    def agreed_layout(self) -> BucketLayout:
        """The layout, where there is no fault."""
        if self.layout is None:
            raise ValueError("a task without a fault needs a layout")
        return self.layout
