"""``attach``: makes a model that ``fully_shard`` has sharded exchange compressed gradients and weights."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from typing_extensions import Unpack

from qcomm.codec import Grid, RangeGrid, SigmaGrid
from qcomm.collectives import GradScale, ReduceKeywords, check_hook_options, watch_optimizers
from qcomm.communicator import connect, get_world_size, resolve_group
from qcomm.fsdp.checks import check_replicas, check_setters, check_weights, checked_options, checked_units
from qcomm.fsdp.exchanges import Exchanges
from qcomm.fsdp.state import ShardedState
from qcomm.fsdp.torch_comms import GradientScatter, ReplicaMean, WeightGather
from qcomm.fsdp.units import Unit

__all__ = ["attach"]


def attach(
    model: torch.nn.Module,
    *,
    gradients: Grid | None = SigmaGrid(step=1.0),
    weights: RangeGrid | None = None,
    replicas: dist.ProcessGroup | None = None,
    error_feedback: bool = True,
    exclude: Sequence[str] = (),
    grad_scale: GradScale = None,
    **options: Unpack[ReduceKeywords],
) -> ShardedState:
    """Makes a model that ``torch.distributed.fsdp.fully_shard`` has sharded exchange compressed gradients.

    A collective: it connects the ranks. All ranks call it at the same point of the program, after the last
    ``fully_shard`` and before the first forward, with the same arguments except ``num_threads`` and the path of
    ``secret``. docs/fsdp.md has memory, limits and errors.

    Args:
        model: with ``fully_shard`` called on it or on modules in it, on a mesh of one dimension, on the CPU.
        gradients: grid of the gradients, ``SigmaGrid`` or ``RangeGrid``. None leaves them to torch.
        weights: grid of the weights that forward and backward use. Each rank keeps its own shards exact and the
            optimizer updates these, so no error accumulates. By default torch gathers them uncompressed.
        replicas: for hybrid sharding: the ranks that have the same shards as this one. Gradients are then compressed
            across these alone, and torch's own reduce-scatter serves the ranks that share the model.
        error_feedback: keep the quantization error and add it to the next gradient: 4 bytes for each element of the
            whole, unsharded model on every rank; with ``replicas`` for each element of this rank's shards.
        exclude: patterns (``fnmatch``) of the names of parameters that travel uncompressed.
        grad_scale: the factor of the loss, with AMP, see :class:`qcomm.CompressionState`.
        **options: ``min_elements``, ``num_threads``, ``secret`` and ``connections`` of
            :class:`qcomm.collectives.ReduceOptions`, and with ``replicas`` all others but ``device_codec``.

    Returns:
        The state, with counters and residuals.

    Warns:
        UserWarning: after a step of the model's optimizer, once, if that divides by the root of a second moment, as
            Adam does, and the SigmaGrid is coarser than 0.5.

    Raises:
        TypeError, ValueError: naming the argument, or what cannot be handled; the model stays as it was.
        RuntimeError: this torch lacks a setter, or the model has custom collectives already.
        CollectiveError: a rank could not be reached, or has another ``secret``.
        ConfigMismatchError: only some ranks pass a ``secret``.

    Example:
        >>> import tempfile
        >>> from torch.distributed.fsdp import fully_shard
        >>> store = f"file://{tempfile.mkdtemp()}/store"
        >>> dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        >>> model = fully_shard(torch.nn.Linear(64, 64), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        >>> state = attach(model, gradients=SigmaGrid(step=1.0))
        >>> model(torch.randn(8, 64)).square().mean().backward()
        >>> state.stats()["bytes_sent"]  # to nobody: this rank is alone
        0
        >>> dist.destroy_process_group()
    """
    units = checked_units(model)
    check_setters(gradients is not None, weights is not None, replicas is not None)
    check_hook_options(error_feedback, exclude, grad_scale)
    gradient_options, weight_options = checked_options(gradients, weights, replicas, error_feedback, options)
    if weight_options is not None:
        for unit in units:
            check_weights(unit)
    shard_group = resolve_group(units[0].group)
    replica_group = None
    if replicas is not None:
        replica_group = resolve_group(replicas)
        check_replicas(replicas, units[0].group)
        if gradient_options is not None:
            gradient_options.for_world(get_world_size(replica_group))  # checks ranks_per_node
    exchanges = Exchanges(gradient_options, weight_options, error_feedback, exclude, grad_scale)
    connection_options = next(o.connection_options for o in (gradient_options, weight_options) if o is not None)
    shards = connect(shard_group, True, connection_options)
    across = None if replica_group is None else connect(replica_group, True, connection_options)
    exchanges.connect(units, shards, across)
    for unit in units:
        _install(unit, exchanges, gradients is not None, weights is not None, replicas is not None)
    if gradients is not None:
        watch_optimizers(model, gradients, exchanges.gradient_telemetry, "gradients=None")
    if replicas is None:
        return ShardedState(exchanges, {p.key: p.numel for unit in units for p in unit.parameters})
    own = {p.key: p.lengths[unit.rank] for unit in units for p in unit.parameters}
    return ShardedState(exchanges, own, f"shard {units[0].rank} of {units[0].world_size}")


def _install(unit: Unit, exchanges: Exchanges, gradients: bool, weights: bool, replicas: bool) -> None:
    if gradients:
        # torch's own hooks, which make parameters whole, run before: they are registered already.
        watch = torch.compiler.disable(unit.watch)
        for module in unit.modules:
            cast(torch.nn.Module, module).register_forward_pre_hook(watch)
        if replicas:
            unit.modules[0].set_all_reduce_hook(ReplicaMean(unit, exchanges))
        else:
            unit.modules[0].set_custom_reduce_scatter(cast(Any, GradientScatter(unit, exchanges)))
    if weights:
        unit.modules[0].set_custom_all_gather(cast(Any, WeightGather(unit, exchanges)))
