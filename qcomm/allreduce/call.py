"""``all_reduce``: the mean of a tensor over all ranks, with compressed traffic."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from typing_extensions import Unpack

from qcomm.allreduce.lanes import Lane, Lanes, lanes_of
from qcomm.allreduce.work import AllReduceWork, Outcome
from qcomm.codec import Grid, SigmaGrid, check_floats, core, is_on_device
from qcomm.collectives import (
    BYPASSED,
    UNCOMPRESSED,
    BucketLayout,
    MeanTask,
    ReduceKeywords,
    ReduceOptions,
    Telemetry,
    TensorSpec,
    average,
    count_rings,
    refuse,
    refuse_early,
    settled,
)
from qcomm.collectives_cuda import DeviceChoice, DevicePart, check_device_options, check_group
from qcomm.communicator import (
    Communicator,
    Fields,
    Group,
    LateFaultError,
    Phase,
    Ticket,
    attempt,
    check_connections,
    completed,
    deal,
    device_future,
    failed,
    get_world_size,
    resolve_group,
)
from qcomm.errors import CollectiveError, ConfigMismatchError
from qcomm.staging import check_device, device_types, stage
from qcomm.transport import can_bypass

__all__ = ["all_reduce"]

MOST_KINDS = 1024
READ_ANEW = frozenset(["profile", "secret"])


@dataclass(frozen=True)
class Kind:
    """Calls with equal options, on tensors of one shape and dtype.

    Attributes:
        options: for the world of the group.
        layout: of the flat tensor.
        fields: that ranks compare.
        lane: of its calls without an agreement; None where each call has one.
    """

    options: ReduceOptions
    layout: BucketLayout
    fields: Fields
    lane: Lane | None
    _named: "dict[str, Kind]" = field(default_factory=dict)

    def named(self, strategy: str) -> "Kind":
        """Returns the kind with the strategy that the ranks have settled on."""
        if strategy not in self._named:
            options = replace(self.options, strategy=strategy, profile=None)
            fields = self.fields.extended("strategy chosen", strategy)
            self._named[strategy] = Kind(options, self.layout, fields, None)
        return self._named[strategy]


def all_reduce(
    tensor: torch.Tensor,
    grid: Grid = SigmaGrid(step=1.0),
    group: Group | None = None,
    async_op: bool = False,
    **options: Unpack[ReduceKeywords],
) -> AllReduceWork | None:
    """Replaces a tensor by its mean over all ranks, exchanging compressed values. All ranks end with the same bits.

    A collective: every rank of the group calls it, in the same order, with tensors of one shape and dtype and with the
    same options except ``num_threads`` and the path of ``secret``. The first call of a group connects its ranks, which
    is a collective too. In a world of one rank the tensor is its own mean and is not modified, unless a strategy is
    named. There is no error feedback: quantization errors are lost.

    Args:
        tensor: any shape and strides, float32, float16, bfloat16 or float64, on the CPU or an accelerator. On an
            accelerator it is computed by the current stream, travels through host memory, and the current stream of
            whoever waits is made to wait for the mean. A parameter may be passed; autograd does not see the change. A
            non-finite value makes the whole result NaN on every rank (uncompressed: only its own element).
        grid: of the quantization. Each rank's values are scaled to its own RMS or range. The mean is quantized once
            more, see ``mean_step``.
        group: by default the default process group. Its backend does not matter: the traffic has its own gloo
            connections, with the group's timeout. A :class:`qcomm.MpiGroup` sends it over MPI. ``device_codec`` needs
            NCCL.
        async_op: return at once; the tensor must not be used until ``wait()`` of the handle has returned. Several are
            then under way, on channels of their own, unless tensors are on a device or ``"auto"`` tries strategies.
            With ``"auto"`` a call waits for an agreement on its kind of tensor that is still under way.
        **options: ``mean_step``, ``min_elements``, ``strategy``, ``ranks_per_node``, ``link_rates``, ``num_threads``,
            ``profile``, ``verify``, ``secret``, ``connections`` and ``device_codec`` of
            :class:`qcomm.collectives.ReduceOptions`. Where ``"auto"`` has settled on no compression, 30 of 31 calls are
            the group's own all-reduce: an argument that differs between ranks then has the consequences that it has in
            torch. ``verify="step"`` or a named strategy avoids that. A profile or a key file is read at each call. With
            ``device_codec`` a call with CUDA tensors waits for the device, ``async_op`` leaves nothing to wait for, and
            ``"auto"`` is ``"two_phase"``.

    Returns:
        None, or with ``async_op`` a handle.

    Raises:
        TypeError, ValueError: naming the argument. The other ranks get a CollectiveError.
        OSError: the profile or the key file cannot be read. The other ranks get a CollectiveError.
        CollectiveError: a rank failed, or does not answer within the group's timeout.
        ConfigMismatchError: arguments differ between ranks.

    Example:
        >>> import tempfile
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
        >>> tensor = torch.linspace(-1, 1, 10_000)
        >>> all_reduce(tensor, SigmaGrid(step=1.0), strategy="two_phase")
        >>> bool((tensor - torch.linspace(-1, 1, 10_000)).abs().max() < 0.6)
        True
        >>> dist.destroy_process_group()
    """
    group = resolve_group(group)
    lanes = lanes_of(group)
    prepared, fault = attempt(Phase.PREPARE, _prepare, tensor, grid, group, lanes, options)
    if prepared is None:
        # The caller gets the error itself, the other ranks a CollectiveError.
        if fault is not None and get_world_size(group) > 1:
            lanes.give_up(group)
            refuse_early(fault, group, options.get("secret"), options.get("connections"))
        raise RuntimeError("nothing was prepared") if fault is None else fault.error
    kind, buffer = prepared
    if not async_op:  # and then nobody sees its counters
        _start(group, kind, tensor, buffer, None).wait()
        return None
    telemetry = Telemetry()
    outcome = _start(group, kind, tensor, buffer, telemetry)
    telemetry.count_bucket(kind.layout, tensor.element_size())
    return AllReduceWork(outcome, telemetry)


def _start(
    group: Group, kind: Kind, tensor: torch.Tensor, buffer: torch.Tensor, telemetry: Telemetry | None
) -> Outcome:
    """Begins the mean of a tensor with the values of ``buffer``."""
    options, lane = kind.options, kind.lane
    if options.strategy == "auto" and kind.layout.world_size == 1:
        return completed(tensor)
    strategy = "" if lane is None else lane.enter()
    if lane is not None and strategy in UNCOMPRESSED and isinstance(group, dist.ProcessGroup):
        if telemetry is not None:
            telemetry.note_strategy(0, strategy)
            count_rings(telemetry, strategy, kind.layout, buffer.dtype)
        return lanes_of(group).sum(lane, group, tensor, buffer, kind.layout, options.verify != "off")
    telemetry = telemetry or Telemetry()
    task = MeanTask(buffer, kind.layout, options, kind.fields, telemetry)
    if options.device_codec and is_on_device(tensor):
        return _on_device(group, task, tensor)
    if strategy:
        named = kind.named(strategy)
        task, lane = MeanTask(buffer, kind.layout, named.options, named.fields, telemetry), None
    return _submit(group, task, tensor, lane)


def _prepare(
    tensor: torch.Tensor, grid: Grid, group: Group, lanes: Lanes, keywords: ReduceKeywords
) -> tuple[Kind, torch.Tensor]:
    """Checks the arguments; returns the kind of the call and the flat values of the tensor."""
    _check_tensor(tensor)
    key = _key(tensor, grid, keywords)
    kind = lanes.kinds.get(key)
    if kind is None:
        kind = _kind(tensor, grid, group, lanes, keywords)
        if key is not None:
            if len(lanes.kinds) == MOST_KINDS:  # the caller averages tensors of ever new sizes
                lanes.kinds.clear()
            lanes.kinds[key] = kind
    buffer = tensor.detach()
    if tensor.is_cpu or (kind.options.device_codec and is_on_device(tensor)):
        in_place = tensor.is_contiguous() and not tensor.is_neg()
        buffer = (buffer if in_place else buffer.resolve_neg().contiguous()).reshape(-1)
    return kind, buffer


def _key(tensor: torch.Tensor, grid: Grid, keywords: ReduceKeywords) -> Hashable | None:
    """Returns a key that equal calls share; None where a file or the environment counts, too."""
    if not READ_ANEW.isdisjoint(keywords) or keywords.get("strategy") == "hierarchical":
        return None
    # Types count: True is not allowed where 1 is.
    named = tuple((name, type(value), value) for name, value in keywords.items())
    key = (tensor.shape, tensor.dtype, tensor.device.type, type(grid), grid, named)
    try:
        hash(key)
    except TypeError:  # a list of rates, or an argument that is no good
        return None
    return key


def _kind(tensor: torch.Tensor, grid: Grid, group: Group, lanes: Lanes, keywords: ReduceKeywords) -> Kind:
    options = ReduceOptions(grid, **keywords)
    check_connections(group, options.connection_options)
    on_device = options.device_codec and is_on_device(tensor)
    if on_device:
        check_device_options(options)
        check_group(group, tensor.device)
        core()
    world_size = get_world_size(group)
    options = options.for_world(world_size)
    specs = [TensorSpec("tensor", 0, tensor.numel(), options.is_compressed(tensor.numel()))]
    values = {
        "operation": "all_reduce",
        **options.describe(),
        "shape": str(list(tensor.shape)),
        "dtype": str(tensor.dtype),
        "device of the codec": tensor.device.type if on_device else "cpu",
    }
    layout, lane = BucketLayout(specs, world_size, shares=options.owner_shares), None
    if options.strategy == "auto" and world_size > 1:
        # The program's own all-reduce is not sealed.
        plain = options.verify != "step" and options.secret is None and options.machine is None
        if plain and tensor.is_cpu and can_bypass(group):
            lane = lanes.find(Fields(values).fingerprint)
        values["calls between agreements"] = str(0 if lane is None else BYPASSED)
    return Kind(options, layout, Fields(values), lane)


def _on_device(group: Group, task: MeanTask, tensor: torch.Tensor) -> Outcome:
    """Averages on the tensor's current stream. The host waits for packet sizes, so nothing is left to wait for."""
    if task.options.strategy == "auto":  # finding the fastest takes many collectives of one object
        task = replace(task, options=replace(task.options, strategy="two_phase", profile=None))
    choice = DeviceChoice(group, deal(group, task.options.connection_options), task.telemetry, tensor.device)
    with torch.no_grad(), torch.cuda.device_of(tensor):
        try:
            fault = choice.average(DevicePart.of(task))
            if fault is not None:
                raise fault.error
            choice.flush()
        except (CollectiveError, ConfigMismatchError) as error:
            return failed(error)
        _copy_back(task, tensor)
    return completed(tensor, device_future(tensor))


def _submit(group: Group, task: MeanTask, tensor: torch.Tensor, lane: Lane | None) -> Ticket[torch.Tensor]:
    """Queues a call for a worker; with a lane the ranks may settle on a strategy for the calls after it."""
    communicator = deal(group, task.options.connection_options)
    if not tensor.is_cpu:
        return _submit_staged(communicator, task, tensor)
    bypassing = None if lane is None else lane.agree()

    def settle() -> None:
        if lane is not None:
            lane.strategy = settled(task, communicator, bypassing).strategy

    def job() -> torch.Tensor:
        try:
            average(task, communicator, bypassing)
        except LateFaultError:  # the others went on
            settle()
            raise
        settle()
        _copy_back(task, tensor)
        return tensor

    ticket = communicator.submit(job, alone=task.options.strategy == "auto")
    if lane is not None:
        lane.ticket = ticket
    return ticket


def _submit_staged(communicator: Communicator, task: MeanTask, tensor: torch.Tensor) -> Ticket[torch.Tensor]:
    # Buffers in host memory are few, and one worker at a time takes them.
    staged, fault = attempt(Phase.PREPARE, stage, tensor, communicator.first)

    def job() -> torch.Tensor:
        if staged is None:
            refuse(fault, communicator)
        average(replace(task, staged=staged), communicator)
        return tensor

    return communicator.submit(job, device=tensor.device, alone=True)


def _copy_back(task: MeanTask, tensor: torch.Tensor) -> None:
    """Writes the mean into a tensor that is not the task's buffer itself."""
    if task.buffer.data_ptr() != tensor.data_ptr():
        tensor.detach().copy_(task.buffer.view(tensor.shape))


def _check_tensor(tensor: object) -> None:
    is_on_cpu = isinstance(tensor, torch.Tensor) and tensor.is_cpu
    checked = check_floats("tensor", tensor, devices=("cpu",) if is_on_cpu else device_types())
    if not is_on_cpu:
        check_device("tensor", checked.device)
    if checked.is_inference():
        raise ValueError(
            "tensor must not be an inference tensor, as another thread writes to it; clone it outside inference mode"
        )
    strides = () if checked.is_contiguous() else zip(checked.shape, checked.stride(), strict=True)
    if any(stride == 0 and size > 1 for size, stride in strides):
        raise ValueError(
            "tensor must not be expanded: several of its elements share one place in memory; call .clone() first"
        )
