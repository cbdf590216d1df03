"""Transport: one interface that carries messages between ranks, over gloo and MPI."""

from qcomm.transport.base import Exchange, Traffic, Transfer, Transport, TransportError
from qcomm.transport.gloo import GlooTransport, break_connections
from qcomm.transport.launchers import find_place, init_from_environment
from qcomm.transport.mpi_group import MpiGroup

__all__ = [
    "Exchange",
    "GlooTransport",
    "MpiGroup",
    "Traffic",
    "Transfer",
    "Transport",
    "TransportError",
    "break_connections",
    "find_place",
    "init_from_environment",
]
