"""The communication hook for DistributedDataParallel: gradients are averaged by compressed exchange during backward.

This module has no postponed annotations, because DDP compares a hook's annotations by identity.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from qcomm.codec import core, is_on_device
from qcomm.collectives import check_grad_scale, watch_optimizers
from qcomm.collectives_cuda import check_device_options, check_group
from qcomm.communicator import CHANNELS, Group, failed, get_communicator, get_world_size, resolve_group
from qcomm.ddp.checks import check_model
from qcomm.ddp.copies import AttachedHooks
from qcomm.ddp.state import CompressionState
from qcomm.transport import MpiGroup

__all__ = ["CompressionState", "attach", "compression_hook"]


def compression_hook(state: CompressionState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a gradient bucket over all ranks: for ``ddp_model.register_comm_hook(state, qcomm.compression_hook)``.

    It returns at once. Usually the background thread of the process group's communicator does the work while backward
    computes the next bucket. Gradients on a device travel through host memory for that, and with ``device_codec`` they
    are averaged on a stream. A bucket that bypasses the thread is summed by the process group's own all-reduce. The
    mean is written into the bucket's own buffer, in its dtype, equal bit for bit on all ranks.

    Args:
        state: a CompressionState.
        bucket: from DDP.

    Returns:
        A Future of ``bucket.buffer()``; waiting for it, as DDP does at the end of backward, raises the error.

    Raises:
        TypeError: DDP runs with ``optimize_ddp="python_reducer"``, which ignores a hook's result.
    """
    if not _is(bucket, dist.GradBucket):
        raise TypeError(
            f"bucket must be a torch.distributed.GradBucket, got {type(bucket).__name__}: with "
            "torch._dynamo.config.optimize_ddp = 'python_reducer' DDP ignores what a communication hook returns; "
            "set it to 'ddp_optimizer'"
        )
    if not _is(state, CompressionState):
        return failed(TypeError(f"state must be a qcomm.CompressionState, got {type(state).__name__}")).future
    return state.reducer.reduce(bucket)


def _is(value: object, kind: type) -> bool:
    # DDP and its users may pass other types than the annotated ones.
    return isinstance(value, kind)


def attach(
    ddp_model: DistributedDataParallel, *, state: CompressionState | None = None, **options: Any
) -> CompressionState:
    """Makes a DDP model exchange compressed gradients, under the names of its parameters.

    A collective: it connects the ranks of the model's process group, unless an earlier ``attach`` or ``all_reduce`` of
    that group did. All ranks call it at the same point of the program, after wrapping the model and before training.
    A copy of the model made with ``copy.deepcopy`` or pickle has no hook, and warns of it: attach the copy, too.

    Args:
        ddp_model: a DistributedDataParallel that has no communication hook yet.
        state: a state to resume from, unpickled or of an earlier model with the same parameters. That model is gone or
            wraps the same module. The only option beside it is ``grad_scale``, which replaces the state's.
        **options: of :class:`CompressionState`.

    Returns:
        The state.

    Warns:
        UserWarning: after a step of the model's optimizer, once, if that divides by the root of a second moment, as
            Adam does, and the SigmaGrid is coarser than 0.5.

    Raises:
        TypeError, ValueError: naming the argument, or the parameter that cannot be handled; the model stays as it was.
        RuntimeError: the model has a communication hook already.
        CollectiveError: a rank could not be reached, or has another ``secret``.
        ConfigMismatchError: only some ranks pass a ``secret``, or they differ in ``connections``.

    Example:
        >>> import tempfile
        >>> import qcomm
        >>> store = f"file://{tempfile.mkdtemp()}/store"
        >>> dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        >>> model = DistributedDataParallel(torch.nn.Linear(64, 64))
        >>> state = attach(model, grid=qcomm.SigmaGrid(step=1.0), strategy="two_phase")
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> 0 < state.stats()["bits_per_element_phase2"] < 3
        True
        >>> dist.destroy_process_group()
    """
    if state is not None and set(options) - {"grad_scale"}:
        raise TypeError(f"state must not be combined with options but grad_scale, got {sorted(options)}")
    check_model(ddp_model)
    if state is None:
        state = CompressionState(**options)
    elif not isinstance(state, CompressionState):
        raise TypeError(f"state must be a qcomm.CompressionState, got {type(state).__name__}")
    elif "grad_scale" in options:
        check_grad_scale(options["grad_scale"])
    group = resolve_group(state.given_group or ddp_model.process_group)
    _check_same_ranks(group, ddp_model.process_group)
    if state.options.device_codec:
        trained = [parameter for parameter in ddp_model.module.parameters() if parameter.requires_grad]
        for device in {parameter.device for parameter in trained if is_on_device(parameter)}:
            check_device_options(state.options)
            check_group(group, device)
            core()
    if state.noise is not None:
        state.noise.check(ddp_model, get_world_size(group))
    state.bind(ddp_model.module, group)
    if get_world_size(group) > 1 or state.options.strategy != "auto":
        deals = state.options.compresses and all(parameter.is_cpu for parameter in ddp_model.module.parameters())
        get_communicator(group, state.options.connection_options, channels=CHANNELS if deals else 1)
    state.grad_scale = options.get("grad_scale", state.grad_scale)
    state.reducer.steps.finds_unused = ddp_model.find_unused_parameters and not ddp_model.static_graph
    state.reducer.steps.skips_buckets = getattr(ddp_model, "skip_all_reduce_unused_params", False)
    ddp_model.register_comm_hook(state, compression_hook)
    ddp_model._comm_hooks = AttachedHooks(ddp_model._comm_hooks)
    if state.noise is not None:
        state.noise.bind(ddp_model, get_world_size(group))
    watch_optimizers(ddp_model.module, state.options.grid, state.telemetry)
    return state


def _check_same_ranks(group: Group, model_group: dist.ProcessGroup) -> None:
    """Raises ValueError unless both groups have the same ranks in the same order."""
    if isinstance(group, MpiGroup):
        mine = f"rank {group.rank} of {group.size}"
        expected = f"rank {dist.get_rank(model_group)} of {dist.get_world_size(model_group)}"
        if mine != expected:
            raise ValueError(
                f"process_group must have the model's ranks: this is its {mine}, and the model's {expected}"
            )
        return
    members, wanted = dist.get_process_group_ranks(group), dist.get_process_group_ranks(model_group)
    if members != wanted:
        raise ValueError(f"process_group must have the model's ranks {wanted}, got ranks {members}")
