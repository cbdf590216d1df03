"""Regrouping: the first step after a checkpoint runs on the buckets of the step before it.

DDP fills other buckets in its first step than later, once it has seen in which order gradients become ready. Owners and
pieces of a mean follow from the buckets, and so do the steps of its grid. A resumed run would therefore differ from an
undisturbed one in the last bits of its first step. Its checkpoint names the parameters of each bucket. In the first
step all of DDP's buckets are held back, copied to the buckets of the checkpoint, averaged there, and copied back.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.distributed as dist

from qcomm.communicator import Ticket

__all__ = ["Regrouping", "may_regroup"]

Mean = torch.futures.Future[torch.Tensor]


class Place(NamedTuple):
    """A parameter, and where its gradient is: all of ``values``, a view of a bucket of DDP's."""

    parameter: torch.Tensor
    values: torch.Tensor


class Regrouped:
    """A bucket of the checkpoint, with the methods of a ``GradBucket`` that the hook uses."""

    def __init__(self, index: int, is_last: bool, places: Sequence[Place]) -> None:
        self._index, self._is_last, self._places = index, is_last, places
        self._buffer = torch.cat([place.values for place in places])

    def index(self) -> int:
        """Returns the number of the bucket."""
        return self._index

    def is_last(self) -> bool:
        """Returns whether it is the last of its step."""
        return self._is_last

    def buffer(self) -> torch.Tensor:
        """Returns the flat gradients."""
        return self._buffer

    def parameters(self) -> list[torch.Tensor]:
        """Returns the parameters, in the order of their gradients."""
        return [place.parameter for place in self._places]

    def gradients(self) -> list[torch.Tensor]:
        """Returns the gradients as views of the buffer."""
        parts = self._buffer.split([place.values.numel() for place in self._places])
        return [part.view(place.parameter.shape) for part, place in zip(parts, self._places, strict=True)]

    def copy_back(self) -> None:
        """Copies the buffer to where the gradients came from."""
        parts = self._buffer.split([place.values.numel() for place in self._places])
        for part, place in zip(parts, self._places, strict=True):
            place.values.copy_(part)


def may_regroup(bucket: dist.GradBucket, skips_buckets: bool) -> bool:
    """Returns whether a step that begins with ``bucket`` can be regrouped.

    On a device everything runs on streams, and where a step may leave out buckets no one knows its last.
    """
    return bucket.buffer().device.type == "cpu" and not skips_buckets


class Regrouping:
    """The first step after a checkpoint.

    Args:
        order: names of the parameters of each bucket in the checkpoint.
        name_of: finds the name of a parameter.
        reduce: starts the mean of a bucket.
        owe: called with an error of this rank, which ``reduce`` then tells the others.
    """

    def __init__(
        self,
        order: Sequence[Sequence[str]],
        name_of: Callable[[torch.Tensor], str],
        reduce: Callable[[dist.GradBucket], Mean],
        owe: Callable[[Exception], None],
    ) -> None:
        self._order, self._name_of, self._reduce, self._owe = order, name_of, reduce, owe
        self._places: dict[str, Place] = {}
        self._held: list[tuple[dist.GradBucket, torch.Tensor, Ticket[torch.Tensor]]] = []
        self._is_readable = True

    def add(self, bucket: dist.GradBucket) -> Mean:
        """Holds a bucket of DDP's back; the last one of the step starts all means."""
        held: Ticket[torch.Tensor] = Ticket()
        self._held.append((bucket, bucket.buffer(), held))
        try:
            self._read(bucket)
        except Exception as error:  # noqa: BLE001 - any: it is raised on every rank by the next agreement
            self._fail(error)
        if bucket.is_last():
            self._start()
        return held.future

    def _read(self, bucket: dist.GradBucket) -> None:
        buffer, parameters, offset = bucket.buffer(), bucket.parameters(), 0
        # DDP may pair parameters with the wrong gradients, which ``reduce`` refuses.
        pairs = zip(parameters, bucket.gradients(), strict=True)
        self._is_readable &= all(parameter.shape == gradient.shape for parameter, gradient in pairs)
        self._is_readable &= sum(parameter.numel() for parameter in parameters) == buffer.numel()
        for parameter in parameters:
            values = buffer[offset : offset + parameter.numel()]
            self._places[self._name_of(parameter)] = Place(parameter, values)
            offset += parameter.numel()

    def _fail(self, error: Exception) -> None:
        self._is_readable = False
        self._owe(error)

    def _start(self) -> None:
        groups: list[Regrouped] = []
        if self._fits():
            try:
                groups = [
                    Regrouped(index, index == len(self._order) - 1, [self._places[name] for name in names])
                    for index, names in enumerate(self._order)
                ]
            except Exception as error:  # noqa: BLE001 - any: it is raised on every rank by the next agreement
                self._fail(error)
        if groups and self._is_readable:
            means = [self._reduce(cast(dist.GradBucket, group)) for group in groups]
            torch.futures.collect_all(means).add_done_callback(lambda done: self._finish(done, groups))
        else:
            for bucket, _, held in self._held:
                self._reduce(bucket).add_done_callback(partial(_pass_on, held))

    def _fits(self) -> bool:
        """Returns whether the checkpoint has just these parameters, and buckets of one dtype."""
        names = [name for bucket in self._order for name in bucket]
        if len(names) != len(set(names)) or set(names) != set(self._places) or not all(self._order):
            return False
        same = all(len({self._places[name].values.dtype for name in bucket}) == 1 for bucket in self._order)
        return same and self._is_readable

    def _finish(self, done: torch.futures.Future[list[Mean]], groups: Sequence[Regrouped]) -> None:
        failure: Exception | None = None
        try:
            for mean in done.value():
                mean.value()
            for group in groups:
                group.copy_back()
        except Exception as error:  # noqa: BLE001 - any: DDP waits for these Futures, which raise it
            failure = error
        for _, buffer, held in self._held:
            held.complete(buffer, failure)


def _pass_on(held: Ticket[torch.Tensor], mean: Mean) -> None:
    try:
        held.complete(mean.value(), None)
    except Exception as error:  # noqa: BLE001 - any: DDP waits for this Future, which raises it
        held.complete(None, error)
