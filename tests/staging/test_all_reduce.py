"""``all_reduce`` of tensors on the test device: the CPU's bits, in every order that the device's work may take."""

from contextlib import contextmanager, nullcontext
from unittest import mock

import late_device
import pytest
import torch
import torch.distributed as dist
from distributed import assert_same_on_all_ranks, gathered, world
from late_device import ORDERS

import qcomm
from qcomm import RangeGrid, SigmaGrid
from qcomm.collectives import two_phase
from qcomm.communicator.groups import find_communicator, get_communicator
from qcomm.staging import copies, devices
from qcomm.staging.buffers import LIMIT

pytestmark = pytest.mark.world

STRATEGIES = ["none", "bf16", "exact_sum", "all_gather", "two_phase"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def values(seed, shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_device(tensor, device="late"):
    """The tensor on the device, where the stream has still to compute it: the last step comes late."""
    return (tensor.to(device) * 2).div_(2)  # exact


def check(tensor, device="late", **options):
    """One mean on both; returns whether they are equal, when the device's stream has used its own."""
    expected, moved = tensor.clone(), on_device(tensor, device)
    qcomm.all_reduce(expected, **options)
    qcomm.all_reduce(moved, **options)
    return torch.equal((moved * 1).cpu(), expected)


@world(2, 3, 4, on_device=True)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_bits_of_the_cpu(rank, world_size, strategy):
    for seed in ORDERS:
        with late_device.order(seed):
            for dtype in DTYPES:
                for elements in (0, 1, 1000, 70_001):
                    case = seed, dtype, elements
                    assert check(values(rank, elements, dtype), strategy=strategy), case


@world(4, on_device=True)
def test_hierarchical(rank, world_size):
    for seed in ORDERS:
        with late_device.order(seed):
            assert check(values(rank, 70_001), strategy="hierarchical", ranks_per_node=2)


@world(2, on_device=True)
@pytest.mark.parametrize("grid", [SigmaGrid(0.05), SigmaGrid(3.2), RangeGrid()], ids=str)
def test_grids(rank, world_size, grid):
    for seed in ORDERS:
        with late_device.order(seed):
            assert check(values(rank, 70_001), grid=grid, strategy="two_phase")


@world(2, on_device=True)
def test_sealed_messages(rank, world_size, tmp_path):
    """The messages of a tensor on a device are the CPU's, so a secret seals them, too."""
    pytest.importorskip("cryptography", reason="cryptography is not installed")
    key = tmp_path / f"key {rank}"
    key.touch(mode=0o600)
    key.write_text("00112233445566778899aabbccddeeff" * 2)
    group = dist.new_group()
    for strategy in ("none", "two_phase"):
        expected, moved = values(rank, 70_001), on_device(values(rank, 70_001))
        qcomm.all_reduce(expected, strategy=strategy)
        qcomm.all_reduce(moved, group=group, strategy=strategy, secret=key)
        assert torch.equal(moved.cpu(), expected)
    assert type(find_communicator(group)._transport).__name__ == "SealedTransport"
    dist.destroy_process_group(group)


@world(2, on_device=True)
def test_auto_tries_and_chooses(rank, world_size):
    """More tensors of one size than the trials take: every mean is one of the strategies'."""
    inputs = values(rank, 3000)
    exact = sum(gathered(inputs)) / world_size
    for _ in range(60):
        tensor = on_device(inputs)
        work = qcomm.all_reduce(tensor, async_op=True)
        work.wait()
        assert_same_on_all_ranks(tensor.cpu())
        assert float((tensor.cpu() - exact).abs().max()) < 2
    assert work.stats()["copy_seconds"] > 0


@world(2, on_device=True)
def test_strides(rank, world_size):
    base = values(rank, (60, 50))
    for seed in ORDERS:
        with late_device.order(seed):
            for view in (
                lambda t: t.t(),
                lambda t: t[::2, 5:40],
                lambda t: t[3],
                lambda t: t.view(3, 20, 50).permute(2, 0, 1),
            ):
                expected, whole = base.clone(), on_device(base)
                qcomm.all_reduce(view(expected), strategy="two_phase")
                qcomm.all_reduce(view(whole), strategy="two_phase")
                assert torch.equal(whole.cpu(), expected)


@world(2, on_device=True)
def test_a_parameter_and_its_gradient(rank, world_size):
    parameter = torch.nn.Parameter(on_device(values(rank, 5000)))
    parameter.grad = on_device(values(rank + 10, 5000))
    expected = values(rank, 5000), values(rank + 10, 5000)
    for ours, theirs in zip((parameter, parameter.grad), expected, strict=True):
        qcomm.all_reduce(ours, strategy="two_phase")
        qcomm.all_reduce(theirs, strategy="two_phase")
        assert torch.equal(ours.detach().cpu(), theirs)


@world(2, on_device=True)
def test_inference_mode(rank, world_size):
    """Buffers that are made there serve tensors outside of it."""
    group = dist.new_group()
    expected, tensor, other = values(rank, 5000), on_device(values(rank, 5000)), on_device(values(rank, 5000))
    qcomm.all_reduce(expected, strategy="two_phase")
    with torch.inference_mode():
        qcomm.all_reduce(tensor, group=group, strategy="two_phase")
    qcomm.all_reduce(other, group=group, strategy="two_phase")
    assert torch.equal(tensor.cpu(), expected) and torch.equal(other.cpu(), expected)
    dist.destroy_process_group(group)


def check_several(rank, count=3 * LIMIT, elements=5000, device="late"):
    """Several tensors under way at once, more than there are buffers; returns whether all have the CPU's bits."""
    inputs = [values(10 * number + rank, elements + 100 * number) for number in range(count)]
    expected = [tensor.clone() for tensor in inputs]
    for tensor in expected:
        qcomm.all_reduce(tensor, strategy="two_phase")
    tensors = [on_device(tensor, device) for tensor in inputs]
    works = [qcomm.all_reduce(tensor, strategy="two_phase", async_op=True) for tensor in tensors]
    found = []
    for work, tensor in zip(works, tensors, strict=True):
        work.wait()
        found.append(tensor * 1)  # the stream's next work, right behind the wait
    return all(torch.equal(tensor.cpu(), other) for tensor, other in zip(found, expected, strict=True))


@world(2, 3, on_device=True)
def test_several_under_way(rank, world_size):
    for seed in ORDERS:
        with late_device.order(seed):
            assert check_several(rank)


@world(2, on_device=True)
def test_a_future_waits_on_the_stream(rank, world_size):
    """Whoever waits for the Future sees the mean on the own stream, whichever that is."""
    for seed in ORDERS:
        with late_device.order(seed):
            inputs = values(rank, 5000)
            expected, tensor = inputs.clone(), on_device(inputs)
            qcomm.all_reduce(expected, strategy="two_phase")
            work = qcomm.all_reduce(tensor, strategy="two_phase", async_op=True)
            stream = torch.Stream("late")
            with copies.current(stream):
                doubled = work.get_future().wait() * 2
                assert torch.equal(doubled.cpu(), 2 * expected)


@world(2, on_device=True)
def test_a_tensor_that_nobody_waits_for(rank, world_size):
    """The Future keeps its memory from other tensors while the mean is still being copied to it."""
    for seed in ORDERS:
        with late_device.order(seed):
            assert check_dropped(rank)


def check_dropped(rank):
    qcomm.all_reduce(on_device(values(rank, 4321)), strategy="two_phase", async_op=True)
    get_communicator(dist.group.WORLD).submit(lambda: None).wait()  # the worker has let go of the tensor
    others = [torch.zeros(4321, device="late") for _ in range(3)]
    kept = [other + 1 for other in others]
    torch.accelerator.synchronize()
    return all(bool((tensor == value).all()) for value, group in ((0, others), (1, kept)) for tensor in group)


# Planted faults. Ranks go through all orders together, so a comparison that fails must not end a test in the middle.


def passed_at_once(which):
    """Events of the ``which``-th kind, as the staging room asks for them, are recorded where there is no work."""

    def event_of(stream):
        staging = copies._stagings[get_communicator(dist.group.WORLD)][torch.device("late", 0)]
        kind = {staging.out: "out", staging.back: "back"}.get(stream, "caller")
        return original(torch.Stream("late") if kind == which else stream)

    original = copies.event_of
    return mock.patch.object(copies, "event_of", event_of)


@contextmanager
def no_stream(stream):
    yield


def restore_elsewhere(self):
    """Leaves another stream behind than that which copies the mean."""
    restore(self)
    torch.accelerator.set_stream(torch.Stream("late"))


restore = copies.Staged.restore
PLANTED = {
    "no wait for the computation": (passed_at_once, "caller"),
    "no wait for the copy out": (passed_at_once, "out"),
    "a buffer returned too early": (passed_at_once, "back"),
    "a copy out on the caller's stream": (mock.patch.object, copies, "current", no_stream),
    "a future of another stream": (mock.patch.object, copies.Staged, "restore", restore_elsewhere),
}


@world(2, on_device=True)
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_noticed(rank, world_size, planted):
    check_several(rank)  # the streams are there
    found = []
    for seed in ORDERS:
        with late_device.order(seed):
            patch, *arguments = PLANTED[planted]
            with patch(*arguments):
                found += [check(values(rank, 5000), strategy="two_phase"), check_several(rank), check_dropped(rank)]
            torch.accelerator.synchronize()
    assert not all(found)
    assert check_several(rank) and check_dropped(rank)


# Errors.


def error_of(tensor, **options):
    try:
        qcomm.all_reduce(tensor, strategy="two_phase", **options)
    except (qcomm.CollectiveError, RuntimeError, TypeError, ValueError) as error:
        return error
    return None


def pool():
    return copies._stagings[get_communicator(dist.group.WORLD)][torch.device("late", 0)].buffers


@world(2, on_device=True)
def test_a_copy_out_that_fails(rank, world_size):
    """All ranks learn of it before an exchange begins, and go on with the next tensor."""
    assert check(values(rank, 5000), strategy="two_phase")
    tensor = on_device(values(rank, 5000))
    if rank == 1:
        torch.ops.late.fail_copy(0)
    error = error_of(tensor)
    if rank == 1:
        assert "late: a copy failed" in str(error)
    else:
        assert "rank 1 failed while preparing the exchange: RuntimeError: late: a copy failed" in str(error)
    assert torch.equal(tensor.cpu(), values(rank, 5000)), "nothing has changed"
    assert pool()._taken == 0
    assert check(values(rank, 5000), strategy="two_phase")


@world(2, on_device=True)
def test_a_copy_back_that_fails(rank, world_size):
    """The rank raises, and the others in the next collective."""
    assert check(values(rank, 5000), strategy="two_phase")
    if rank == 1:
        torch.ops.late.fail_copy(1)
    error = error_of(on_device(values(rank, 5000)))
    assert (error is not None) == (rank == 1), error
    assert rank == 0 or "failed while decoding the result" in str(error)
    error = error_of(on_device(values(rank, 5000)))
    assert "rank 1 failed while decoding the result: RuntimeError: late: a copy failed" in str(error)
    assert pool()._taken == 0
    assert check(values(rank, 5000), strategy="two_phase")


@world(2, on_device=True)
def test_a_fault_of_a_strategy(rank, world_size):
    tensor = on_device(values(rank, 5000))
    boom = ZeroDivisionError("boom")
    with mock.patch.object(two_phase.MeanSteps, "encode", side_effect=boom) if rank == 1 else nullcontext():
        error = error_of(tensor)
    assert "rank 1 failed while compressing its values: ZeroDivisionError: boom" in str(error)
    assert torch.equal(tensor.cpu(), values(rank, 5000)), "nothing has changed"
    assert pool()._taken == 0
    assert check(values(rank, 5000), strategy="two_phase")


@world(1, on_device=True)
def test_a_device_without_a_pool_of_streams_is_refused(rank, world_size):
    with (
        mock.patch.object(devices, "has_stream_pool", lambda device: device.type == "cpu"),
        pytest.raises(ValueError, match=r"tensor must be on a device with a pool of streams, .* got device late:0"),
    ):
        qcomm.all_reduce(torch.ones(3, device="late"))


@world(2, on_device=True)
def test_refused_arguments_reach_all_ranks(rank, world_size):
    assert check(values(rank, 5000), strategy="two_phase")
    error = error_of(on_device(values(rank, 5000)).to(torch.int64) if rank == 1 else on_device(values(rank, 5000)))
    assert ("float32" in str(error)) if rank == 1 else ("rank 1 failed while preparing" in str(error))
    error = error_of(on_device(values(rank, 5000))[:1].expand(10) if rank == 1 else on_device(values(rank, 10)))
    assert ("expanded" in str(error)) if rank == 1 else ("rank 1 failed while preparing" in str(error))
    assert check(values(rank, 5000), strategy="two_phase")


@world(2, on_device=True)
def test_a_rank_on_the_cpu_and_one_on_a_device(rank, world_size):
    """The exchange is the same, so they may be one job."""
    inputs = values(rank, 5000)
    expected, tensor = inputs.clone(), on_device(inputs) if rank else inputs.clone()
    qcomm.all_reduce(expected, strategy="two_phase")
    qcomm.all_reduce(tensor, strategy="two_phase")
    assert torch.equal(tensor.cpu(), expected)


@world(1, on_device=True)
def test_a_world_of_one(rank, world_size):
    inputs = values(rank, 5000)
    tensor = on_device(inputs)
    work = qcomm.all_reduce(tensor, async_op=True)
    assert work.wait() and work.is_success()
    assert torch.equal(tensor.cpu(), inputs)
    assert check(inputs, strategy="two_phase")


@world(2, on_device=True)
def test_host_memory_is_bounded(rank, world_size):
    group = dist.new_group()
    before = torch.ops.late.pinned_bytes()
    largest = 4 * 20_000
    for _ in range(3):
        tensors = [on_device(values(rank, elements)) for elements in (20_000, 100, 15_000, 20_000, 19_000, 7)]
        works = [qcomm.all_reduce(t, group=group, strategy="two_phase", async_op=True) for t in tensors]
        for work in works:
            work.wait()
            assert torch.ops.late.pinned_bytes() - before <= LIMIT * largest
    dist.destroy_process_group(group)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@world(1, 2, 3)
def test_on_a_gpu(rank, world_size):
    """Ranks may share one GPU. Large tensors make the copies late."""
    device = f"cuda:{rank % torch.cuda.device_count()}"
    for strategy in STRATEGIES:
        for dtype in DTYPES:
            for elements in (0, 1, 1000, 3_000_001):
                assert check(values(rank, elements, dtype), device, strategy=strategy), (strategy, dtype, elements)
    for _ in range(10):
        assert check_several(rank, elements=2_000_000, device=device)
