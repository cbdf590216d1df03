"""Models, options and versions of torch that cannot be served: errors that say what to do."""

import pytest
import torch
import torch.distributed as dist
from distributed import world
from sharded_model import attach, backward, net, shard
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

import qcomm
import qcomm.fsdp

pytestmark = pytest.mark.world


@world(2)
def test_options_that_are_wrong(rank, world_size):
    model = shard(net())
    for options, error, message in (
        ({"gradients": None}, ValueError, "gradients or weights must be a grid"),
        ({"weights": qcomm.SigmaGrid()}, TypeError, "weights must be a qcomm.RangeGrid or None, got SigmaGrid"),
        ({"gradients": "sigma"}, TypeError, "grid must be a qcomm.SigmaGrid or qcomm.RangeGrid"),
        ({"gradients": qcomm.SigmaGrid(4.0)}, ValueError, "step must be at most 3.4 with error feedback"),
        ({"mean_step": 1.0}, TypeError, "mean_step: option of a mean over replicas="),
        ({"device_codec": True}, ValueError, "device_codec must be False"),
        ({"error_feedback": 1}, TypeError, "error_feedback must be a bool"),
        ({"exclude": "*.bias"}, TypeError, "exclude must be a sequence of patterns"),
        ({"grad_scale": -1.0}, ValueError, "grad_scale must be positive"),
        ({"replicas": dist.group.WORLD, "gradients": None}, ValueError, "gradients or weights"),
        ({"min_elements": -1}, ValueError, "min_elements must be >= 0"),
        ({"secret": "key"}, ValueError, "secret must come with gradients and weights: .* is not sealed"),
    ):
        with pytest.raises(error, match=message):
            attach(model, **options)
    attach(model, gradients=qcomm.SigmaGrid(4.0), error_feedback=False)  # nothing is half-attached


@world(2)
def test_models_that_are_not_sharded(rank, world_size):
    with pytest.raises(TypeError, match=r"fully_shard was called on, got Sequential; .*qcomm\.attach"):
        attach(net())
    with pytest.raises(TypeError, match="got str"):
        attach("model")
    with pytest.raises(TypeError, match=r"got FSDPSequential; .* there is qcomm\.fsdp\.attach"):
        qcomm.attach(shard(net()))


@world(2)
def test_a_model_is_attached_once(rank, world_size):
    model = shard(net())
    attach(model)
    with pytest.raises(RuntimeError, match=r"custom reduce_scatter already \(GradientScatter\): attach a model once"):
        attach(model)
    other = shard(net())
    other.set_all_reduce_hook(lambda values: None)
    with pytest.raises(RuntimeError, match="has an all-reduce hook already"):
        attach(other)


@world(2)
def test_parameters_that_are_sharded_otherwise(rank, world_size):
    model = nn.Sequential(nn.Linear(48, 32))
    fully_shard(model, shard_placement_fn=lambda parameter: Shard(parameter.ndim - 1))
    with pytest.raises(ValueError, match=r"'0\.weight' must be sharded along its first dimension, got S"):
        attach(model)


@world(2)
def test_units_that_other_ranks_share(rank, world_size):
    model = net()
    alone = [dist.new_group([number]) for number in range(world_size)][rank]
    mesh = torch.distributed.device_mesh.DeviceMesh.from_group(alone, "cpu")
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    with pytest.raises(ValueError, match="all units must be shared by the same ranks"):
        attach(model)


@world(2)
def test_a_part_of_a_unit(rank, world_size):
    model = net()
    fully_shard([model[0], model[2]])
    with pytest.raises(ValueError, match=r"must hold all modules of a fully_shard call.*pass the whole model"):
        attach(model[0])


@world(2)
@pytest.mark.parametrize(
    ("setter", "options", "argument"),
    [
        ("set_custom_reduce_scatter", {}, "gradients"),
        ("set_custom_all_gather", {"weights": qcomm.RangeGrid(), "gradients": None}, "weights"),
        ("set_all_reduce_hook", {"replicas": "world"}, "replicas"),
    ],
)
def test_a_torch_without_the_setter(rank, world_size, setter, options, argument):
    model = shard(net())
    options = {**options, **({"replicas": dist.group.WORLD} if "replicas" in options else {})}
    kept = getattr(FSDPModule, setter)
    try:
        delattr(FSDPModule, setter)
        with pytest.raises(RuntimeError, match=rf"has no FSDPModule\.{setter}, which {argument}= needs"):
            attach(model, **options)
    finally:
        setattr(FSDPModule, setter, kept)


@world(2)
def test_weights_of_several_dtypes(rank, world_size):
    model = nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 8).to(torch.bfloat16).requires_grad_(False))
    fully_shard(model)
    with pytest.raises(TypeError, match=r"weights must be None where unit 'the whole model' has several dtypes"):
        attach(model, weights=qcomm.RangeGrid())
    attach(model)


@world(4)
def test_weights_that_are_gathered_from_fewer_ranks(rank, world_size):
    model = shard(net(), units=(), reshard_after_forward=2)
    with pytest.raises(ValueError, match="is resharded to fewer ranks after forward"):
        attach(model, weights=qcomm.RangeGrid())
    state = attach(model)
    backward(model, rank)
    assert state.stats()["buckets"] == 1


@world(2)
def test_adam_behind_a_coarse_grid_is_warned_of(rank, world_size):
    model = shard(net())
    attach(model, gradients=qcomm.SigmaGrid(2.0))
    optimizer = torch.optim.Adam(model.parameters())
    backward(model, rank)
    with pytest.warns(UserWarning, match="Adam divides by the root of a second moment.*gradients=None"):
        optimizer.step()


@world(2)
def test_a_reduction_that_is_no_sum(rank, world_size):
    model = shard(net())
    attach(model)
    comm = model._get_fsdp_state()._fsdp_param_groups[0]._reduce_scatter_comm
    with pytest.raises(ValueError, match="op must be SUM, AVG or a premultiplied sum"):
        comm(torch.empty(1), torch.empty(2), None, dist.ReduceOp.MAX)
