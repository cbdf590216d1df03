"""torchft: a process group for its Manager, whose all-reduces travel compressed between whichever replicas there are.

The Manager makes a group anew for each quorum and discards a step in which its group fails. So this one connects anew,
keeps the residuals, and raises no error of an exchange. The Manager asks for it at the end of the step. Until then
all-reduces end at once: an error that the Manager knows earlier ends the process in the next bucket of torchft's DDP
(0.2.0), whose hook then finds a Future of another kind. DDP, LocalSGD and DiLoCo of torchft reduce through the Manager,
and need no change of their own.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllreduceOptions, ReduceOp
from typing_extensions import Unpack

from qcomm.codec import Grid, SigmaGrid
from qcomm.collectives import ReduceKeywords, ReduceOptions, Telemetry
from qcomm.communicator import Ticket, completed
from qcomm.errors import ConfigMismatchError
from qcomm.integrations.quorum import Quorum
from qcomm.integrations.quorum_residuals import QuorumResiduals
from qcomm.transport import Meeting

try:
    from torchft.process_group import ProcessGroup, ProcessGroupWrapper, create_store_client
except ImportError as missing:
    raise ImportError(f"qcomm.integrations.torchft needs torchft: pip install 'qcomm[torchft]' ({missing})") from None

__all__ = ["CompressedProcessGroup"]

STRATEGIES = ("two_phase", "all_gather", "exact_sum")
TIMEOUT = timedelta(seconds=60)


class CompressedProcessGroup(ProcessGroupWrapper):
    """A process group for ``torchft.Manager(pg=...)``, which compresses sums and means of floating-point tensors.

    Everything else goes to the group that it wraps: other operations, other dtypes, and ``should_quantize=True`` of
    torchft's, which is to stay False.

    Residuals are of the replica. Its checkpoints keep them with :meth:`state_dict`; they do not belong in the state
    that the Manager sends to replicas that heal, who begin with zeros. An all-reduce is known by its number in the
    step, which ends where the Manager asks :meth:`errored`.

    Args:
        pg: a group of torchft's that is made anew for each quorum, such as ``ProcessGroupGloo()``. Its timeout is that
            of all messages.
        grid: of the quantization, as of :func:`qcomm.attach`. LocalSGD averages weights, and takes a ``RangeGrid``.
        error_feedback: whether quantization errors are kept and sent later.
        step: returns the Manager's step: ``lambda: manager.current_step()``. With it, a step that is discarded for any
            reason takes nothing from the residuals. Without it, one that an error of this group ends does not.
        fragments: number of fragments of torchft's DiLoCo, whose steps reduce them alternately. More than one need
            ``step``.
        **options: ``mean_step``, ``min_elements``, ``num_threads``, ``verify``, ``secret``, ``connections`` and
            ``strategy`` of :class:`qcomm.collectives.ReduceOptions`. The strategy is ``"two_phase"`` by default, and
            one of those that compress: ``"auto"`` would begin its search anew with each quorum.

    Raises:
        TypeError, ValueError: naming the argument.
        OSError: the key file of ``secret`` cannot be read.

    Example:
        >>> from torchft import ProcessGroupGloo
        >>> CompressedProcessGroup(ProcessGroupGloo(), strategy="auto")
        Traceback (most recent call last):
            ...
        ValueError: strategy must be one of ('two_phase', 'all_gather', 'exact_sum') under torchft, got 'auto'
    """

    def __init__(
        self,
        pg: ProcessGroup,
        grid: Grid = SigmaGrid(step=1.0),
        *,
        error_feedback: bool = True,
        step: Callable[[], int] | None = None,
        fragments: int = 1,
        **options: Unpack[ReduceKeywords],
    ) -> None:
        if not isinstance(pg, ProcessGroup):
            raise TypeError(f"pg must be a group of torchft's, such as torchft.ProcessGroupGloo(), got {type(pg)}")
        if isinstance(fragments, bool) or not isinstance(fragments, int) or fragments < 1:
            raise ValueError(f"fragments must be an int of at least 1, got {fragments!r}")
        if step is not None and not callable(step):
            raise TypeError(f"step must be a function, such as lambda: manager.current_step(), got {step!r}")
        if fragments > 1 and step is None:
            raise ValueError(
                f"fragments must be 1 without step, got {fragments}; pass step=lambda: manager.current_step()"
            )
        options.setdefault("strategy", "two_phase")
        self._options = _checked(ReduceOptions(grid, **options), error_feedback)
        timeout = getattr(pg, "_timeout", TIMEOUT)
        super().__init__(timeout, pg)
        self._inner = pg
        self._of_step, self._fragments = step, fragments
        self._telemetry = Telemetry()
        self._residuals = QuorumResiduals() if error_feedback else None
        self._quorum: Quorum | None = None
        self._failed: Exception | None = None  # the group; an error of an exchange is the quorum's
        self._number = 0  # of all-reduces in the step under way
        self._begun: int | None = None  # the last step that began

    def configure(
        self,
        store_addr: str,
        replica_id: str,
        rank: int,
        world_size: int,
        quorum_id: int | None = None,
        group_rank: int | None = None,
        group_world_size: int | None = None,
        global_ranks: list[int] | None = None,
    ) -> None:
        """Connects the replicas of a new quorum, and keeps the residuals; see torchft's ``ProcessGroup``.

        Exchanges under way end. So does the wait for replicas that died. If a replica of the new quorum does not take
        part, :meth:`errored` says so.
        """
        self._end_quorum()
        names = (quorum_id, group_rank, group_world_size, global_ranks)
        try:
            self._inner.configure(store_addr, replica_id, rank, world_size, *names)
            store = dist.PrefixStore("qcomm", create_store_client(store_addr, timeout=self._timeout))
            meeting = Meeting(store, list(range(world_size)), rank, self._timeout)
            self._quorum = Quorum(meeting, self._options, self._telemetry)
        except (RuntimeError, ConfigMismatchError) as error:  # of torch's stores and groups; CollectiveError
            self._failed = error

    def allreduce(self, tensors: list[torch.Tensor], opts: AllreduceOptions | ReduceOp) -> Any:
        """Begins an all-reduce; see torchft's ``ProcessGroup``. After an error, it has ended and the tensor is useless.

        Raises:
            ValueError: more tensors than one.
        """
        operation = getattr(opts, "reduceOp", opts)
        # Compared in this order: a member of the enumeration does not equal the operation that options hold.
        is_mean, is_sum = operation == ReduceOp.AVG, operation == ReduceOp.SUM
        if not (is_mean or is_sum) or not all(tensor.is_floating_point() for tensor in tensors):
            return super().allreduce(tensors, opts)
        if len(tensors) != 1:
            raise ValueError(f"tensors must hold one tensor, as the Manager's all-reduces do, got {len(tensors)}")
        (tensor,) = tensors
        if self._quorum is None or self._error() is not None:
            return _Work(completed(tensor), tensor)
        number, self._number = self._number, self._number + 1
        if number == 0:
            self._begin_step()
        kept = None if self._residuals is None else self._residuals.of(self._key(number, tensor))
        return _Work(self._quorum.start(tensor, number, is_mean, *(kept or (None, None))), tensor)

    def errored(self) -> Exception | None:
        """Returns the error of this quorum, after waiting for its exchanges. Without one, the step has ended.

        With one, this replica takes part in nothing until ``configure``, so it closes the connections: others may have
        no error yet, and wait for it.
        """
        if self._quorum is not None and self._failed is None:
            self._quorum.join()
        error = self._error()
        if error is None:
            self._end_step()
        elif self._quorum is not None:
            self._quorum.close()
        return error

    def abort(self, errored: bool = True) -> None:
        """Ends all exchanges at once, on the other replicas too, which get an error; ``configure`` begins anew."""
        self._failed = RuntimeError("the group was aborted")
        if self._quorum is not None:
            self._quorum.close()
        self._inner.abort()

    def shutdown(self) -> None:
        """Closes the connections."""
        if self._quorum is not None:
            self._quorum.close()
        self._inner.shutdown()

    def set_timeout(self, timeout: timedelta) -> None:
        """Sets the timeout of the next quorum."""
        self._timeout = timeout
        self._inner.set_timeout(timeout)

    def getBackendName(self) -> str:
        """Returns the name under which torch knows groups like this one."""
        return "torchft-qcomm"

    def stats(self) -> dict[str, Any]:
        """Returns the counters of this replica over all quorums, named as in ``CompressionState.stats``."""
        norm = 0.0 if self._residuals is None else self._residuals.norm()
        return {**self._telemetry.stats(), "residual_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of this replica's residuals, for its own checkpoints; between steps."""
        return (self._residuals or QuorumResiduals()).state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from the residuals of a checkpoint, before the first step.

        Raises:
            ValueError: damaged; nothing has changed then.
        """
        (self._residuals or QuorumResiduals()).load_state_dict(state_dict)

    def _error(self) -> Exception | None:
        of_quorum = None if self._quorum is None else self._quorum.error()
        return self._failed or of_quorum or self._inner.errored()

    def _begin_step(self) -> None:
        """Decides about the step before: residuals follow what became of it."""
        step = None if self._of_step is None else self._of_step()
        if self._residuals is not None:
            if step is not None and step == self._begun:
                self._residuals.undo()
            else:
                self._residuals.commit()
        self._begun = step

    def _end_step(self) -> None:
        self._telemetry.add(steps=int(self._number > 0))
        self._number = 0
        if self._quorum is not None:
            self._quorum.end_step()

    def _end_quorum(self) -> None:
        quorum, self._quorum = self._quorum, None
        has_ended_well = quorum is None or quorum.close()
        if self._residuals is not None:
            if self._failed is not None or not has_ended_well:
                self._residuals.undo()
            self._residuals.regroup()
        self._failed, self._number = None, 0

    def _key(self, number: int, tensor: torch.Tensor) -> str:
        fragment = 0 if self._begun is None else self._begun % self._fragments
        return f"{fragment}.{number}.{tensor.numel()}"


class _Work(dist._Work):
    """An all-reduce under way. Its error is the group's, and its Future has the tensor, well or not."""

    def __init__(self, ticket: Ticket[torch.Tensor], tensor: torch.Tensor) -> None:
        super().__init__()
        self._ticket, self._future = ticket, ticket.future.then(lambda _: tensor)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Waits for the end; returns whether it went well."""
        if not self._ticket.join(None if not timeout else timeout.total_seconds()):
            return False
        self._future.wait()  # the Manager's callbacks have to run on its own thread, which adds them after this
        return self.is_success()

    def block_current_stream(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._ticket.is_completed()

    def is_success(self) -> bool:
        return self._ticket.is_completed() and self._ticket.exception() is None

    def exception(self) -> Exception | None:
        return self._ticket.exception()

    def get_future(self) -> torch.futures.Future[torch.Tensor]:
        return self._future


def _checked(options: ReduceOptions, error_feedback: bool) -> ReduceOptions:
    if options.strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES} under torchft, got {options.strategy!r}")
    if options.device_codec:
        raise ValueError("device_codec must be False under torchft, got True: its groups come and go without NCCL's")
    if options.link_rates is not None:
        raise ValueError(f"link_rates must be None under torchft, whose replicas change, got {options.link_rates}")
    if error_feedback:
        options.check_feedback()
    return options
