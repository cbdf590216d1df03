"""Weights of sharded models, gathered on a RangeGrid: the same bits on all ranks, and shards that stay exact."""

import pytest
import torch
import torch.distributed as dist
from distributed import CountingGloo, assert_same_on_all_ranks, world
from sharded_model import attach, backward, gradients, inputs, net, shard
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import qcomm

pytestmark = pytest.mark.world

GRID = qcomm.RangeGrid(num_bits=8)


@pytest.fixture
def key_file(tmp_path):
    pytest.importorskip("cryptography")
    path = tmp_path / "key"
    path.write_bytes(bytes(range(32)))
    path.chmod(0o600)
    return str(path)


def whole_weights(model):
    """Name -> the weights that forward uses."""
    for module in (model[0], model[2], model):
        module.unshard()
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for module in (model[0], model[2], model):
        module.reshard()
    return found


@world(2, 4)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_weights_are_within_half_a_level_and_the_same_on_all_ranks(rank, world_size, dtype):
    exact = {name: parameter.detach().clone() for name, parameter in net().named_parameters()}
    model = shard(net(), mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    attach(model, gradients=None, weights=GRID)
    found = whole_weights(model)
    assert_same_on_all_ranks(*found.values())
    for name, weights in exact.items():
        level = (weights.max() - weights.min()) / (2**8 - 1)
        rounding = 0.0 if dtype is None else 2 * 2**-8 * float(weights.abs().max())  # before and after
        assert (found[name].float() - weights).abs().max() <= level / 2 * 1.001 + rounding, name
        assert found[name].dtype == (dtype or torch.float32)
    assert dtype is not None or not torch.equal(found["0.weight"], exact["0.weight"])
    # The shards are as they were.
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), exact[name]), name


@world(2)
def test_training_accumulates_no_error_of_weights(rank, world_size):
    """With gradients at weights of 12 bits, shards follow those of exact weights."""
    trained = []
    for weights in (None, qcomm.RangeGrid(num_bits=12)):
        model = shard(net())
        attach(model, weights=weights, min_elements=20 if weights else 1 << 30, exclude=[] if weights else ["*"])
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for step in range(5):
            optimizer.zero_grad()
            backward(model, rank, step)
            optimizer.step()
        trained.append({name: parameter.full_tensor() for name, parameter in model.named_parameters()})
    for name, exact in trained[0].items():
        assert (trained[1][name] - exact).abs().max() < 0.05 * exact.abs().max(), name


@world(2)
def test_both_directions_together(rank, world_size):
    model = shard(net())
    state = attach(model, weights=GRID)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(inputs(rank)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    stats = state.stats()
    assert 0 < stats["bits_per_element_phase1"] < 6 and 0 < stats["weights"]["bits_per_element_phase2"] < 14


@world(2)
def test_a_weight_that_is_not_finite_stays_what_it_is(rank, world_size):
    model = shard(net())
    with torch.no_grad():
        if rank == 1:
            model[2].weight.to_local()[0, 0] = float("inf")
    attach(model, gradients=None, weights=GRID)
    found = whole_weights(model)
    rows = -(-61 // world_size)
    assert found["2.weight"][rows, 0] == float("inf") and found["2.weight"].isfinite().sum() == 61 * 37 - 1
    # The rank's own tensor travels uncompressed then, and no other does.
    exact = dict(net().named_parameters())
    assert torch.equal(found["2.weight"][rows:].flatten()[1:], exact["2.weight"].detach()[rows:].flatten()[1:])
    assert not torch.equal(found["0.weight"], exact["0.weight"])


@world(2)
def test_weights_without_gradients(rank, world_size):
    """As in evaluation, and with frozen parameters."""
    model = shard(net().requires_grad_(False))
    state = attach(model, weights=GRID)
    with torch.no_grad():
        first, second = model(inputs(0)), model(inputs(0))
    assert torch.equal(first, second)
    assert_same_on_all_ranks(first)
    assert state.stats()["weights"]["buckets"] == 5  # the root's stay whole after the first forward


@world(2)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_inference_mode(rank, world_size, dtype):
    model = shard(net(), mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
    attach(model, weights=GRID)
    backward(model, rank)
    with torch.no_grad():
        expected = model(inputs(0))
    with torch.inference_mode():
        assert torch.equal(model(inputs(0)), expected)


@world(2)
def test_sealed_messages(rank, world_size, key_file):
    group = dist.new_group()
    mesh = DeviceMesh.from_group(group, "cpu")
    model = shard(net(), mesh)
    attach(model, weights=GRID, secret=key_file)
    backward(model, rank)
    found = gradients(model)
    model = shard(net())
    attach(model, weights=GRID)
    backward(model, rank)
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients(model).items())


@world(2)
def test_weights_that_are_asked_for_ahead(rank, world_size):
    model = shard(net())
    attach(model, weights=GRID)
    backward(model, rank)
    expected = gradients(model)
    model = shard(net())
    attach(model, weights=GRID)
    handle = model[2].unshard(async_op=True)
    handle.wait()
    model[0].unshard(async_op=True)
    model.set_modules_to_forward_prefetch([model[2]])
    backward(model, rank)
    assert all(torch.equal(found, expected[name]) for name, found in gradients(model).items())


@world(2)
def test_bytes_are_those_that_gloo_gets(rank, world_size):
    model = shard(net())
    state = attach(model, gradients=None, weights=GRID)
    with torch.no_grad():
        model(inputs(rank))
    state.reset_stats()
    transport = state._exchanges.shards._transport
    counter = transport._gloo = CountingGloo(transport._gloo, [0] * world_size)
    model.reshard()
    with torch.no_grad():
        model(inputs(rank))
    received, stats = counter.received(), state.stats()["weights"]
    transport._gloo = counter.gloo
    assert stats["bytes_sent"] == counter.sent and stats["bytes_received"] == received
    assert stats["bytes_sent_phase1"] == 0
