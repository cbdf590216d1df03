"""Units: what one ``fully_shard`` call manages, as names and places of its parameters in torch's flat buffers.

torch hands a custom collective one flat buffer without a word about its contents. For W ranks it has W rows. A row
holds, one after another, a rank's shard of each parameter that has a gradient, cut along the first dimension and padded
to the length of rank 0's. Which parameters have one is seen by hooks on them: at the time of the call their gradients
are in the buffer and nowhere else.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from qcomm.collectives import BucketLayout, ReduceOptions, ShardedTensor, TensorSpec, is_excluded, shard_layout
from qcomm.collectives import shard_lengths as lengths_of

__all__ = ["Unit", "find_units", "param_groups"]

IsCompressed = Callable[[str, int], bool]
MOST_LAYOUTS = 64  # of a unit that are kept


class ShardedParameter:
    """One parameter of a unit.

    Args:
        key: its name in the model.
        fsdp_param: torch's object for it.
        world_size: number of ranks that share it.

    Attributes:
        lengths: number of elements of each rank's shard; ``padded`` with padding.
    """

    def __init__(self, key: str, fsdp_param: Any, world_size: int) -> None:
        self.key, self._fsdp_param = key, fsdp_param
        shape = fsdp_param._orig_size
        self.lengths, self.padded = lengths_of(shape[0], math.prod(shape[1:]), world_size)

    @property
    def numel(self) -> int:
        """Returns the number of elements of the whole parameter."""
        return sum(self.lengths)

    @property
    def is_trained(self) -> bool:
        """Returns whether the parameter gets gradients; users may freeze it at any time."""
        return bool(self._fsdp_param.sharded_param.requires_grad)

    @property
    def whole(self) -> torch.Tensor | None:
        """Returns torch's unsharded parameter, which exists from the first forward on."""
        return getattr(self._fsdp_param, "_unsharded_param", None)

    def discard(self) -> None:
        """Drops the gradient that backward has made and that was not reduced."""
        if self.whole is not None:
            self.whole.grad = None
        self._fsdp_param.unsharded_accumulated_grad = None

    def sharded(self, compressed: bool) -> ShardedTensor:
        """Returns the parameter as a tensor of a layout."""
        return ShardedTensor(self.key, self.lengths, self.padded, compressed)


class Unit:
    """The parameters of one ``fully_shard`` call.

    Args:
        index: number of the unit in the model.
        modules: that it was called on.
        param_group: torch's object for it.
        names: of all modules of the model.

    Attributes:
        name: of its first module, for messages.
        parameters: in the order of torch's buffers.
        group: of the ranks that share the parameters.
    """

    def __init__(
        self,
        index: int,
        modules: Sequence[FSDPModule],
        param_group: Any,
        names: dict[torch.nn.Module, str],
    ) -> None:
        self.index, self.modules, self.param_group = index, tuple(modules), param_group
        self.name = names[param_group.modules[0]] or "the whole model"
        self.group: dist.ProcessGroup = param_group.mesh_info.shard_process_group
        self.world_size, self.rank = self.group.size(), self.group.rank()
        self.parameters = [
            ShardedParameter(_name(fsdp_param, names), fsdp_param, self.world_size)
            for fsdp_param in param_group.fsdp_params
        ]
        self._used: set[str] = set()
        self._watched: dict[str, torch.Tensor] = {}
        self._layouts: dict[tuple[object, ...], BucketLayout] = {}

    def watch(self, *_: object) -> None:
        """Watches parameters for gradients. It runs before every forward, when torch's parameters are whole."""
        for parameter in self.parameters:
            whole = parameter.whole
            if whole is not None and whole.requires_grad and self._watched.get(parameter.key) is not whole:
                self._watched[parameter.key] = whole
                whole.register_post_accumulate_grad_hook(partial(self._note, parameter.key))

    def _note(self, key: str, _: torch.Tensor) -> None:
        self._used.add(key)

    def take_used(self, row_elements: int) -> list[ShardedParameter]:
        """Returns the parameters whose gradients are in a buffer with rows of ``row_elements`` elements.

        Raises:
            RuntimeError: it cannot be told, because gradients came by a way that no hook sees.
        """
        used, self._used = self._used, set()
        seen = [parameter for parameter in self.parameters if parameter.key in used]
        # torch adds zeros for unused ones with set_reduce_scatter_unused_params. A forward that is no call of the
        # module, as with register_fsdp_forward_method, is not watched.
        trained = [parameter for parameter in self.parameters if parameter.is_trained]
        for candidates in (seen, trained):
            if sum(parameter.padded for parameter in candidates) == row_elements:
                return candidates
        raise RuntimeError(
            f"the gradients of unit {self.name!r} have {row_elements} elements a rank, and the parameters that got one "
            f"({', '.join(parameter.key for parameter in seen) or 'none'}) have {sum(p.padded for p in seen)}: call "
            "the module itself in forward, or use all of its parameters in every step"
        )

    def forget_used(self) -> None:
        """Forgets which parameters have a gradient, which is not exchanged."""
        self._used.clear()

    def discard(self) -> None:
        """Drops what a failed backward has left, which torch would add to the gradients of the next one."""
        self.forget_used()
        for parameter in self.parameters:
            parameter.discard()

    def rows(self, parameters: Sequence[ShardedParameter], is_compressed: IsCompressed) -> BucketLayout:
        """Returns the layout of a buffer of one row for each rank."""
        key = ("rows", *(parameter.key for parameter in parameters))
        if key not in self._layouts:
            self._make_room()
            tensors = [parameter.sharded(is_compressed(parameter.key, parameter.numel)) for parameter in parameters]
            self._layouts[key] = shard_layout(tensors, self.world_size)
        return self._layouts[key]

    def own_row(
        self, parameters: Sequence[ShardedParameter], options: ReduceOptions, exclude: Sequence[str], replicas: int
    ) -> BucketLayout:
        """Returns the layout of this rank's row, which ``replicas`` ranks average."""
        key = ("own row", *(parameter.key for parameter in parameters))
        if key not in self._layouts:
            self._make_room()
            specs, offset = [], 0
            for parameter in parameters:
                numel, may_round = parameter.lengths[self.rank], not is_excluded(parameter.key, exclude)
                if numel:
                    compressed = may_round and options.is_compressed(numel)
                    specs.append(TensorSpec(parameter.key, offset, numel, compressed, may_round))
                offset += parameter.padded
            self._layouts[key] = BucketLayout(specs, replicas, shares=options.owner_shares)
        return self._layouts[key]

    def _make_room(self) -> None:
        # A model of experts may use other parameters in every step.
        if len(self._layouts) >= MOST_LAYOUTS:
            self._layouts.clear()


def param_groups(module: FSDPModule) -> list[Any]:
    """Returns torch's parameter groups of a module: mostly one, none without parameters."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # older versions of torch have at most one
    if groups is None:
        groups = [] if state._fsdp_param_group is None else [state._fsdp_param_group]
    return list(groups)


def find_units(model: torch.nn.Module) -> list[Unit]:
    """Returns the units of a model in the order of its modules.

    Raises:
        ValueError: a unit has modules outside of the model.
    """
    names: dict[torch.nn.Module, str] = {module: name for name, module in model.named_modules()}
    modules_of: dict[int, list[FSDPModule]] = {}
    groups: dict[int, Any] = {}
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in param_groups(module):
            if not all(part in names for part in group.modules):
                raise ValueError(
                    f"model must hold all modules of a fully_shard call, and that on {names[module]!r} has others, "
                    "too: pass the whole model"
                )
            groups[id(group)] = group
            modules_of.setdefault(id(group), []).append(module)
    return [Unit(index, modules_of[key], group, names) for index, (key, group) in enumerate(groups.items())]


def _name(fsdp_param: Any, names: dict[torch.nn.Module, str]) -> str:
    info = fsdp_param._module_info
    prefix = names[info.module]
    return f"{prefix}.{info.param_name}" if prefix else str(info.param_name)
