"""Groups of ranks, of torch.distributed or of MPI, and the communicators that each of them shares.

A group has a communicator for each of its *channels*: a thread and connections of their own. Collectives on different
channels are under way at once, so one waits for its messages while another computes or sends. They compute in turns:
together they take no more of the processor than one.
"""

import threading
import weakref
from contextlib import suppress

import torch.distributed as dist

from qcomm.communicator.worker import Communicator
from qcomm.errors import CollectiveError, ConfigMismatchError
from qcomm.transport import (
    AUTO,
    MOST_CONNECTIONS,
    PLAIN,
    ConnectionOptions,
    GlooTransport,
    KeyFile,
    MpiGroup,
    secure,
)

__all__ = [
    "CHANNELS",
    "UNEQUAL_CHANNELS",
    "Group",
    "check_connections",
    "connect",
    "deal",
    "deal_to_tell",
    "find_communicator",
    "get_communicator",
    "get_ranks",
    "get_world_size",
    "give_up",
    "resolve_group",
]

Group = dist.ProcessGroup | MpiGroup
# Enough to hide a latency as long as a bucket's messages. Each one costs four threads and a connection to each rank.
CHANNELS = 4
# Where ranks own unequal parts: one that owns little sends its values and then waits, while others could use its link.
UNEQUAL_CHANNELS = 8


class _Place:
    """The place of a group's communicators, by channel.

    Its lock is held while one is made, which waits for other ranks. Other groups need not wait for it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.communicators: list[Communicator] = []
        self.options = PLAIN  # with which the first communicator was asked for
        self.agreed = PLAIN  # the same for the others: "auto" has become a number
        self.dealt = 0  # number of jobs


_places: "weakref.WeakKeyDictionary[Group, _Place]" = weakref.WeakKeyDictionary()
_places_lock = threading.Lock()


def resolve_group(group: Group | None) -> Group:
    """Returns ``group`` or the default group, after checking that this process belongs to it.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: this process is not a member, or the group was destroyed.
    """
    if isinstance(group, MpiGroup):
        if group.is_closed:
            raise ValueError("group is closed; make a new MpiGroup")
        return group
    if type(group).__module__.startswith("mpi4py"):
        raise ValueError(f"group must be wrapped, once and on all ranks: qcomm.MpiGroup(comm), got {group!r}")
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a process group that this rank belongs to, got {group!r}")
    if not _is_registered(group):
        raise ValueError("group was destroyed; make a new process group")
    return group


def get_world_size(group: Group) -> int:
    """Returns the number of ranks in a group."""
    return group.size if isinstance(group, MpiGroup) else dist.get_world_size(group)


def get_ranks(group: Group) -> list[int]:
    """Returns the group's ranks by their numbers in the whole job."""
    return list(group.transport.ranks) if isinstance(group, MpiGroup) else dist.get_process_group_ranks(group)


def get_communicator(
    group: Group, options: ConnectionOptions = PLAIN, channel: int = 0, channels: int = 1
) -> Communicator:
    """Returns the communicator of a group's channel, which the first call makes.

    Making it is a collective, which all ranks of the group reach in the same order. The communicator ends with its
    group, or with the process.

    Args:
        group: of this process.
        options: of the group, with the secret that seals all its messages.
        channel: less than ``channels``. A group of MPI has the first one only.
        channels: that are connected at once: a rank may die while another connects, and there is no connection yet that
            would tell.

    Raises:
        ValueError: the communicator was made with another secret or without one, or with another number of
            connections. A group has one secret for all its uses, so that no call sends openly what another one seals.
        ConfigMismatchError, CollectiveError: some rank has no secret or another one, or another number of connections,
            or does not answer.
    """
    place = _place_of(group)
    with place.lock:
        check_connections(group, options)
        return _made(group, place, options, channel, channels)


def deal(group: Group, options: ConnectionOptions = PLAIN) -> Communicator:
    """Returns the channel for this rank's next dealt job of a group; pass ``alone`` when it is submitted there.

    The n-th dealt job of a group runs on channel n mod CHANNELS on every rank, whatever each rank does in it. So ranks
    that call different functions, or with different arguments, meet on one channel and tell each other. The first job
    connects all channels: later there might be a dead rank, of which no new connection tells.

    Args:
        group: of this process.
        options: of the connections, if there are none yet; they are not compared with those that there are.

    Raises:
        ConfigMismatchError, CollectiveError: as of :func:`get_communicator`.
    """
    place = _place_of(group)
    with place.lock:
        number, place.dealt = place.dealt, place.dealt + 1
        channels = CHANNELS if get_world_size(group) > 1 else 1
        return _made(group, place, options, number % channels, channels)


def _place_of(group: Group) -> _Place:
    """Returns the place of a group, after closing the communicators of groups that have ended."""
    with _places_lock:
        ended = [_places.pop(known) for known in list(_places) if not _is_registered(known)]
        place = _places.setdefault(group, _Place())
    for other in ended:
        for communicator in other.communicators:
            communicator.close()
    return place


def _made(group: Group, place: _Place, options: ConnectionOptions, channel: int, channels: int) -> Communicator:
    """Returns the communicator of a channel, after making those that are missing; the place is locked."""
    if isinstance(group, MpiGroup):
        channel, channels, options = 0, 1, options._replace(connections=1)
    while len(place.communicators) < channels:
        first = place.communicators[0] if place.communicators else None
        transport = group.transport if isinstance(group, MpiGroup) else GlooTransport(group)
        communicator = Communicator(secure(transport, options if first is None else place.agreed), first)
        if first is None:
            place.options, place.agreed = options, options._replace(connections=communicator.connections)
        place.communicators.append(communicator)
        weakref.finalize(group, communicator.close)
        if isinstance(group, MpiGroup):
            group.before_close(communicator.close)
    return place.communicators[channel]


def find_communicator(group: Group) -> Communicator | None:
    """Returns the first communicator of a group if it has been made, with whatever options.

    A rank whose call fails :func:`check_connections` can tell the others, who wait for it.
    """
    with _places_lock:
        place = _places.get(group)
    return place.communicators[0] if place is not None and place.communicators else None


def deal_to_tell(group: Group, secret: object, connections: object) -> Communicator | None:
    """Returns the channel of a dealt job with which a rank that cannot take part tells the others so.

    Args:
        group: of this process.
        secret, connections: that the caller passed, perhaps because of which this rank cannot.

    Returns:
        None where the others have an error already: they have met a rank without their secret.
    """
    key_file: KeyFile | None = None
    count: int | str | None = None
    if connections == AUTO or (isinstance(connections, int) and 1 <= connections <= MOST_CONNECTIONS):
        count = connections
    with suppress(TypeError, ValueError, OSError, RuntimeError):  # without it, this rank greets as one that has none
        key_file = KeyFile.of(secret)
    try:
        return deal(group, ConnectionOptions(key_file, count))
    except (CollectiveError, ConfigMismatchError):
        return None


def give_up(group: Group, reason: str) -> None:
    """Closes all connections of a group, if there are any: others may wait where no header of this rank arrives."""
    with _places_lock:
        place = _places.get(group)
    for communicator in () if place is None else place.communicators:
        communicator.give_up(reason)


def check_connections(group: Group, options: ConnectionOptions) -> None:
    """Raises ValueError if a group's ranks are connected with another secret or number of connections, or cannot be."""
    if isinstance(group, MpiGroup):
        if options.connections not in (None, 1, AUTO):
            raise ValueError(f"connections must be 1 or 'auto' with a qcomm.MpiGroup, got {options.connections}")
        options = options._replace(connections=1)  # messages are MPI's own
    with _places_lock:
        place = _places.get(group)
    if place is None or not place.communicators:
        return
    there = place.options
    if there.secret != options.secret:
        sealed = "without one" if there.secret is None else f"with {there.secret.path}"
        asked = "none" if options.secret is None else options.secret.path
        raise ValueError(
            f"secret must be the same for all uses of a group, got {asked}: its ranks are connected {sealed}"
        )
    if options.connections not in (None, there.connections or 1):
        raise ValueError(
            f"connections must be the same for all uses of a group, got {options.connections}: its ranks have "
            f"{there.connections or 1}"
        )


def connect(
    group: Group, alone: bool, options: ConnectionOptions = PLAIN, channel: int = 0, channels: int = 1
) -> Communicator | None:
    """Returns the communicator of a group's channel; None for a group of one rank if ``alone`` is set."""
    return None if alone and get_world_size(group) == 1 else get_communicator(group, options, channel, channels)


def _is_registered(group: Group) -> bool:
    if isinstance(group, MpiGroup):
        return not group.is_closed
    try:
        return len(dist.get_process_group_ranks(group)) > 0
    except (KeyError, ValueError, RuntimeError):
        return False
