"""Gradients of sharded models: right within the bound of the grid, and exact over time."""

from functools import partial

import pytest
import torch
from distributed import CountingGloo, gathered, sliced, world
from distributed import attach as attach_ddp
from sharded_model import attach, backward, exact_means, gradients, half_a_step, local_gradients, net, shard
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import qcomm

pytestmark = pytest.mark.world

RAW = 1 << 30  # so many elements that no tensor is compressed


def assert_near(found, exact, bound):
    assert found.keys() == exact.keys()
    for name, mean in exact.items():
        limit = bound(name) if callable(bound) else bound
        assert (found[name] - mean).abs().max() <= limit, name


def each(model, setter, *arguments):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            getattr(module, setter)(*arguments)


def assert_sums_of_two_steps(model, world_size):
    first, second = (exact_means(world_size, step) for step in range(2))
    for name, found in gradients(model).items():
        assert torch.allclose(found, first[name] + second[name], rtol=1e-5, atol=1e-6)


@world(2, 4)
def test_gradients_are_within_half_a_step_of_their_mean(rank, world_size):
    model = shard(net())
    state = attach(model, gradients=qcomm.SigmaGrid(step=1.0), error_feedback=False)
    backward(model, rank)
    found, exact = gradients(model), exact_means(world_size)
    of_ranks = [local_gradients(other) for other in range(world_size)]
    assert_near(found, exact, partial(half_a_step, of_ranks, 1.0))
    assert any(not torch.equal(found[name], exact[name]) for name in exact)
    assert 0 < state.stats()["bits_per_element_phase1"] < 6


@world(2)
def test_each_tensor_has_a_step_of_its_own(rank, world_size):
    """A tensor whose gradients are a million times smaller than its neighbour's in the same buffer."""
    model = shard(nn.Sequential(nn.Linear(48, 37, bias=False), nn.Linear(37, 40, bias=False)), units=())
    with torch.no_grad():
        model[1].weight.to_local().mul_(1e-6)
    state = attach(model, error_feedback=False)
    backward(model, rank)
    steps = {name: tensor["step"] for name, tensor in state.stats()["tensors"].items()}
    assert steps["0.weight"] < 1e-3 * steps["1.weight"]
    assert gradients(model)["0.weight"].abs().max() > 0


@world(2, 4)
def test_uncompressed_tensors_are_added_in_rank_order(rank, world_size):
    model = shard(net())
    attach(model, min_elements=RAW)
    backward(model, rank)
    exact = exact_means(world_size)
    assert all(torch.equal(found, exact[name]) for name, found in gradients(model).items())


@world(2)
@pytest.mark.parametrize(
    "grid", [qcomm.SigmaGrid(1.0), qcomm.SigmaGrid(3.2), qcomm.RangeGrid(c=2)], ids=["sigma", "runs", "range"]
)
@pytest.mark.parametrize("elements", [16, 1 << 17], ids=["two slices", "one slice"])
def test_nothing_is_lost_over_time(rank, world_size, grid, elements):
    """The sum of what arrives is the sum of the exact means, less the mean of the residuals that are kept."""
    model = shard(net())
    state = attach(model, gradients=grid)
    arrived, exact = {}, {}
    for step in range(6):
        model.zero_grad()
        with sliced(elements):
            backward(model, rank, step)
        for total, part in ((arrived, gradients(model)), (exact, exact_means(world_size, step))):
            total.update({name: total.get(name, 0.0) + value.double() for name, value in part.items()})
    residuals = gathered(state.state_dict()["error_feedback"]["local"])
    for name, total in arrived.items():
        kept = [of_rank[name] for of_rank in residuals if name in of_rank]
        expected = exact[name] - (sum(kept).double() / world_size).view(total.shape) if kept else exact[name]
        assert torch.allclose(total, expected, atol=2e-4, rtol=1e-5), name
    # A rank's own shard is not quantized, and so nothing of it is kept.
    rows = -(-model[2].out_features // world_size)
    own = residuals[rank]["2.weight"].view(model[2].out_features, -1)[rank * rows : (rank + 1) * rows]
    assert not own.any() and residuals[rank]["2.weight"].any()


@world(2)
def test_the_sum_of_an_owner_is_the_one_of_ddp_before_its_mean_is_quantized(rank, world_size):
    """DDP's mean on a grid of 256 steps to the RMS is the owner's sum with hardly an error."""
    layer = nn.Linear(64, 32, bias=False)
    single = DistributedDataParallel(nn.Sequential(layer))
    attach_ddp(single, mean_step=1 / 256, error_feedback=False)
    torch.manual_seed(0)
    data = torch.randn(world_size, 8, 64)
    single(data[rank]).square().sum().backward()
    expected = layer.weight.grad.clone()
    layer.weight.grad = None
    model = shard(nn.Sequential(nn.Linear(64, 32, bias=False)), units=())
    with torch.no_grad():
        rows = 32 // world_size
        model[0].weight.to_local().copy_(layer.weight[rank * rows : (rank + 1) * rows])
    attach(model, error_feedback=False)
    model(data[rank]).square().sum().backward()
    found = gradients(model)["0.weight"]
    rms = expected.square().mean().sqrt()
    assert (found - expected).abs().max() <= rms / 256
    exact = sum(gathered(torch.autograd.grad(layer(data[rank]).square().sum(), layer.weight)[0])) / world_size
    assert (found - exact).abs().max() > rms / 10


@world(2)
@pytest.mark.parametrize(
    ("setter", "value", "factor"),
    [
        ("set_gradient_divide_factor", 5.0, 2 / 5.0),
        ("set_gradient_divide_factor", 2.0, 1.0),
        ("set_force_sum_reduction_for_comms", True, 1.0),
    ],
    ids=["premultiplied", "the number of ranks", "sum"],
)
def test_reductions_that_torch_asks_for(rank, world_size, setter, value, factor):
    if not hasattr(FSDPModule, setter):
        pytest.skip(f"this torch has no {setter}")
    model = shard(net())
    attach(model, min_elements=RAW)
    each(model, setter, value)
    backward(model, rank)
    exact = exact_means(world_size)
    for name, found in gradients(model).items():
        assert torch.allclose(found, exact[name] * factor, rtol=1e-6, atol=1e-9), name


POLICIES = {
    "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    "bf16, reduced in fp32": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "bf16, reduced in fp16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float16),
}


@world(2)
@pytest.mark.parametrize("policy", POLICIES)
def test_mixed_precision(rank, world_size, policy):
    plain = shard(net(), mp_policy=POLICIES[policy])
    backward(plain, rank)
    expected = gradients(plain)
    for min_elements, tolerance in ((RAW, 0.02), (20, 0.9)):
        model = shard(net(), mp_policy=POLICIES[policy])
        attach(model, min_elements=min_elements, error_feedback=False)
        backward(model, rank)
        for name, found in gradients(model).items():
            assert found.dtype == torch.float32
            assert (found - expected[name]).norm() <= tolerance * expected[name].norm(), name


@world(2)
def test_float64(rank, world_size):
    model = shard(net(torch.float64))
    attach(model, min_elements=RAW)
    backward(model, rank, dtype=torch.float64)
    assert all(found.dtype == torch.float64 and found.any() for found in gradients(model).values())


@world(2)
def test_gradients_that_are_accumulated_without_an_exchange(rank, world_size):
    model = shard(net())
    state = attach(model, min_elements=RAW)
    model.set_requires_gradient_sync(False)
    backward(model, rank, step=0)
    assert state.stats()["bytes_sent"] == 0
    model.set_requires_gradient_sync(True)
    backward(model, rank, step=1)
    sent = state.stats()
    assert sent["bytes_sent"] > 0 and sent["steps"] == 1
    assert_sums_of_two_steps(model, world_size)


@world(2)
def test_gradients_that_are_accumulated_over_exchanges(rank, world_size):
    model = shard(net())
    attach(model, min_elements=RAW)
    for step in range(2):
        backward(model, rank, step)
    assert_sums_of_two_steps(model, world_size)


@world(2)
def test_parameters_that_are_frozen_and_thawed(rank, world_size):
    model = shard(net())
    model[2].weight.requires_grad_(False)
    state = attach(model)
    backward(model, rank)
    assert "2.weight" not in gradients(model) and "2.weight" not in state.stats()["tensors"]
    model[2].weight.requires_grad_(True)
    model.zero_grad()
    backward(model, rank, step=1)
    of_ranks = [local_gradients(other, 1) for other in range(world_size)]
    found, exact = gradients(model)["2.weight"], exact_means(world_size, 1)["2.weight"]
    assert (found - exact).abs().max() <= half_a_step(of_ranks, 1.0, "2.weight")


class Branches(nn.Module):
    """Two layers of one size, of which a forward uses one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(48, 24, bias=False), nn.Linear(48, 24, bias=False)

    def forward(self, values, side):
        return getattr(self, side)(values)


@world(2)
def test_modules_that_are_one_unit(rank, world_size):
    model = net()
    try:
        fully_shard([model[0], model[2]])
    except (AttributeError, TypeError, ValueError):
        pytest.skip("this torch shards one module at a time")
    fully_shard(model)
    state = attach(model, min_elements=RAW)
    backward(model, rank)
    exact = exact_means(world_size)
    assert all(torch.equal(found, exact[name]) for name, found in gradients(model).items())
    assert state.stats()["buckets"] == 2


@world(2)
def test_parameters_that_a_step_does_not_use(rank, world_size):
    """Their elements are as many as those of the parameters that it uses, so only their gradients tell."""
    model = shard(Branches(), units=())
    state = attach(model)
    for side in ("right", "left", "right"):
        model.zero_grad()
        model(torch.full((1, 48), 1.0 + rank), side).sum().backward()
        assert list(gradients(model)) == [f"{side}.weight"]
    assert set(state.state_dict()["error_feedback"]["local"]) == {"left.weight", "right.weight"}


@world(2)
def test_unused_parameters_that_torch_fills_with_zeros(rank, world_size):
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        pytest.skip("this torch leaves out unused parameters always")
    model = shard(Branches(), units=())
    attach(model)
    model.set_reduce_scatter_unused_params(True)
    model(torch.ones(1, 48), "right" if rank else "left").sum().backward()
    found = gradients(model)
    assert torch.allclose(found["left.weight"], torch.full((24, 48), 0.5)) and found["right.weight"].any()


class Repeated(nn.Module):
    """A layer that is a unit, and that a forward uses twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(48, 48)

    def forward(self, values):
        return self.layer(self.layer(values).tanh())


@world(2)
@pytest.mark.parametrize("weights", [None, qcomm.RangeGrid(num_bits=12)], ids=["exact", "quantized"])
def test_a_unit_that_is_used_twice(rank, world_size, weights):
    model = Repeated()
    fully_shard(model.layer)
    fully_shard(model)
    attach(model, min_elements=RAW, weights=weights, exclude=["*"])
    backward(model, rank)
    of_ranks = [local_gradients(other, model=Repeated()) for other in range(world_size)]
    for name, found in gradients(model).items():
        exact = torch.stack([grads[name] for grads in of_ranks]).mean(0)
        assert torch.allclose(found, exact, rtol=1e-5, atol=1e-6), name


class Tied(nn.Module):
    """A layer whose weight is used twice, under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(48, 48, bias=False), nn.Linear(48, 48, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, values):
        return self.head(self.embed(values).tanh())


@world(2)
def test_tied_parameters(rank, world_size):
    model = shard(Tied(), units=())
    state = attach(model)
    backward(model, rank)
    of_ranks = [local_gradients(other, model=Tied()) for other in range(world_size)]
    exact = torch.stack([grads["embed.weight"] for grads in of_ranks]).mean(0)
    found = gradients(model)
    assert list(found) == list(state.state_dict()["error_feedback"]["local"]) == ["embed.weight"]
    assert (found["embed.weight"] - exact).abs().max() <= half_a_step(of_ranks, 1.0, "embed.weight")


@world(2)
@pytest.mark.parametrize("step", [1.0, 3.2], ids=["measured", "forecast"])
def test_a_gradient_that_is_not_finite(rank, world_size, step):
    """It is NaN where it arrives, no other tensor is, and nothing of it is kept."""
    model = shard(net())
    state = attach(model, gradients=qcomm.SigmaGrid(step=step))
    for number in range(3):
        model.zero_grad()
        backward(model, rank, number)
    before = state.state_dict()["error_feedback"]["local"]
    model.zero_grad()
    handle = model[2].register_full_backward_hook(
        lambda module, inputs, outputs: (torch.full_like(inputs[0], float("nan")),) if rank == 1 else inputs
    )
    backward(model, rank, 3)
    handle.remove()
    found = gradients(model)
    assert found["0.weight"].isnan().any() and found["4.weight"].isfinite().all()
    if step == 1.0:
        assert found["0.weight"].isnan().all()
    after = state.state_dict()["error_feedback"]["local"]
    assert all(residual.isfinite().all() for residual in after.values())
    if rank == 1:
        assert torch.equal(after["0.weight"], before["0.weight"])
    model.zero_grad()
    backward(model, rank, 4)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@world(2)
def test_layers_that_are_computed_again(rank, world_size):
    """Activation checkpoints run passes of the autograd engine inside of backward."""
    for reentrant in (False, True):
        module = net()
        forward = module[2].forward
        module[2].forward = partial(checkpoint, forward, use_reentrant=reentrant)
        model = shard(module)
        attach(model, min_elements=RAW)
        backward(model, rank)
        exact = exact_means(world_size)
        for name, found in gradients(model).items():
            assert torch.allclose(found, exact[name], rtol=1e-5, atol=1e-7), name


@world(2)
def test_residuals_do_not_follow_the_loss_scale(rank, world_size):
    scales = iter([1024.0, 2.0, 65536.0])
    model = shard(net())
    scaled = attach(model, grad_scale=scales.__next__)
    plain_model = shard(net())
    plain = attach(plain_model)
    for step, scale in enumerate([1024.0, 2.0, 65536.0]):
        for trained, factor in ((model, scale), (plain_model, 1.0)):
            trained.zero_grad()
            backward(trained, rank, step, factor)
        expected = gradients(plain_model)
        for name, found in gradients(model).items():
            assert torch.allclose(found / scale, expected[name], rtol=1e-5, atol=1e-6), name
    assert abs(scaled.stats()["residual_norm"] / plain.stats()["residual_norm"] - 1) < 1e-5


@world(2)
def test_bytes_are_those_that_gloo_gets(rank, world_size):
    model = shard(net())
    state = attach(model)
    backward(model, rank)  # connections are made, receives are posted
    state.reset_stats()
    transport = state._exchanges.shards._transport
    counter = transport._gloo = CountingGloo(transport._gloo, [0] * world_size)
    backward(model, rank, 1)
    stats = state.stats()
    received = counter.received()
    transport._gloo = counter.gloo
    assert stats["bytes_sent"] == counter.sent and stats["bytes_received"] == received
    assert stats["bytes_uncompressed"] == 4 * sum(grad.numel() for grad in local_gradients(rank).values())
    assert stats["buckets"] == 3 and stats["steps"] == 1
    assert stats["bytes_sent_phase2"] == 0


@world(2)
def test_excluded_parameters_travel_uncompressed(rank, world_size):
    model = shard(net())
    attach(model, exclude=["2.*"], error_feedback=False)
    backward(model, rank)
    found, exact = gradients(model), exact_means(world_size)
    assert torch.equal(found["2.weight"], exact["2.weight"]) and not torch.equal(found["0.weight"], exact["0.weight"])


@world(1)
def test_a_rank_that_is_alone(rank, world_size):
    model = shard(net())
    state = attach(model, weights=qcomm.RangeGrid())
    backward(model, rank)
    expected = local_gradients(rank)
    assert all(torch.equal(found, expected[name]) for name, found in gradients(model).items())
    assert state.stats()["bytes_sent"] == 0
    state.load_state_dict(state.state_dict())
