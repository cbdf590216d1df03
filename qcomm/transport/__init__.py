"""Transport: one interface that carries messages between ranks, over gloo and MPI."""

from qcomm.transport.auto_connections import AUTO
from qcomm.transport.base import MESSAGE_BYTES, Exchange, Mail, Traffic, Transfer, Transport, TransportError
from qcomm.transport.gloo import GlooTransport, Meeting, break_group, can_bypass
from qcomm.transport.key_file import KeyFile
from qcomm.transport.launchers import find_place, init_from_environment
from qcomm.transport.mpi_group import MpiGroup
from qcomm.transport.polling import poll_until
from qcomm.transport.secure import MOST_CONNECTIONS, PLAIN, ConnectionOptions, secure

__all__ = [
    "AUTO",
    "MESSAGE_BYTES",
    "MOST_CONNECTIONS",
    "PLAIN",
    "ConnectionOptions",
    "Exchange",
    "GlooTransport",
    "KeyFile",
    "Mail",
    "Meeting",
    "MpiGroup",
    "Traffic",
    "Transfer",
    "Transport",
    "TransportError",
    "break_group",
    "can_bypass",
    "find_place",
    "init_from_environment",
    "poll_until",
    "secure",
]
