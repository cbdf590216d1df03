"""The communicator: runs the collectives of a group of ranks in one order, on a background thread."""

from qcomm.communicator.faults import Fault, LateFaultError, Phase, attempt
from qcomm.communicator.groups import (
    CHANNELS,
    UNEQUAL_CHANNELS,
    Group,
    check_connections,
    connect,
    deal,
    deal_to_tell,
    find_communicator,
    get_communicator,
    get_ranks,
    get_world_size,
    give_up,
    resolve_group,
)
from qcomm.communicator.handshake import UNTIMED, Agreed, Fields, Handshake, Took
from qcomm.communicator.pipeline import Pipeline
from qcomm.communicator.ticket import Ticket, completed, device_future, failed
from qcomm.communicator.worker import Communicator, is_agreed

__all__ = [
    "CHANNELS",
    "UNEQUAL_CHANNELS",
    "UNTIMED",
    "Agreed",
    "Communicator",
    "Fault",
    "Fields",
    "Group",
    "Handshake",
    "LateFaultError",
    "Phase",
    "Pipeline",
    "Ticket",
    "Took",
    "attempt",
    "check_connections",
    "completed",
    "connect",
    "deal",
    "deal_to_tell",
    "device_future",
    "failed",
    "find_communicator",
    "get_communicator",
    "get_ranks",
    "get_world_size",
    "give_up",
    "is_agreed",
    "resolve_group",
]
