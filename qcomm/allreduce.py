"""``all_reduce``: the mean of a tensor over all ranks, with compressed traffic."""

from dataclasses import replace
from datetime import timedelta

import torch
from typing_extensions import Unpack

from qcomm.codec import Grid, SigmaGrid, check_floats, core, is_on_device
from qcomm.collectives import (
    BucketLayout,
    MeanTask,
    ReduceKeywords,
    ReduceOptions,
    Telemetry,
    TensorSpec,
    average,
    refuse,
    refuse_early,
)
from qcomm.collectives_cuda import DeviceChoice, DevicePart, check_device_options, check_group
from qcomm.communicator import (
    Communicator,
    Fields,
    Group,
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

__all__ = ["AllReduceWork", "all_reduce"]


class AllReduceWork:
    """Handle of an all-reduce under way, with the methods of ``torch.distributed.Work`` that make sense on a CPU."""

    def __init__(self, ticket: Ticket[torch.Tensor], telemetry: Telemetry) -> None:
        self._ticket = ticket
        self._telemetry = telemetry

    def wait(self, timeout: timedelta | float | None = None) -> bool:
        """Waits until the tensor holds the mean.

        Args:
            timeout: seconds or a timedelta; by default the exchange is limited by the process group's timeout alone.

        Returns:
            True.

        Raises:
            TimeoutError: not finished within ``timeout``; the all-reduce goes on.
            CollectiveError: it failed, here or on another rank.
            ConfigMismatchError: ranks called it with different shapes, grids or options.
        """
        self._ticket.wait(timeout)
        return True

    def is_completed(self) -> bool:
        """Returns True if the all-reduce has ended, well or not."""
        return self._ticket.is_completed()

    def is_success(self) -> bool:
        """Returns True if it has ended well."""
        return self._ticket.is_completed() and self._ticket.exception() is None

    def exception(self) -> Exception | None:
        """Returns the error of the all-reduce, if it failed."""
        return self._ticket.exception()

    def get_future(self) -> torch.futures.Future[torch.Tensor]:
        """Returns a Future of the tensor."""
        return self._ticket.future

    def stats(self) -> dict[str, object]:
        """Returns bytes, bits and seconds of this call, named as in ``CompressionState.stats``; final at its end."""
        return self._telemetry.stats()


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
            then under way, on channels of their own, unless ``strategy`` is ``"auto"`` or tensors are on a device. The
            second call of a group connects the other channels, for which it waits for all ranks.
        **options: ``mean_step``, ``min_elements``, ``strategy``, ``ranks_per_node``, ``link_rates``, ``num_threads``,
            ``profile``, ``verify``, ``secret``, ``connections`` and ``device_codec`` of
            :class:`qcomm.collectives.ReduceOptions`. A profile or a key file is read at each call. With
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
    world_size = get_world_size(group)
    telemetry = Telemetry()
    task, fault = attempt(Phase.PREPARE, _task, tensor, grid, group, telemetry, options)
    if task is None:
        # The caller gets the error itself, the other ranks a CollectiveError.
        if world_size > 1 and fault is not None:
            refuse_early(fault, group, options.get("secret"), options.get("connections"))
        raise RuntimeError("nothing was prepared") if fault is None else fault.error
    telemetry.count_bucket(task.layout, tensor.element_size())
    if world_size == 1 and task.options.strategy == "auto":
        work = AllReduceWork(completed(tensor), telemetry)
    elif task.options.device_codec and is_on_device(tensor):
        work = _on_device(group, task, tensor)
    else:
        work = AllReduceWork(_submit(group, task, tensor), telemetry)
    if async_op:
        return work
    with telemetry.timed("wait_seconds"):
        work.wait()
    return None


def _task(tensor: torch.Tensor, grid: Grid, group: Group, telemetry: Telemetry, keywords: ReduceKeywords) -> MeanTask:
    """Checks the arguments; returns the task that they make."""
    _check_tensor(tensor)
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
    buffer = tensor.detach()
    if tensor.is_cpu or on_device:
        in_place = tensor.is_contiguous() and not tensor.is_neg()
        buffer = (buffer if in_place else buffer.resolve_neg().contiguous()).reshape(-1)
    fields = {
        "operation": "all_reduce",
        **options.describe(),
        "shape": str(list(tensor.shape)),
        "dtype": str(tensor.dtype),
        "device of the codec": tensor.device.type if on_device else "cpu",
    }
    layout = BucketLayout(specs, world_size, shares=options.owner_shares)
    return MeanTask(buffer, layout, options, Fields(fields), telemetry)


def _on_device(group: Group, task: MeanTask, tensor: torch.Tensor) -> AllReduceWork:
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
            return AllReduceWork(failed(error), task.telemetry)
        _copy_back(task, tensor)
    return AllReduceWork(completed(tensor, device_future(tensor)), task.telemetry)


def _submit(group: Group, task: MeanTask, tensor: torch.Tensor) -> Ticket[torch.Tensor]:
    communicator = deal(group, task.options.connection_options)
    if not tensor.is_cpu:
        return _submit_staged(communicator, task, tensor)

    def job() -> torch.Tensor:
        average(task, communicator)
        _copy_back(task, tensor)
        return tensor

    return communicator.submit(job, alone=task.options.strategy == "auto")


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
    checked = check_floats("tensor", tensor, devices=device_types())
    check_device("tensor", checked.device)
    if checked.is_inference():
        raise ValueError(
            "tensor must not be an inference tensor, as another thread writes to it; clone it outside inference mode"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(checked.shape, checked.stride(), strict=True)):
        raise ValueError(
            "tensor must not be expanded: several of its elements share one place in memory; call .clone() first"
        )
