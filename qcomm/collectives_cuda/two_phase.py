"""The two-phase mean of tensors that are on a device, exchanged by the group's own collectives (NCCL).

::

    stream   gather, measure, encode | all_to_all | add, divide, encode | all_gather | decode, scatter
    host     launches all of it and goes on

The host waits for the device only when a bucket is new, to learn the sizes of its packets. Afterwards packets travel in
slots of a fixed size, see :mod:`qcomm.collectives_cuda.slots`. If packets have no useful bound (a sigma grid without
error feedback) it waits in every collective. New buckets, and collectives that wait anyway, begin with the headers of
:mod:`qcomm.communicator.handshake`, over gloo connections of the communicator. There ranks learn of different
configurations and of faults. Later a rank that fails sends slots without packets: the others get NaN, and the error at
the next agreement.
"""

import weakref
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from qcomm.codec import FAULTS, RangeGrid
from qcomm.collectives import BucketLayout, MeanTask, Scale, Telemetry
from qcomm.collectives_cuda.handshake import AgreedNumbers, DevicePart, agree, is_known
from qcomm.collectives_cuda.slots import PERIOD, Slots, adjusted, is_fixed, nominal_bytes, slot_bytes
from qcomm.collectives_cuda.two_phase_steps import Accounts, DeviceSteps, Workspaces, packet_bounds
from qcomm.communicator import Communicator, Fault, Group, Phase, attempt
from qcomm.errors import CollectiveError
from qcomm.transport import MpiGroup, Traffic

__all__ = ["DeviceMean", "check_group"]

# Later versions of torch have another name for it.
ALL_GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def check_group(group: Group, device: torch.device) -> dist.ProcessGroup:
    """Returns ``group`` if it runs collectives on a device without waiting for it; otherwise raises ValueError."""
    if isinstance(group, MpiGroup):
        raise ValueError(f"group must be a process group with the backend nccl for CUDA tensors, got {group!r}")
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    if device.type == "cuda" and backends.get("cuda") != "nccl":
        raise ValueError(
            f"group must have the backend nccl for CUDA tensors, got {backends.get('cuda')!r}: "
            "init_process_group('nccl'), or 'cpu:gloo,cuda:nccl' for tensors on both"
        )
    return group


@dataclass
class _Bucket:
    """The state of a bucket: its layout, its steps, its capacities."""

    layout: BucketLayout
    dtype: torch.dtype
    bounds: Slots
    accounts: Accounts
    adjustable: bool  # whether capacities follow the packets, which those of a range grid need not
    fixed: Slots | None = None  # capacities; None until the first collective has ended
    places: tuple[object, ...] = ()
    steps: DeviceSteps | None = None
    collectives: int = 0
    arriving: AgreedNumbers | None = None


class DeviceMean:
    """Averages buckets over a group, on the current stream of the buckets' device, which stays the same.

    Args:
        group: every rank makes one and averages the same buckets in the same order.
        communicator: of the group, for the headers; None in a world of one rank.
        telemetry: counts events; the device's counts are added by :meth:`flush`.
    """

    def __init__(self, group: dist.ProcessGroup, communicator: Communicator | None, telemetry: Telemetry) -> None:
        self._group = weakref.ref(group)  # or the group's communicator would never be closed
        self._communicator = communicator
        self._telemetry = telemetry
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._buckets: dict[int, _Bucket] = {}
        self._factors: torch.Tensor | None = None
        self._workspaces: Workspaces | None = None

    def average(self, part: DevicePart, scale: Scale = 1.0) -> Fault | None:
        """Replaces the part's buffer by its mean over all ranks.

        Args:
            part: of this rank.
            scale: the buffer holds values times this: a number, or a tensor of one element on the device.

        Returns:
            None, or a fault of this rank, which took part in the collective nevertheless: the caller raises its error
            and may go on with the next collective.

        Raises:
            CollectiveError, ConfigMismatchError: on all ranks, if the host waits; else see the module.
        """
        known = self._buckets.get(part.index)
        if known is not None and not is_known(part, known.layout, known.dtype):
            known = None
        if known is not None:
            self._adjust(known, part)
        task, bucket, fault = part.task, None, part.fault
        if task is not None and fault is None:
            bucket, fault = attempt(Phase.PREPARE, self._prepare, task, scale)
        if task is not None and bucket is not None:
            if bucket.fixed is None:
                agree(part, self._communicator, "two_phase")
            self._run(bucket, task)
            return None
        if known is not None and known.fixed is not None:
            self._take_part(known, part.buffer.device)
        else:
            agree(replace(part, fault=fault), self._communicator, "two_phase")
        return fault

    def serves(self, group: Group) -> bool:
        """Returns whether this object was made for ``group``."""
        return self._group() is group

    def group(self) -> dist.ProcessGroup:
        """Returns the group of this object.

        Raises:
            CollectiveError: the group was destroyed.
        """
        group = self._group()
        if group is None:
            raise CollectiveError("the process group was destroyed")
        return group

    def flush(self) -> None:
        """Adds the device's counts to the telemetry. Waits for the device."""
        for bucket in self._buckets.values():
            if bucket.steps is None:
                continue
            values, means, mean_bytes = bucket.accounts.take()
            self._telemetry.add(
                packet_bytes_phase1=values["packet_bytes"],
                packet_bytes_phase2=mean_bytes,
                dropped_values=values["dropped_values"] + means["dropped_values"],
                nonfinite_tensors=values["nonfinite_tensors"],
            )
            for tensor, quantizer in bucket.steps.quantizers():
                self._telemetry.note_quantizer(tensor, quantizer)

    def _look_up(self, task: MeanTask) -> _Bucket:
        layout, device = task.layout, task.buffer.device
        bucket = self._buckets.get(task.index)
        if bucket is None or not is_known(DevicePart.of(task), bucket.layout, bucket.dtype):
            if bucket is not None:
                self.flush()  # its counters go with it
            bounds = packet_bounds(layout, task.options, task.wire_dtype, device)
            bucket = self._buckets[task.index] = _Bucket(
                layout, task.buffer.dtype, bounds, Accounts(device), not isinstance(task.options.grid, RangeGrid)
            )
        return bucket

    def _set_scale(self, scale: Scale, task: MeanTask) -> None:
        if isinstance(scale, float) and scale == 1.0:
            self._factors = None
            return
        if self._factors is None:
            self._factors = torch.empty(2, dtype=torch.float64, device=task.buffer.device)
        if isinstance(scale, torch.Tensor):
            self._factors[1].copy_(scale.reshape(()))
            torch.reciprocal(self._factors[1], out=self._factors[0])
        else:
            self._factors[0].fill_(1.0 / scale)
            self._factors[1].fill_(scale)

    def _prepare(self, task: MeanTask, scale: Scale) -> _Bucket:
        """Returns the bucket, with new plans if the kernels' tables would hold old addresses or capacities."""
        bucket = self._look_up(task)
        self._set_scale(scale, task)
        if task.feedback is not None:
            task.feedback.adopt(task.layout, self._rank)
        slots = bucket.fixed or bucket.bounds
        places = (
            slots,
            task.buffer.data_ptr(),
            None if self._factors is None else self._factors.data_ptr(),
            *DeviceSteps.residuals(task, self._rank),
        )
        if self._workspaces is None:
            self._workspaces = Workspaces(task.buffer.device)
        if bucket.places != places:
            bucket.steps = DeviceSteps(task, self._rank, slots, self._factors, bucket.accounts, self._workspaces)
            bucket.places = places
        return bucket

    def _run(self, bucket: _Bucket, task: MeanTask) -> None:
        steps, chunks = bucket.steps, task.layout.chunks
        if steps is None:
            raise RuntimeError("_prepare makes the steps")
        fixed = is_fixed(task.options.grid, task.feedback is not None)
        exact = bucket.fixed is None
        sizes = steps.slots
        steps.encode()
        if exact:
            sizes = Slots(self._largest(steps, 1, bucket.bounds.values), 0)
        self._exchange_values(steps, sizes.values)
        steps.reduce()
        if exact:
            sizes = Slots(sizes.values, self._largest(steps, 2, bucket.bounds.means))
        self._exchange_means(steps, sizes.means)
        steps.decode()
        self._count(task, sizes)
        if exact and fixed:
            tensors, feedback = task.layout.tensors, task.feedback is not None
            nominal = [
                max(
                    nominal_bytes([grid_of(tensors[p.tensor]) for p in chunk.pieces], chunk, task.wire_dtype, feedback)
                    for chunk in chunks
                )
                for grid_of in (task.options.grid_of, task.options.mean_grid_of)
            ]
            bucket.fixed = Slots(
                min(bucket.bounds.values, max(slot_bytes(sizes.values, bucket.bounds.values), nominal[0])),
                min(bucket.bounds.means, max(slot_bytes(sizes.means, bucket.bounds.means), nominal[1])),
            )
        if not exact:
            self._end(bucket)

    def _end(self, bucket: _Bucket) -> None:
        """Counts a collective of fixed slots. Every rank calls this, whether or not it had values."""
        bucket.collectives += 1
        if bucket.collectives % PERIOD == 0:
            self._send_agreement(bucket)

    def _take_part(self, bucket: _Bucket, device: torch.device) -> None:
        """Takes part in a collective for which this rank has no values.

        Its slots hold no packets, which all ranks take as a fault.
        """
        if bucket.fixed is None:
            raise RuntimeError("a bucket without fixed slots begins with headers")
        world_size = self._world_size
        if world_size > 1:
            values = torch.zeros(2, world_size * bucket.fixed.values, dtype=torch.uint8, device=device)
            dist.all_to_all_single(values[0], values[1], group=self.group())
        means = torch.zeros(world_size + 1, bucket.fixed.means, dtype=torch.uint8, device=device)
        ALL_GATHER(means[1:].view(-1), means[0], group=self.group())
        self._end(bucket)

    def _largest(self, steps: DeviceSteps, phase: int, bound: int) -> int:
        """Returns the maximum bytes of any rank's packets of the last phase, in whole slots. Waits for the device."""
        largest = steps.largest(phase)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group())
        return min(bound, max(16, -(-int(largest.item()) // 16) * 16))

    def _exchange_values(self, steps: DeviceSteps, size: int) -> None:
        if self._world_size == 1:
            return
        whole = size == steps.slots.values
        outgoing = steps.outgoing if whole else steps.outgoing[:, :size].contiguous()
        incoming = steps.incoming if whole else torch.empty_like(outgoing)
        dist.all_to_all_single(incoming.view(-1), outgoing.view(-1), group=self.group())
        if not whole:
            steps.incoming[:, :size].copy_(incoming)

    def _exchange_means(self, steps: DeviceSteps, size: int) -> None:
        whole = size == steps.slots.means
        means = steps.means if whole else torch.empty_like(steps.means[:, :size])
        ALL_GATHER(means.view(-1), steps.mean[:size], group=self.group())
        if not whole:
            steps.means[:, :size].copy_(means)

    def _count(self, task: MeanTask, sizes: Slots) -> None:
        """Counts the bytes that crossed the network, in whole slots. The device counts the bytes of packets in them."""
        layout, others = task.layout, self._world_size - 1
        for phase, size in ((1, sizes.values), (2, sizes.means)):
            self._telemetry.add_traffic(f"phase{phase}", Traffic(others * size, others * size))
        dtype = task.wire_dtype
        sent = [chunk for owner, chunk in enumerate(layout.chunks) if owner != self._rank and chunk.count]
        self._telemetry.count_packets(1, sent, [], dtype)
        self._telemetry.count_packets(2, [chunk for chunk in layout.chunks if chunk.count], [], dtype)

    def _send_agreement(self, bucket: _Bucket) -> None:
        """Starts the agreement on the largest packets and the worst fault of all ranks, on their way to the host."""
        accounts = bucket.accounts.for_agreement()
        if accounts[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return  # a graph keeps its capacities
        bucket.arriving = AgreedNumbers(torch.stack(list(accounts)), dist.ReduceOp.MAX, self.group())
        for count in accounts:
            count.zero_()

    def _adjust(self, bucket: _Bucket, part: DevicePart) -> None:
        """Applies the new capacities, or raises the error, that all ranks agreed on PERIOD collectives ago."""
        if bucket.arriving is None or bucket.fixed is None or bucket.collectives % PERIOD != PERIOD - 1:
            return
        values, means, fault = bucket.arriving.read()  # they have long been on the host
        bucket.arriving = None
        if fault:
            raise CollectiveError(
                f"bucket {part.index}: a rank failed, or packets were damaged or did not fit, in the last "
                f"{2 * PERIOD} steps ({FAULTS[fault]}); their means are NaN"
            )
        if bucket.adjustable:
            bucket.fixed = Slots(
                adjusted(bucket.fixed.values, values, bucket.bounds.values),
                adjusted(bucket.fixed.means, means, bucket.bounds.means),
            )
