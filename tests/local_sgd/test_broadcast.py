"""One rank's weights to all: equal bits, within the grid's bound, and what goes wrong."""

import pytest
import torch
import torch.distributed as dist
from distributed import assert_same_on_all_ranks, counting_bytes, gathered, world
from torch import nn

import qcomm
from qcomm.communicator.handshake import HEADER_WORDS
from qcomm.local_sgd import broadcast

pytestmark = pytest.mark.world


def network(rank, dtype=torch.float32):
    """Other weights, statistics and counters on each rank."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Conv2d(8, 32, 5), nn.BatchNorm2d(32), nn.Conv2d(32, 8, 3, bias=False)).to(dtype)
    model = model.to(memory_format=torch.channels_last)
    model[1].running_var.normal_()
    model[1].num_batches_tracked.fill_(rank + 5)
    model.register_buffer("mask", torch.rand(50, 50) > 0.5 + 0.1 * rank)
    model.register_buffer("angles", torch.randn(2000, dtype=dtype))
    return model


def check_equal(rank, world_size, src, dtype, options):
    model, original = network(rank, dtype), network(src, dtype)
    strides, addresses = model[0].weight.stride(), [p.data_ptr() for p in model.parameters()]
    qcomm.broadcast_parameters(model, src=src, **options)
    assert_same_on_all_ranks(*model.parameters(), *model.buffers())
    assert model[0].weight.stride() == strides and addresses == [p.data_ptr() for p in model.parameters()]
    lossless = options.get("lossless", False) or world_size == 1
    for (name, wanted), got in zip(original.named_parameters(), model.parameters(), strict=True):
        if lossless or wanted.numel() < 1024:
            assert torch.equal(wanted, got), name
        else:
            error, extent = float((wanted - got).double().abs().max()), float(wanted.max() - wanted.min())
            assert 0 < error <= extent / 2**7 + 2 * torch.finfo(dtype).eps, name
    for (name, wanted), got in zip(original.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(wanted, got), name


WAYS = {
    **{dtype: (0, getattr(torch, dtype), {}) for dtype in ("bfloat16", "float16", "float64")},
    "lossless": (-1, torch.float32, {"lossless": True}),
    "two threads": (0, torch.float32, {"grid": qcomm.SigmaGrid(0.02), "num_threads": 2}),
}


@world()
@pytest.mark.parametrize(("world_size", "src"), [(size, src) for size in (1, 2, 3, 4) for src in range(size)])
def test_all_ranks_are_equal(rank, world_size, src):
    check_equal(rank, world_size, src, torch.float32, {})


@world(1, 2, 3, 4)
@pytest.mark.parametrize("way", WAYS)
def test_dtypes_and_options(rank, world_size, way):
    src, dtype, options = WAYS[way]
    check_equal(rank, world_size, src % world_size, dtype, options)


@world(2, 3)
def test_forms_of_parameters(rank, world_size):
    """Parameters, names, groups, integers; weights with NaN; more ranks than bytes in a part."""
    layer = nn.Linear(50, 50)
    for params in (layer.parameters(), layer.named_parameters(), torch.optim.SGD(layer.parameters()).param_groups):
        nn.init.normal_(layer.weight)
        qcomm.broadcast_parameters(params, src=1)
        assert_same_on_all_ranks(*layer.parameters())
    odd = [torch.randn(60, 60), torch.tensor(rank), torch.randn(3, dtype=torch.complex64), torch.empty(0)]
    if rank == 1:
        odd[0][2, 3] = float("nan")
    wanted = gathered(odd)[1]
    qcomm.broadcast_parameters(odd, src=1)
    for got, value in zip(odd, wanted, strict=True):
        assert torch.equal(torch.view_as_real(got) if got.is_complex() else got.nan_to_num(7.0),
                           torch.view_as_real(value) if value.is_complex() else value.nan_to_num(7.0))  # fmt: skip
    # The weights of all are common now, and so the first averaging changes them by rounding at most.
    before = layer.weight.detach().clone()
    qcomm.CompressedModelAverager(1, strategy="two_phase").average_parameters(layer.parameters())
    torch.testing.assert_close(before, layer.weight.detach(), rtol=0, atol=1e-6)


@world(2, 4)
def test_bytes_that_are_sent(rank, world_size):
    layer = nn.Linear(400, 400)
    qcomm.broadcast_parameters(layer)  # connects
    with counting_bytes() as counting:
        qcomm.broadcast_parameters(layer)
    received = counting.received() - 8 * HEADER_WORDS * (world_size - 1)
    packed = sum(part for part in gathered(received if rank else 0)) / (world_size - 1)
    # Weights as they are initialised are uniform: H + c = 10 bits. The bias travels in 32.
    assert 160_000 * 10 / 8 + 1600 < packed < 160_000 * 10 / 8 + 3000
    if rank == 0:
        assert counting.sent < 2 * packed * (world_size - 1) / world_size + 1000 and received == 0
    else:
        assert counting.sent < packed * (world_size - 2) / world_size + 1000


@world(3)
def test_a_group_of_some_ranks(rank, world_size):
    """``src`` is the rank in the whole world, as in torch.distributed.broadcast."""
    group = dist.new_group([1, 2])
    layer = nn.Linear(50, 50)
    before = layer.weight.detach().clone()
    if rank in (1, 2):
        qcomm.broadcast_parameters(layer, src=2, process_group=group, lossless=True)
        with pytest.raises(ValueError, match=r"src must be one of the group's ranks \[1, 2\], got 0"):
            qcomm.broadcast_parameters(layer, src=0, process_group=group)
    weights = gathered((before, layer.weight.detach()))
    assert torch.equal(weights[1][1], weights[2][0]) and torch.equal(weights[0][0], weights[0][1])
    dist.barrier()
    if rank in (1, 2):
        dist.destroy_process_group(group)


@world(2, 3)
def test_failures_are_told_to_all(rank, world_size):
    layer, odd = nn.Linear(50, 50), rank == 1
    before = [p.detach().clone() for p in layer.parameters()]

    def fails(error, match, params=layer, **options):
        with pytest.raises(error, match=match):
            qcomm.broadcast_parameters(params, **options)
        assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))

    sparse = [torch.eye(3).to_sparse()]
    fails(qcomm.CollectiveError, "rank 1 failed while preparing.*must be a dense tensor", sparse if odd else layer)
    fails(qcomm.CollectiveError, "rank 1 failed while preparing.*params must be an iterable", None if odd else layer)
    fails(qcomm.CollectiveError, "rank 1 failed.*TypeError: grid must be", grid=3 if odd else qcomm.RangeGrid())
    fails(qcomm.CollectiveError, "rank 1 failed.*lossless must be a bool", lossless=["*"] if odd else True)
    for source in (0, 1):
        fails(
            qcomm.ConfigMismatchError,
            r"min_elements: 6 on ranks? 0.*, 5 on rank 1",
            src=source,
            min_elements=5 if odd else 6,
        )
        other = nn.Linear(50, 51) if odd else layer
        fails(qcomm.ConfigMismatchError, r"tensors: 2 .*weight float32 \[51, 50\]", other, src=source)
    fails(qcomm.ConfigMismatchError, "src: 0 on ranks? 0", src=int(odd))
    # On one rank alone, while it decodes: the others have the weights, and hear of it in the next collective.
    if odd:
        unpack, broadcast.unpack_state = broadcast.unpack_state, lambda *_: {"weight": torch.ones(3)}
        fails(qcomm.CollectiveError, "other names than the ranks agreed on; the others are told")
        broadcast.unpack_state = lambda *_: {"weight": torch.ones(3), "bias": torch.ones(3)}
    else:
        qcomm.broadcast_parameters(layer)
        before = [p.detach().clone() for p in layer.parameters()]
    fails(qcomm.CollectiveError, "rank 1 failed while decoding the result")
    if odd:
        fails(qcomm.CollectiveError, "'weight' was not sent in the shape and dtype")
        broadcast.unpack_state = unpack
    else:
        qcomm.broadcast_parameters(layer)
        before = [p.detach().clone() for p in layer.parameters()]
    fails(qcomm.CollectiveError, "rank 1 failed while decoding the result")
    qcomm.broadcast_parameters(layer)
    assert_same_on_all_ranks(*layer.parameters())
