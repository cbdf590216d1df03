"""Checks of a sharded model and of the options of ``attach``, made before anything of the model changes."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from qcomm.codec import CPU, Grid, RangeGrid
from qcomm.collectives import ReduceKeywords, ReduceOptions
from qcomm.fsdp.units import Unit, find_units, param_groups

__all__ = ["check_replicas", "check_setters", "check_weights", "checked_options", "checked_units"]

# Options that a reduce-scatter, or an all-gather of weights, has a use for.
SHARDED_OPTIONS = frozenset({"min_elements", "num_threads", "secret", "connections"})


def check_setters(gradients: bool, weights: bool, replicas: bool) -> None:
    """Raises RuntimeError unless this torch has the setters that are needed."""
    needed = {
        "set_custom_reduce_scatter": ("gradients", gradients and not replicas),
        "set_all_reduce_hook": ("replicas", gradients and replicas),
        "set_custom_all_gather": ("weights", weights),
    }
    for setter, (argument, is_needed) in needed.items():
        if is_needed and not hasattr(FSDPModule, setter):
            raise RuntimeError(
                f"torch {torch.__version__} has no FSDPModule.{setter}, which {argument}= needs: install a newer "
                "torch, or train with DistributedDataParallel and qcomm.attach"
            )


def checked_units(model: object) -> list[Unit]:
    """Returns the units of a model; raises an error that says what cannot be handled."""
    if not isinstance(model, torch.nn.Module) or not any(isinstance(m, FSDPModule) for m in model.modules()):
        raise TypeError(
            "model must be a module that torch.distributed.fsdp.fully_shard was called on, got "
            f"{type(model).__name__}; for DistributedDataParallel there is qcomm.attach"
        )
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule) and len(param_groups(module)) > 1:
            raise ValueError(
                f"module {name!r} has parameters on several meshes, for which torch takes no custom collectives; call "
                "fully_shard on its parts, each with one mesh"
            )
        if isinstance(module, FSDPModule):
            for group in param_groups(module):
                _check_mesh(name, group.mesh_info)
    units = find_units(model)
    if not any(unit.parameters for unit in units):
        raise ValueError("model must have sharded parameters, got none")
    for unit in units:
        _check_unit(unit, units[0])
    return units


def _check_mesh(name: str, mesh_info: Any) -> None:
    if getattr(mesh_info, "shard_mesh_dim", None) is None:
        raise ValueError(f"module {name!r} is replicated and not sharded: use DistributedDataParallel and qcomm.attach")
    if getattr(mesh_info, "replicate_mesh_dim", None) is not None:
        raise ValueError(
            f"module {name!r} is sharded on a mesh of two dimensions, across which torch calls its own all-reduce, for "
            "which it has no setter: call fully_shard with the mesh's dimension of shards alone, and pass the group of "
            "the other one: fully_shard(module, mesh=mesh['shard']), then "
            "qcomm.fsdp.attach(model, replicas=mesh['replicate'].get_group())"
        )


def _check_unit(unit: Unit, first: Unit) -> None:
    ranks, expected = dist.get_process_group_ranks(unit.group), dist.get_process_group_ranks(first.group)
    if ranks != expected:
        raise ValueError(
            f"all units must be shared by the same ranks: {first.name!r} is by {expected}, and {unit.name!r} by {ranks}"
        )
    if unit.param_group.device != CPU:
        raise ValueError(
            f"unit {unit.name!r} must be on the CPU, got device {unit.param_group.device}: sharded models on a device "
            "are not supported yet; DistributedDataParallel and qcomm.attach are"
        )
    for parameter, fsdp_param in zip(unit.parameters, unit.param_group.fsdp_params, strict=True):
        placement = fsdp_param.fsdp_placement
        if placement.dim != 0:
            raise ValueError(
                f"parameter {parameter.key!r} must be sharded along its first dimension, got {placement}: leave out "
                "shard_placement_fn"
            )
        if fsdp_param.is_dtensor:
            raise ValueError(
                f"parameter {parameter.key!r} was a DTensor before fully_shard, as with tensor parallelism, which is "
                "not supported: train with fully_shard alone"
            )
        if fsdp_param.sharded_param.is_complex():
            raise TypeError(f"parameter {parameter.key!r} is complex; keep it as a real tensor")
    for kind in ("reduce_scatter", "all_gather"):
        comm = getattr(unit.param_group, f"_{kind}_comm", None)
        if comm is not None and not type(comm).__name__.startswith("Default"):
            raise RuntimeError(
                f"unit {unit.name!r} has a custom {kind} already ({type(comm).__name__}): attach a model once, and "
                "set no other"
            )
    if getattr(unit.param_group, "_all_reduce_hook", None) is not None:
        raise RuntimeError(f"unit {unit.name!r} has an all-reduce hook already: attach a model once, and set no other")


def check_weights(unit: Unit) -> None:
    """Raises unless the weights of a unit come in one buffer of one dtype, shared by the unit's ranks."""
    group = unit.param_group
    if getattr(group, "_use_post_forward_mesh", False):
        raise ValueError(
            f"weights must be None where unit {unit.name!r} is resharded to fewer ranks after forward; call "
            "fully_shard with reshard_after_forward=True or False"
        )
    dtypes = {fsdp_param.sharded_param.dtype for fsdp_param in group.fsdp_params}
    if len(dtypes) > 1 and group.mp_policy.param_dtype is None:
        raise TypeError(
            f"weights must be None where unit {unit.name!r} has several dtypes, got {sorted(map(str, dtypes))}"
        )
    for parameter, fsdp_param in zip(unit.parameters, group.fsdp_params, strict=True):
        if hasattr(fsdp_param._sharded_local_tensor, "fsdp_pre_all_gather"):
            raise TypeError(
                f"weights must be None where parameters come with an all-gather of their own, as {parameter.key!r} does"
            )


def checked_options(
    gradients: Grid | None,
    weights: RangeGrid | None,
    replicas: dist.ProcessGroup | None,
    error_feedback: bool,
    options: ReduceKeywords,
) -> tuple[ReduceOptions | None, ReduceOptions | None]:
    """Returns the options of gradients and of weights; raises TypeError or ValueError, naming the argument."""
    if gradients is None and weights is None:
        raise ValueError("gradients or weights must be a grid, got None for both: nothing would be compressed")
    if weights is not None and not isinstance(weights, RangeGrid):
        raise TypeError(f"weights must be a qcomm.RangeGrid or None, got {type(weights).__name__}")
    if replicas is not None and (gradients is None or weights is not None):
        raise ValueError("replicas must come with gradients and without weights, which do not travel between replicas")
    if options.get("device_codec"):
        raise ValueError("device_codec must be False: sharded models are exchanged on the CPU")
    if replicas is None and (useless := sorted(set(options) - SHARDED_OPTIONS)):
        raise TypeError(
            f"{', '.join(useless)}: option of a mean over replicas=, which is None; nothing is averaged twice"
        )
    if replicas is None and options.get("secret") is not None and (gradients is None or weights is None):
        raise ValueError("secret must come with gradients and weights: what torch's own collectives send is not sealed")
    gradient_options = None if gradients is None else ReduceOptions(gradients, **options)
    if gradient_options is not None and error_feedback:
        gradient_options.check_feedback()
    return gradient_options, None if weights is None else ReduceOptions(weights, **options)


def check_replicas(replicas: dist.ProcessGroup, shards: dist.ProcessGroup) -> None:
    """Raises ValueError if any rank but this one is in both groups."""
    members, sharing = dist.get_process_group_ranks(replicas), dist.get_process_group_ranks(shards)
    if common := set(members) & set(sharing) - {dist.get_rank()}:
        raise ValueError(
            f"replicas must be the ranks that have the same shards as this one, got {members}, of which "
            f"{sorted(common)} share the model with it ({sharing})"
        )
