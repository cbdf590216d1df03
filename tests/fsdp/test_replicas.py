"""Hybrid sharding: gradients are compressed across replicas, and torch's own collectives serve the shards."""

import pytest
import torch
import torch.distributed as dist
from distributed import gathered, world
from sharded_model import attach, backward, exact_means, failing, gradients, net, shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

import qcomm
import qcomm.fsdp
from qcomm.collectives import two_phase_steps

pytestmark = pytest.mark.world

NAMES = "replicate", "shard"


def hybrid(replicas=2, **options):
    """Returns a model that is shared by half the world, and its state."""
    mesh = init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=NAMES)
    model = shard(net(), mesh["shard"])
    return model, attach(model, replicas=mesh["replicate"].get_group(), strategy="two_phase", **options)


def all_tensors(value):
    return torch.cat([tensor.flatten() for tensor in value.values()])


@world(4)
def test_gradients_across_replicas(rank, world_size):
    model, state = hybrid(error_feedback=False)
    backward(model, rank)
    found, exact = gradients(model), exact_means(world_size)
    for name, mean in exact.items():
        # Each of two ranks, and then the owner, on a step of the RMS of its part.
        assert (found[name] - mean).abs().max() <= 2.5 * mean.square().mean().sqrt() + 1e-6, name
    others = gathered(all_tensors(found))
    assert all(torch.equal(other, others[0]) for other in others)
    stats = state.stats()
    assert stats["bytes_sent_phase1"] > 0 and stats["bytes_sent_phase2"] > 0 and stats["buckets"] == 3


@world(4)
def test_nothing_is_lost_over_time(rank, world_size):
    model, state = hybrid()
    arrived, exact = {}, {}
    for step in range(6):
        model.zero_grad()
        backward(model, rank, step)
        for total, part in ((arrived, gradients(model)), (exact, exact_means(world_size, step))):
            total.update({name: total.get(name, 0.0) + value.double() for name, value in part.items()})
    feedback = state.state_dict()["error_feedback"]
    kept = {name: residual.double() / 2 for name, residual in feedback["local"].items()}
    for name, (start, residual) in feedback["owner"].items():
        kept[name][start : start + residual.numel()] += residual
    states = gathered(kept)
    own = rank % 2
    for name, total in arrived.items():
        rows = -(-total.shape[0] // 2)
        part = (total - exact[name])[own * rows : (own + 1) * rows].flatten()
        expected = -sum(of_rank[name] for of_rank in states[own::2] if name in of_rank)
        assert torch.allclose(part, torch.as_tensor(expected, dtype=torch.float64), atol=2e-4, rtol=1e-5), name


@world(4)
def test_shards_without_elements(rank, world_size):
    """A unit with one row is owned by one of two ranks, and the replicas of the other average nothing."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=NAMES)
    torch.manual_seed(0)
    model = shard(torch.nn.Sequential(torch.nn.Linear(48, 1), torch.nn.Tanh()), mesh["shard"], units=(0,))
    attach(model, replicas=mesh["replicate"].get_group(), strategy="two_phase", small_step=None, min_elements=100)
    backward(model, rank)
    of_ranks = []
    for other in range(world_size):
        plain = torch.nn.Sequential(torch.nn.Linear(48, 1), torch.nn.Tanh())
        plain.load_state_dict({name: weights.full_tensor() for name, weights in model.state_dict().items()})
        backward(plain, other)
        of_ranks.append(plain[0].weight.grad)
    assert torch.allclose(gradients(model)["0.weight"], torch.stack(of_ranks).mean(0), rtol=1e-5, atol=1e-7)


@world(4)
def test_a_divide_factor_of_the_users_own(rank, world_size):
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        pytest.skip("without it torch asks gloo for a premultiplied sum, which gloo does not have")
    model, _ = hybrid(min_elements=1 << 30, small_step=None)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(8.0)
    backward(model, rank)
    for name, mean in exact_means(world_size).items():
        assert torch.allclose(gradients(model)[name], mean * world_size / 8.0, rtol=1e-5, atol=1e-7), name


@world(4, alone=True)
@pytest.mark.parametrize(
    ("victim", "step", "phase"),
    [(3, "encode", "compressing its values"), (1, "decode", "decoding the result")],
    ids=["among some replicas", "after the last message"],
)
def test_a_failure_is_raised_by_the_same_backward_on_all_ranks(rank, world_size, victim, step, phase):
    owner = {"encode": two_phase_steps, "decode": two_phase_steps.MeanSteps}[step]
    model, _ = hybrid()
    backward(model, rank)
    told = pytest.raises(qcomm.CollectiveError, match=rf"rank {victim} failed while {phase}: .*none left")
    with failing(victim, owner, step), told:
        backward(model, rank, 1)
    model.zero_grad()
    backward(model, rank, 2)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@world(4)
def test_a_difference_among_some_replicas_is_raised_on_all_ranks(rank, world_size):
    model, _ = hybrid(gradients=qcomm.SigmaGrid(2.0 if rank == 2 else 1.0))
    with pytest.raises((qcomm.CollectiveError, qcomm.ConfigMismatchError), match=r"grid: .* on rank 0, .* on rank 2"):
        backward(model, rank)


@world(4)
def test_ranks_that_have_other_shards_are_no_replicas(rank, world_size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=NAMES)
    crossed = [dist.new_group(ranks) for ranks in ([0, 3], [1, 2])][rank in {1, 2}]
    model = shard(net(), mesh["shard"])
    attach(model, replicas=crossed, strategy="two_phase")
    with pytest.raises(qcomm.ConfigMismatchError, match=r"shard: . of 2 on rank ., . of 2 on rank ."):
        backward(model, rank)


@world(4)
def test_residuals_of_other_shards_are_refused(rank, world_size):
    model, state = hybrid()
    backward(model, rank)
    states = gathered(dict(state.state_dict()))
    before = state.state_dict()["error_feedback"]["local"]
    with pytest.raises(
        ValueError, match=f"must have residuals of shard {rank % 2} of 2, .*got 'shard {1 - rank % 2} of 2'"
    ):
        state.load_state_dict(states[rank ^ 1])
    state.load_state_dict([states[rank], states[rank ^ 2]])
    mine, other = (states[number][f"rank {number} of 4"][0]["error_feedback"] for number in (rank, rank ^ 2))
    for name, (start, residual) in other["owner"].items():
        other["local"][name][start : start + residual.numel()] += 2 * residual
    for name, (start, residual) in mine["owner"].items():
        mine["local"][name][start : start + residual.numel()] += 2 * residual
    after = state.state_dict()["error_feedback"]["local"]
    assert before.keys() == after.keys()
    assert all(torch.allclose(after[name], mine["local"][name] + other["local"][name]) for name in after)


@world(4)
def test_meshes_that_torch_does_not_let_anyone_serve(rank, world_size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=NAMES)
    with pytest.raises(ValueError, match=r"mesh of two dimensions.*mesh\['shard'\]"):
        attach(shard(net(), mesh))
    model = shard(net(), mesh["shard"])
    with pytest.raises(ValueError, match=r"replicas must be the ranks that have the same shards.*share the model"):
        attach(model, replicas=mesh["shard"].get_group())
    with pytest.raises(ValueError, match="without weights"):
        attach(model, replicas=mesh["replicate"].get_group(), weights=qcomm.RangeGrid())
