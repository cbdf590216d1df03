"""The contents of DDP's buckets: the parameters by name, and the chunks of a bucket."""

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from qcomm.codec import DTYPE_NUMBERS, check_memory, is_on_device
from qcomm.collectives import BucketLayout, ReduceOptions, TensorSpec, is_excluded
from qcomm.communicator import Fields
from qcomm.ddp.warm_up import WarmUp
from qcomm.staging import check_device

__all__ = ["BucketTable", "KnownBucket"]


class KnownBucket(NamedTuple):
    """A bucket that has been looked up.

    Attributes:
        layout: of its buffer.
        options: of the mean, for the present number of ranks.
        fields: the configuration, which has to be equal on all ranks.
        on_device: whether the codec runs on the buffer's device.
    """

    layout: BucketLayout
    options: ReduceOptions
    fields: Fields
    on_device: bool


class BucketTable:
    """Finds the layout of a bucket, and the configuration on which all ranks have to agree.

    DDP rearranges its buckets, so everything is kept by parameter, under its name in the model. Without names the key
    is the number in which DDP shows the parameter first. That order is the same on all ranks, and in every run of a
    program.

    Args:
        options: of the mean, for any number of ranks.
        described: further options of the state, as text, for the comparison between ranks.
        exclude: patterns of the names of parameters that are not compressed.
        warm_up: the initial steps.
        error_feedback: whether residuals are kept; small tensors are compressed only then.

    Attributes:
        sizes: number of elements of the model's parameters; None without a model.
        has_names, residuals_have_names: whether parameters and residuals are known by their names in the model.
        saved_order: names of the parameters of each bucket in a checkpoint, until a step has begun with them.
    """

    def __init__(
        self,
        options: ReduceOptions,
        described: Mapping[str, str],
        exclude: Sequence[str],
        warm_up: WarmUp,
        error_feedback: bool,
    ) -> None:
        self._options = options
        self._warm_up = warm_up
        self._error_feedback = error_feedback
        self._described = dict(described)
        self._exclude = tuple(exclude)
        self._names: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}  # by id, while the parameter lives
        self._layouts: dict[tuple[Any, ...], KnownBucket] = {}
        self._origin = "nothing"
        self._order: dict[int, list[str]] = {}
        self.saved_order: Sequence[Sequence[str]] | None = None
        self.sizes: dict[str, int] | None = None
        self.has_names = False
        self.residuals_have_names = False

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without the identities of this process's parameters."""
        state = self.__dict__.copy()
        state.update(_names={}, _layouts={}, _order={}, has_names=False, sizes=None)
        state["saved_order"] = self.order or self.saved_order
        state["residuals_have_names"] = self.has_names or self.residuals_have_names
        return state

    def reconfigure(self, options: ReduceOptions) -> None:
        """Replaces the options of the mean."""
        self._options = options
        self._layouts.clear()

    def set_origin(self, origin: str) -> None:
        """Replaces the description of the state from which this rank goes on, which all ranks compare."""
        self._origin = origin
        # Layouts stay the same objects, by which a device knows its buckets.
        self._layouts = {
            signature: known._replace(fields=known.fields.extended("loaded state", origin))
            for signature, known in self._layouts.items()
        }

    def bind(self, model: torch.nn.Module) -> None:
        """Learns the names of a model's parameters.

        Raises:
            ValueError: another model uses this table.
        """
        bound = {id(parameter) for parameter in model.parameters()}
        alive = [(key, name) for key, (reference, name) in self._names.items() if reference() is not None]
        strangers = [name for key, name in alive if key not in bound]
        if strangers:
            raise ValueError(
                f"state serves another model, which is still there (its {strangers[0]!r} is not in ddp_model): make "
                "one state for each model, or hand residuals over with state_dict and load_state_dict"
            )
        self._names = {id(parameter): (weakref.ref(parameter), name) for name, parameter in model.named_parameters()}
        self._layouts.clear()
        self.sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self.has_names = True

    def look_up(self, bucket: dist.GradBucket, world_size: int, stage: int | None) -> KnownBucket:
        """Returns layout and configuration of a bucket in a stage of warm-up; checks that it can be compressed.

        Raises:
            TypeError, ValueError: gradients that are complex, sparse, of another dtype or device; names are needed
                and unknown.
            RuntimeError: DDP pairs parameters with the wrong gradients.
        """
        buffer, parameters = bucket.buffer(), bucket.parameters()
        _check_buffer(buffer, parameters)
        shapes = [parameter.shape for parameter in parameters]
        gradient_shapes = [gradient.shape for gradient in bucket.gradients()]
        if shapes != gradient_shapes or sum(map(math.prod, shapes)) != buffer.numel():
            # DDP keeps a bucket's parameters and mixes them up when it rebuilds its buckets a second time. Residuals
            # must not go to the wrong ones.
            raise RuntimeError(
                f"DDP's parameters of bucket {bucket.index()} do not fit its gradients; make a new DDP model"
            )
        keys = [self.name_of(parameter) for parameter in parameters]
        self._note_order(bucket.index(), keys)
        signature = (bucket.index(), world_size, buffer.dtype, buffer.device, stage, *keys, *shapes)
        if signature not in self._layouts:
            specs, offset, is_exact = [], 0, self._warm_up.is_exact(stage)
            options = self._warm_up.options(self._options, stage).for_world(world_size)
            for key, shape in zip(keys, shapes, strict=True):
                numel = math.prod(shape)
                may_round = not is_exact and not is_excluded(key, self._exclude)
                compressed = may_round and options.is_compressed(numel)
                specs.append(TensorSpec(key, offset, numel, compressed, may_round))
                offset += numel
            if self._error_feedback:
                specs = options.merge_small(specs)
            layout = BucketLayout(specs, world_size, shares=options.owner_shares)
            on_device = options.device_codec and is_on_device(buffer)
            fields = {
                "operation": "gradient bucket",
                **options.describe(),
                **self._described,
                "bucket": str(bucket.index()),
                "dtype": str(buffer.dtype),
                "device of the codec": buffer.device.type if on_device else "cpu",
                "loaded state": self._origin,
                "stage of warm-up": str(stage),
                "layout": layout.description,
            }
            self._layouts[signature] = KnownBucket(layout, options, Fields(fields), on_device)
        return self._layouts[signature]

    @property
    def order(self) -> list[list[str]]:
        """Returns the names of the parameters of each bucket, as it was looked up last."""
        return [list(keys) for _, keys in sorted(self._order.items())]

    def _note_order(self, index: int, keys: list[str]) -> None:
        if self._order.get(index) != keys:
            # DDP has rebuilt its buckets, so those that had these parameters are gone.
            self._order = {number: known for number, known in self._order.items() if not {*known}.intersection(keys)}
            self._order[index] = keys

    def name_of(self, parameter: torch.Tensor) -> str:
        """Returns the name of a parameter; an unknown one gets the next number, unless names are needed."""
        known = self._names.get(id(parameter))
        if known is not None and known[0]() is parameter:
            return known[1]
        if self._exclude:
            raise ValueError("exclude needs the parameters' names: use qcomm.attach instead of register_comm_hook")
        if self.residuals_have_names:
            raise ValueError(
                "the loaded residuals belong to named parameters: use qcomm.attach(ddp_model, state=state) "
                "instead of register_comm_hook"
            )
        name = f"parameter {len(self._names)}"
        self._names[id(parameter)] = weakref.ref(parameter), name
        return name


def _check_buffer(buffer: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
    if buffer.layout != torch.strided:
        raise TypeError(
            "sparse gradients are not supported: make the embedding with sparse=False, or leave it to DDP's all-reduce"
        )
    if any(parameter.is_complex() for parameter in parameters):
        raise TypeError(
            "complex parameters are not supported, because DDP places their gradients wrongly; use torch.view_as_real"
        )
    if buffer.dtype not in DTYPE_NUMBERS:
        raise TypeError(f"gradients must be float32, float16, bfloat16 or float64, got {buffer.dtype}")
    if not buffer.is_cpu:
        check_device("gradients", buffer.device)
    check_memory("the bucket's buffer", buffer)
