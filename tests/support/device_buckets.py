"""Buckets of the tests of means on a device: their layouts, values and residuals."""

import math

import torch
from distributed import gathered
from residuals import owed

from qcomm.collectives.error_feedback import ErrorFeedback
from qcomm.collectives.layout import BucketLayout, TensorSpec
from qcomm.collectives.options import ReduceOptions
from qcomm.collectives.task import MeanTask
from qcomm.collectives.telemetry import Telemetry
from qcomm.communicator.handshake import Fields

# (elements, compressed), uneven, so that chunks begin inside of tensors and hold several; None for a merged tensor
TENSORS = {
    "uneven": [(3001, True), (7, False), (2050, True), (33, False), (4097, True), (1, False)],
    "raw only": [(5, False), (300, False)],
    "one value": [(1, False)],
    "one tensor": [(9000, True)],
    "small": [(700, True), (3, False)],
    "merged": [(3, None), (2500, True), (40, None), (9, False), (17, None), (3000, True), (1, None)],
    "merged only": [(90, None), (5, False), (200, None)],
}


def make_layout(name, world_size):
    specs, offset = [], 0
    for number, (count, compressed) in enumerate(TENSORS[name]):
        specs.append(TensorSpec(f"{name} {number}", offset, count, bool(compressed), may_round=compressed is None))
        offset += count
    return BucketLayout(ReduceOptions().merge_small(specs), world_size)


def buffer_of(layout, rank, step, dtype, kind):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    values = torch.randn(layout.elements, generator=generator) * 0.01
    first = layout.parameters[0]
    part = values[first.offset : first.offset + first.numel]
    if kind == "zero":  # a parameter that no rank used, in every second step
        part.zero_() if step % 2 else None
    elif kind == "nan" and rank == 0 and step == 1:
        part[-1] = math.nan
    elif kind == "heavy":
        part[::50] *= 100
    elif kind == "constant":
        part.fill_(0.25 if rank else 0.0)
    return values.to(dtype)


class Side:
    """One of the two ways: its residuals and its counters."""

    def __init__(self, error_feedback):
        self.feedback = ErrorFeedback() if error_feedback else None
        self.telemetry = Telemetry()

    def task(self, buffer, layout, grid, scale=1.0):
        fields = Fields({"test": str(layout.description)})
        options = ReduceOptions(grid, strategy="two_phase")
        return MeanTask(buffer, layout, options, fields, self.telemetry, self.feedback, scale)

    def residuals(self):
        return {} if self.feedback is None else self.feedback.state_dict()


def mean_of_residuals(side, layout, world_size):
    """What all ranks still owe the mean, in float64, in the places of the buffer."""
    kept = torch.zeros(layout.elements, dtype=torch.float64)
    states = gathered(side.residuals())
    for tensor in layout.parameters:
        kept[tensor.offset : tensor.offset + tensor.numel] = owed(states, tensor.key, tensor.numel)
    return kept
