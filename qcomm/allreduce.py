"""``all_reduce``: the mean of a tensor over all ranks, with compressed traffic."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from qcomm.codec import Grid, SigmaGrid, check_floats, core, is_on_device
from qcomm.collectives import (
    BucketLayout,
    MeanTask,
    Profile,
    Telemetry,
    TensorSpec,
    average,
    check_exchange,
    describe,
    resolve_profile,
    resolve_ranks_per_node,
)
from qcomm.collectives_cuda import DeviceChoice, check_device_strategy, check_group
from qcomm.communicator import (
    Fault,
    Fields,
    Group,
    Phase,
    Ticket,
    completed,
    device_future,
    failed,
    get_communicator,
    get_world_size,
    resolve_group,
)
from qcomm.errors import CollectiveError, ConfigMismatchError

__all__ = ["AllReduceWork", "all_reduce"]


class AllReduceWork:
    """Handle of an all-reduce under way, with those methods of ``torch.distributed.Work`` that make sense on a CPU."""

    def __init__(self, ticket: Ticket[torch.Tensor], telemetry: Telemetry) -> None:
        self._ticket = ticket
        self._telemetry = telemetry

    def wait(self, timeout: timedelta | float | None = None) -> bool:
        """Waits until the tensor holds the mean.

        Args:
            timeout: seconds or a timedelta; by default as long as the process group's timeout lets the exchange take.

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
        """Whether the all-reduce has ended, well or not."""
        return self._ticket.is_completed()

    def is_success(self) -> bool:
        """Whether it has ended well."""
        return self._ticket.is_completed() and self._ticket.exception() is None

    def exception(self) -> Exception | None:
        """What it failed with, if it failed."""
        return self._ticket.exception()

    def get_future(self) -> torch.futures.Future[torch.Tensor]:
        """A Future of the tensor."""
        return self._ticket.future

    def stats(self) -> dict[str, object]:
        """Bytes, bits and seconds of this call, named as in ``CompressionState.stats``; complete when it has ended."""
        return self._telemetry.stats()


def all_reduce(
    tensor: torch.Tensor,
    grid: Grid = SigmaGrid(step=1.0),
    group: Group | None = None,
    async_op: bool = False,
    min_elements: int = 1024,
    strategy: str = "auto",
    ranks_per_node: int | None = None,
    num_threads: int = 1,
    profile: Profile | Path | str | None = None,
) -> AllReduceWork | None:
    """Replaces a tensor by its mean over all ranks, exchanging compressed values. All ranks end with the same bits.

    A collective: every rank of the group calls it, in the same order, with tensors of one shape and dtype and with the
    same options, ``num_threads`` excepted. The first call of a group connects its ranks, which is a collective too. In
    a world of one rank the tensor is its own mean and is left as it is, unless a strategy is named. There is no error
    feedback: what quantization loses is lost.

    Args:
        tensor: any shape and strides, on the CPU or a CUDA device (where this waits for the device, and ``async_op``
            leaves nothing to wait for), float32, float16, bfloat16 or float64. A parameter may be passed;
            autograd does not see the change. A non-finite value makes the whole result NaN on every rank (uncompressed:
            only its own element).
        grid: how finely values are quantized: each rank's to its own RMS or range, then the mean once more, with
            ``step`` at most 1.
        group: by default the default process group. Its backend does not matter for tensors on the CPU: the traffic has
            gloo connections of its own, with the group's timeout. A :class:`qcomm.MpiGroup` has it travel over MPI.
            CUDA tensors need NCCL.
        async_op: return at once; the tensor must be left alone until ``wait()`` of the handle has returned.
        min_elements: smaller tensors travel as they are.
        strategy: ``"two_phase"`` compresses, also the mean; ``"all_gather"`` compresses values alone, for few ranks or
            small tensors; ``"exact_sum"`` rounds them to one grid of all ranks and loses nothing more; ``"none"`` is a
            plain all-reduce and ``"bf16"`` one of float32 values rounded to bfloat16; ``"hierarchical"`` adds
            uncompressed values inside a node and compresses between nodes; ``"auto"`` tries what may be fast on the
            first calls for tensors of this size and keeps the fastest, one that compresses only if it is a quarter
            faster than those that do not, looking again from time to time. CUDA tensors have ``"two_phase"``, which
            ``"auto"`` is there, ``"none"`` and ``"bf16"``.
        ranks_per_node: for ``"hierarchical"``: ranks 0 to ``ranks_per_node - 1`` of the group are one node, and so on;
            any divisor of the number of ranks. By default the environment variable LOCAL_WORLD_SIZE, which launchers
            set.
        num_threads: most that encode and decode at once on this rank; other ranks may pass another number.
        profile: for ``"auto"``: the machine as ``qcomm bench --save-profile`` measured it, or that file, which is read
            at each call. Only what may be fast there is tried, and the uncompressed ways. Equal on all ranks.

    Returns:
        None, or with ``async_op`` a handle.

    Raises:
        TypeError, ValueError: naming the argument. The other ranks get a CollectiveError.
        OSError: the profile cannot be read. Likewise.
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
    fault, node_size, machine = None, 1, None
    try:
        _check_tensor(tensor)
        check_exchange(grid, min_elements, strategy, ranks_per_node, num_threads)
        if is_on_device(tensor):
            check_device_strategy(strategy)
            check_group(group, tensor.device)
            core()
        node_size = resolve_ranks_per_node(ranks_per_node, world_size, strategy)
        machine = resolve_profile(profile, strategy)
    except (TypeError, ValueError, OSError, RuntimeError) as error:
        if world_size == 1:
            raise
        fault = Fault(Phase.PREPARE, error)
    telemetry = Telemetry()
    if fault is not None:
        # The caller gets the error itself, the other ranks hear of it.
        _submit(group, MeanTask(torch.empty(0), None, grid, Fields({}), telemetry, fault=fault), None)
        raise fault.error
    layout = BucketLayout([TensorSpec("tensor", 0, tensor.numel(), tensor.numel() >= max(min_elements, 1))], world_size)
    alone = world_size == 1 and strategy == "auto"
    telemetry.count_bucket(layout, tensor.element_size())
    if alone:
        work = AllReduceWork(completed(tensor), telemetry)
    else:
        in_place = tensor.is_contiguous() and not tensor.is_neg()
        flat = (tensor if in_place else tensor.resolve_neg().contiguous()).detach().reshape(-1)
        fields = Fields(
            {
                "operation": "all_reduce",
                "grid": grid.describe(),
                "min_elements": str(min_elements),
                "strategy": strategy,
                "ranks_per_node": str(node_size),
                "profile": describe(machine),
                "shape": str(list(tensor.shape)),
                "dtype": str(tensor.dtype),
                "device": tensor.device.type,
            }
        )
        task = MeanTask(
            flat,
            layout,
            grid,
            fields,
            telemetry,
            strategy=strategy,
            num_threads=num_threads,
            ranks_per_node=node_size,
            profile=machine,
        )
        if is_on_device(tensor):
            work = _on_device(group, task, tensor)
        else:
            work = AllReduceWork(_submit(group, task, tensor), telemetry)
    if async_op:
        return work
    with telemetry.timed("wait_seconds"):
        work.wait()
    return None


def _on_device(group: Group, task: MeanTask, tensor: torch.Tensor) -> AllReduceWork:
    """On the tensor's current stream. The host waits for the sizes of packets, so nothing is left to wait for."""
    # To find out which way is fastest takes many collectives of one object.
    task = replace(task, strategy="two_phase" if task.strategy == "auto" else task.strategy)
    choice = DeviceChoice(group, get_communicator(group), task.telemetry, tensor.device)
    with torch.no_grad(), torch.cuda.device_of(tensor):
        try:
            choice.average(task)
            choice.flush()
        except (CollectiveError, ConfigMismatchError) as error:
            return AllReduceWork(failed(error), task.telemetry)
        if task.buffer.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(task.buffer.view(tensor.shape))
    return AllReduceWork(completed(tensor, device_future(tensor)), task.telemetry)


def _submit(group: Group, task: MeanTask, tensor: torch.Tensor | None) -> Ticket[torch.Tensor]:
    communicator = get_communicator(group)

    def job() -> torch.Tensor:
        result = average(task, communicator)
        if tensor is None:
            return result
        if result.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(result.view(tensor.shape))
        return tensor

    return communicator.submit(job)


def _check_tensor(tensor: object) -> None:
    checked = check_floats("tensor", tensor, devices=("cpu", "cuda"))
    if checked.is_inference():
        raise ValueError(
            "tensor must not be an inference tensor, as another thread writes to it; clone it outside inference mode"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(checked.shape, checked.stride(), strict=True)):
        raise ValueError(
            "tensor must not be expanded: several of its elements share one place in memory; call .clone() first"
        )
