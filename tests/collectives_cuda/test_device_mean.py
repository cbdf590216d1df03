"""The mean on a device against the one on the CPU, bit for bit: over emulated kernels, between real processes.

The kernels run on the host's memory and gloo stands in for NCCL; streams are left to a machine with a GPU.
"""

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from device_buckets import Side, buffer_of, make_layout, mean_of_residuals
from distributed import assert_same_on_all_ranks, gathered, run, world
from emulated_core import emulated_device

import qcomm
from qcomm import RangeGrid, SigmaGrid
from qcomm.collectives import packing
from qcomm.collectives.strategies import average
from qcomm.collectives_cuda import two_phase as device_mean
from qcomm.collectives_cuda import two_phase_steps
from qcomm.collectives_cuda.handshake import DevicePart
from qcomm.collectives_cuda.slots import Slots
from qcomm.collectives_cuda.two_phase import DeviceMean
from qcomm.communicator.groups import get_communicator
from qcomm.communicator.handshake import Fields

pytestmark = pytest.mark.world


def assert_same_bits(a, b, what):
    assert a.dtype == b.dtype and a.shape == b.shape, what
    same = (a.view(torch.uint8) == b.view(torch.uint8)) | (a.isnan() & b.isnan()).repeat_interleave(a.element_size())
    assert bool(same.all()), (what, int((~same).sum()))


def assert_same_residuals(mine, other):
    assert mine.get("local", {}).keys() >= other.get("local", {}).keys()
    for key, residual in other.get("local", {}).items():
        assert torch.equal(mine["local"][key], residual), key
    for key, (start, residual) in other.get("owner", {}).items():
        assert mine["owner"][key][0] == start and torch.equal(mine["owner"][key][1], residual), key


SIGMA = SigmaGrid(1.0)
CASES = {
    "sigma": ("uneven", SIGMA, True, torch.float32, "", 1.0, 4),
    "no feedback": ("uneven", SIGMA, False, torch.float32, "", 1.0, 2),
    "range": ("uneven", RangeGrid(), True, torch.float32, "", 1.0, 3),
    "range without feedback": ("uneven", RangeGrid("paper"), False, torch.float32, "", 1.0, 3),
    "fine, own codes": ("uneven", SigmaGrid(0.5, coding="table"), True, torch.float32, "", 1.0, 2),
    "fixed width": ("one tensor", SigmaGrid(0.25, coding="fixed"), True, torch.float32, "", 1.0, 2),
    "coarse pairs": ("one tensor", SigmaGrid(2.0, coding="pair"), True, torch.float32, "", 1.0, 3),
    "scaled": ("uneven", SIGMA, True, torch.float32, "", 1024.0, 3),
    "runs": ("uneven", SigmaGrid(3.2), True, torch.float32, "", 1.0, 4),
    "runs, scaled": ("uneven", SigmaGrid(2.5), True, torch.float32, "zero", 1024.0, 3),
    "runs, float64": ("uneven", SigmaGrid(3.4), True, torch.float64, "nan", 1.0, 3),
    "runs, bfloat16": ("uneven", SigmaGrid(1.0, coding="runs"), True, torch.bfloat16, "constant", 1.0, 3),
    "runs without feedback": ("uneven", SigmaGrid(3.0, coding="runs"), False, torch.float32, "", 1.0, 2),
    "float64": ("uneven", SIGMA, True, torch.float64, "", 1.0, 2),
    "bfloat16": ("uneven", SIGMA, True, torch.bfloat16, "", 1.0, 3),
    "float16, scaled": ("uneven", RangeGrid(c=2), True, torch.float16, "", 64.0, 2),
    "zeros": ("uneven", SIGMA, True, torch.float32, "zero", 1.0, 4),
    "nan": ("uneven", SIGMA, True, torch.float32, "nan", 1.0, 3),
    "heavy": ("uneven", SIGMA, True, torch.float32, "heavy", 1.0, 2),
    "constant": ("uneven", SIGMA, True, torch.float32, "constant", 1.0, 2),
    "raw only": ("raw only", SIGMA, True, torch.float32, "", 1.0, 2),
    "merged": ("merged", SIGMA, True, torch.float32, "", 1.0, 4),
    "merged, runs, scaled": ("merged", SigmaGrid(3.2), True, torch.bfloat16, "zero", 1024.0, 3),
    "merged, nan": ("merged", SigmaGrid(2.0), True, torch.float64, "nan", 1.0, 3),
    "merged, own codes": ("merged", SigmaGrid(0.5, coding="table"), True, torch.float32, "heavy", 1.0, 2),
    "merged only": ("merged only", SigmaGrid(3.4), True, torch.float32, "", 1.0, 3),
    "one value": ("one value", SIGMA, True, torch.float32, "", 1.0, 2),
}


def never_forecast(*_):
    """The CPU measures each tensor instead, as the kernels do, so that both have the same steps."""


@world(1, 2, 3)
@pytest.mark.parametrize("case", CASES)
def test_means_and_residuals_are_those_of_the_cpu(rank, world_size, emulated_path, case):
    name, grid, error_feedback, dtype, kind, scale, steps = CASES[case]
    layout = make_layout(name, world_size)
    communicator = get_communicator(dist.group.WORLD)
    cpu, device = Side(error_feedback), Side(error_feedback)
    with (
        emulated_device(emulated_path),
        mock.patch.object(packing, "forecast_quantizer", never_forecast),
        mock.patch.object(two_phase_steps, "BLOCK_SPLIT", 1),  # so that packets are as large as the CPU's
    ):
        mean = DeviceMean(dist.group.WORLD, communicator, device.telemetry)
        place = torch.empty(layout.elements, dtype=dtype)  # as of DDP's buckets, whose memory stays
        for step in range(steps):
            buffer = buffer_of(layout, rank, step, dtype, kind) * scale
            expected = buffer.clone()
            task = cpu.task(expected, layout, grid, scale)
            communicator.submit(lambda task=task: average(task, communicator)).wait()
            mean.average(DevicePart.of(device.task(place.copy_(buffer), layout, grid)), scale)
            assert_same_bits(place, expected, (step, kind))
            assert_same_residuals(device.residuals(), cpu.residuals())
            assert_same_on_all_ranks(place)
        mean.flush()
    ours, theirs = device.telemetry.stats(), cpu.telemetry.stats()
    same = ("bits_per_element_phase1", "bits_per_element_phase2", "bits_per_element", "nonfinite_tensors", "tensors")
    for key in same if kind != "nan" else same[:-1]:  # NaN is not equal to itself
        assert ours[key] == theirs[key], key
    assert ours["dropped_values"] == 0


def case_overflow(rank, world_size, path, steps):
    """Slots that are too small for what packets need: nothing is lost, and all ranks still have the same means."""
    layout = make_layout("uneven", world_size)
    side = Side(error_feedback=True)
    sums = [torch.zeros(layout.elements, dtype=torch.float64) for _ in range(2)]
    with emulated_device(path), mock.patch.object(device_mean, "PERIOD", 3):
        mean = DeviceMean(dist.group.WORLD, get_communicator(dist.group.WORLD), side.telemetry)
        place = torch.empty(layout.elements)
        for step in range(steps):
            buffer = buffer_of(layout, rank, step, torch.float32, "")
            mean.average(DevicePart.of(side.task(place.copy_(buffer), layout, SIGMA)))
            assert_same_on_all_ranks(place)
            sums[0] += place.double()
            sums[1] += sum(gathered(buffer.double())) / world_size
            bucket = mean._buckets[0]
            if step == 0:
                small = (layout.elements // world_size // 8 + 256) // 16 * 16  # a bit a value, and for what stays
                first = bucket.fixed = Slots(small, small)
        mean.flush()
    kept = mean_of_residuals(side, layout, world_size)
    assert torch.allclose(sums[1] - sums[0], kept, rtol=0, atol=1e-6)
    return side.telemetry.stats()["dropped_values"], first, bucket.fixed


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_does_not_fit_stays_in_the_residual(emulated_path, world_size):
    found = run(world_size, case_overflow, str(emulated_path), 8)
    # In a world of one only the mean travels.
    assert all(dropped > 0 for dropped, _, _ in found)
    before, after = found[0][1], found[0][2]
    assert all(fixed == after for _, _, fixed in found), "ranks have slots of different sizes"
    assert after.means > before.means, "slots were not enlarged after an agreement"


def case_fault(rank, world_size, path):
    """A rank that cannot prepare a collective takes part without values; all ranks hear of it."""
    layout = make_layout("uneven", world_size)
    side = Side(error_feedback=True)
    heard = []
    with emulated_device(path), mock.patch.object(device_mean, "PERIOD", 2):
        mean = DeviceMean(dist.group.WORLD, get_communicator(dist.group.WORLD), side.telemetry)
        place = torch.empty(layout.elements)
        for step in range(6):
            task = side.task(place.copy_(buffer_of(layout, rank, step, torch.float32, "")), layout, SIGMA)
            scale = "nonsense" if rank == 1 and step == 2 else 1.0
            try:
                fault = mean.average(DevicePart.of(task), scale)
                if fault is not None:
                    raise fault.error
            except (TypeError, qcomm.CollectiveError) as error:
                heard.append((step, type(error).__name__, str(error)))
            else:
                assert bool(place.isnan().any()) == (step == 2)
                assert step == 2 or not place.isnan().any()
    return heard


def test_a_rank_that_fails_is_heard_of(emulated_path):
    found = run(2, case_fault, str(emulated_path))
    told = [[step for step, name, _ in heard if name == "CollectiveError"] for heard in found]
    assert told[0] == told[1] and len(told[0]) == 1
    assert found[1][0][:2] == (2, "TypeError")
    assert "a rank failed" in found[0][-1][2]


@world(2)
def test_different_options_are_refused(rank, world_size, emulated_path):
    layout = make_layout("uneven", world_size)
    side = Side(error_feedback=True)
    with emulated_device(emulated_path):
        mean = DeviceMean(dist.group.WORLD, get_communicator(dist.group.WORLD), side.telemetry)
        task = side.task(torch.ones(layout.elements), layout, SIGMA)
        task = replace(task, fields=Fields({"grid": str(rank)}))
        with pytest.raises(qcomm.ConfigMismatchError, match="grid"):
            mean.average(DevicePart.of(task))
        assert bool((task.buffer == 1).all())
        mean.average(DevicePart.of(side.task(torch.ones(layout.elements), layout, SIGMA)))
