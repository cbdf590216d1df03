"""Facts that only a GPU can show: the CPU's bytes from real kernels, streams, NCCL, no wait for the device.

A world of one rank needs one GPU; the last test takes two where there are two. Nothing here needs hypothesis.
"""

import copy
import os
import tempfile
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import qcomm
from qcomm import RangeGrid, SigmaGrid
from qcomm.codec import DecodeTask
from qcomm.codec.packet import default_block_steps
from qcomm.codec.plans_cuda import Decoder, Workspace, address, own_code_bits
from qcomm.collectives.error_feedback import ErrorFeedback
from qcomm.collectives.layout import BucketLayout, TensorSpec
from qcomm.collectives.options import ReduceOptions
from qcomm.collectives.strategies import average
from qcomm.collectives.task import MeanTask
from qcomm.collectives.telemetry import Telemetry
from qcomm.collectives_cuda import two_phase as device_mean
from qcomm.collectives_cuda.handshake import DevicePart
from qcomm.collectives_cuda.strategies import TRIAL, DeviceChoice
from qcomm.collectives_cuda.two_phase import DeviceMean
from qcomm.communicator.groups import get_communicator
from qcomm.communicator.handshake import Fields

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and a build with the kernels"),
]

GRIDS = [
    SigmaGrid(1.0),
    SigmaGrid(2.0, coding="pair"),
    SigmaGrid(0.05),
    SigmaGrid(0.9, coding="table"),
    SigmaGrid(0.001, coding="fixed"),
    RangeGrid(),
    RangeGrid("paper"),
    RangeGrid(num_bits=3),
    RangeGrid(num_bits=14),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SIZES = [0, 1, 31, 32, 33, 1000, 8191, 8192, 8193, 100_003]


@pytest.fixture(scope="module")
def group():
    folder = tempfile.mkdtemp()
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def heavy(n, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * (1 + 20 * (torch.rand(n, generator=generator) < 0.01))
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_packets_are_the_bytes_of_the_cpu(grid, dtype):
    for n in SIZES:
        values = heavy(n, dtype, n)
        expected = qcomm.compress(values, grid)
        packet = qcomm.compress(values.cuda(), grid)
        assert torch.equal(packet.cpu(), expected), n
        restored = qcomm.decompress(packet)
        assert restored.is_cuda
        assert torch.equal(restored.cpu(), qcomm.decompress(expected)), n


def test_a_large_tensor():
    values = heavy(1 << 25)
    for grid in (SigmaGrid(1.0), RangeGrid(num_bits=8)):
        assert torch.equal(qcomm.compress(values.cuda(), grid).cpu(), qcomm.compress(values, grid))


def test_entropy_and_inspection():
    values = heavy(100_000)
    assert qcomm.estimate_entropy(values.cuda()) == qcomm.estimate_entropy(values)
    packet = qcomm.compress(values)
    assert qcomm.inspect(packet.cuda()) == qcomm.inspect(packet)


def test_damaged_packets_are_refused():
    packet = qcomm.compress(heavy(20_000)).cuda()
    for at in (0, 9, 20, 33, 50, 60, packet.numel() // 2, packet.numel() - 5):
        bad = packet.clone()
        bad[at] ^= 0x41
        with pytest.raises(qcomm.PacketError):
            qcomm.decompress(bad)
    assert torch.equal(qcomm.decompress(packet).cpu(), qcomm.decompress(packet.cpu()))  # the device is still well


def test_the_current_stream_is_used():
    values = heavy(1 << 20)
    expected = qcomm.compress(values)
    staged, target = values.pin_memory(), torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)  # so that work on another stream would see the zeros
        target.copy_(staged, non_blocking=True)
        packet = qcomm.compress(target)
        assert torch.equal(packet.cpu(), expected)


class Side:
    def __init__(self, error_feedback=True):
        self.feedback, self.telemetry = ErrorFeedback() if error_feedback else None, Telemetry()

    def task(self, buffer, layout, grid, scale=1.0):
        options = ReduceOptions(grid, strategy="two_phase")
        return MeanTask(buffer, layout, options, Fields({"test": ""}), self.telemetry, self.feedback, scale)


def bucket_layout(world_size=1, may_round=False):
    counts = [(70_000, True), (64, False), (300_001, True), (7, False), (33_000, True)]
    specs, offset = [], 0
    for number, (count, compressed) in enumerate(counts):
        specs.append(TensorSpec(str(number), offset, count, compressed, may_round))
        offset += count
    return BucketLayout(specs, world_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [SigmaGrid(1.0), SigmaGrid(2.0), RangeGrid()], ids=str)
def test_means_and_residuals_are_those_of_the_cpu(group, grid, dtype):
    communicator, layout, cpu, gpu = get_communicator(group), bucket_layout(), Side(), Side()
    mean = DeviceMean(group, communicator, gpu.telemetry)
    place = torch.empty(layout.elements, dtype=dtype, device="cuda")
    for step in range(4):
        expected = heavy(layout.elements, dtype, step) * 16
        place.copy_(expected)
        task = cpu.task(expected, layout, grid, 16.0)
        with mock.patch("qcomm.collectives.two_phase.SLICE_ELEMENTS", layout.elements):  # a device has one slice
            communicator.submit(lambda task=task: average(task, communicator)).wait()
        mean.average(DevicePart.of(gpu.task(place, layout, grid)), 16.0)
        assert torch.equal(place.cpu(), expected), step
    residuals = gpu.feedback.state_dict()["local"]
    for key, residual in cpu.feedback.state_dict()["local"].items():
        assert torch.equal(residuals[key].cpu(), residual), key


def test_nobody_waits_after_the_first_collective(group):
    layout, side = bucket_layout(), Side()
    scale = torch.tensor(8.0, device="cuda")
    place = torch.empty(layout.elements, device="cuda")
    batches = [heavy(layout.elements, seed=step).cuda() for step in range(10)]
    with mock.patch.object(device_mean, "PERIOD", 3):
        mean = DeviceMean(group, get_communicator(group), side.telemetry)
        mean.average(DevicePart.of(side.task(place.copy_(batches[0]), layout, SigmaGrid(1.0))), scale)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches[1:]:
                mean.average(DevicePart.of(side.task(place.copy_(batch), layout, SigmaGrid(1.0))), scale)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    mean.flush()
    assert 0 < side.telemetry.stats()["bits_per_element_phase2"] < 4


def test_a_graph_holds_a_collective(group):
    layout, captured, plain = bucket_layout(), Side(), Side()
    place, other = (torch.empty(layout.elements, device="cuda") for _ in range(2))
    batches = [heavy(layout.elements, seed=step).cuda() for step in range(5)]
    means = [DeviceMean(group, get_communicator(group), side.telemetry) for side in (captured, plain)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for batch in batches[:2]:
            means[0].average(DevicePart.of(captured.task(place.copy_(batch), layout, SigmaGrid(1.0))))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # NCCL's thread looks at events
        means[0].average(DevicePart.of(captured.task(place, layout, SigmaGrid(1.0))))
    for batch in batches[:2]:
        means[1].average(DevicePart.of(plain.task(other.copy_(batch), layout, SigmaGrid(1.0))))
    for batch in batches[2:]:
        place.copy_(batch)
        graph.replay()
        means[1].average(DevicePart.of(plain.task(other.copy_(batch), layout, SigmaGrid(1.0))))
        assert torch.equal(place, other)


def test_strategies_are_tried_without_waiting(group):
    """Of the hook's auto: all that it tries, after the first turn of each, on a stream of its own."""
    layout, side = bucket_layout(may_round=True), Side()
    choice = DeviceChoice(group, get_communicator(group), side.telemetry, torch.device("cuda", 0))
    place, chosen = torch.empty(layout.elements, device="cuda"), set()
    batches = [heavy(layout.elements, seed=step).cuda() for step in range(5)]
    torch.cuda.synchronize()
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            for step in range(100):
                if step == 3 * TRIAL:
                    torch.cuda.set_sync_debug_mode("error")
                task = side.task(place.copy_(batches[step % len(batches)]), layout, SigmaGrid(1.0))
                options = replace(task.options, strategy="auto")
                choice.average(DevicePart.of(replace(task, options=options)))
                chosen.update(side.telemetry.stats()["strategies"].values())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    choice.flush()
    assert chosen == {"none", "bf16", "two_phase"}
    assert place.isfinite().all()


def test_a_sum_of_packets():
    """Of several ranks, which in a world of one there are not."""
    device, elements, ranks = torch.device("cuda", 0), 100_003, 3
    packets = [qcomm.compress(heavy(elements, seed=rank), SigmaGrid(1.0)) for rank in range(ranks)]
    slots = torch.zeros(ranks, max(packet.numel() for packet in packets) // 16 * 16 + 16, dtype=torch.uint8)
    for slot, packet in zip(slots, packets, strict=True):
        slot[: packet.numel()] = packet
    slots, total = slots.to(device), torch.ones(elements, device=device)
    tasks = [DecodeTask(address(slot), slot.numel(), address(total), elements) for slot in slots]
    faults = torch.zeros(ranks, dtype=torch.int32, device=device)
    steps, bits = default_block_steps(elements), own_code_bits(SigmaGrid(1.0))
    decoder = Decoder(torch.float32, steps, 1, tasks, bits, Workspace(device))
    decoder.decode_sum(address(faults), add=True)
    expected = torch.ones(elements)
    for packet in packets:
        expected += qcomm.decompress(packet)
    assert not faults.any()
    assert torch.equal(total.cpu(), expected)


def network():
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(256, 256), nn.Tanh())])


@pytest.mark.parametrize("grid", [SigmaGrid(1.0), RangeGrid()], ids=str)
def test_the_hook(group, grid):
    """Gradients of a world of one: those of plain backward, to within the grid, and in the long run exactly."""
    plain = network().cuda()
    model = DistributedDataParallel(copy.deepcopy(plain), bucket_cap_mb=0.3)
    state = qcomm.attach(model, grid=grid, strategy="two_phase", device_codec=True)
    sums = [[torch.zeros_like(p) for p in plain.parameters()] for _ in range(2)]
    steps = 12
    for step in range(steps):
        inputs = torch.randn(32, 256, generator=torch.Generator().manual_seed(step)).cuda()
        for network_, total in ((model, sums[0]), (plain, sums[1])):
            network_.zero_grad()
            network_(inputs).square().sum().backward()
            torch._foreach_add_(total, [parameter.grad for parameter in network_.parameters()])
    stats = state.stats()
    assert stats["buckets"] > steps and stats["dropped_values"] == 0
    residuals = state.state_dict()["error_feedback"]
    for (name, exact), got, want in zip(plain.named_parameters(), *sums, strict=True):
        kept = residuals["local"].get(name, torch.zeros(exact.numel(), device="cuda")).clone()
        start, own = residuals["owner"].get(name, (0, torch.zeros(0, device="cuda")))
        kept[start : start + own.numel()] += own
        tolerance = 1e-4 * float(want.abs().max() + kept.abs().max())
        assert torch.allclose(want.flatten() - got.flatten(), kept, rtol=0, atol=tolerance), name


def test_all_reduce(group):
    values = heavy(200_000)
    expected, tensor = values.clone(), values.cuda()
    qcomm.all_reduce(expected, strategy="two_phase")
    qcomm.all_reduce(tensor, strategy="two_phase", device_codec=True)
    assert torch.equal(tensor.cpu(), expected)
    with pytest.raises(ValueError, match="strategy must be one of"):
        qcomm.all_reduce(tensor, strategy="exact_sum", device_codec=True)


def two_gpus(rank, folder):
    os.environ["NCCL_DEBUG"] = "WARN"
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group, layout, cpu, gpu = dist.group.WORLD, bucket_layout(2), Side(), Side()
    communicator = get_communicator(group)
    mean = DeviceMean(group, communicator, gpu.telemetry)
    place = torch.empty(layout.elements, device="cuda")
    for step in range(3):
        expected = heavy(layout.elements, seed=10 * step + rank)
        place.copy_(expected)
        task = cpu.task(expected, layout, SigmaGrid(1.0))
        with mock.patch("qcomm.collectives.two_phase.SLICE_ELEMENTS", layout.elements):  # a device has one slice
            communicator.submit(lambda task=task: average(task, communicator)).wait()
        mean.average(DevicePart.of(gpu.task(place, layout, SigmaGrid(1.0))))
        assert torch.equal(place.cpu(), expected), step
    dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus():
    multiprocessing.spawn(two_gpus, args=(tempfile.mkdtemp(),), nprocs=2)
