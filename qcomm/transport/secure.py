"""Agreement on connections: all ranks say how they want to be connected, and those who have a secret prove it.

Every rank sends every other a *greeting*, whether it has a secret or not, so that no rank waits where only some have
one, or where they want different numbers of connections. It holds a public key of X25519 that is made for these
connections and then forgotten. Each pair of ranks mixes the result of that exchange with the secret::

    HKDF-SHA256(X25519(own private, other's public) | secret, info: label | ranks | both public keys)

into a key for each direction. Then each sends the other a sealed message, which opens only if both have the secret and
nobody altered a greeting. Whoever lacks the secret learns nothing, even of messages that were recorded before the key
file was stolen: the private keys are gone. The names of ranks and both public keys are part of a key, so that the
greeting of another rank, of another run, or the own one sent back leads to other keys.

A greeting has the same length and place of its checksum in all versions, those of the headers of a version without
greetings. A rank of another version therefore gets an error, and not a message that is too long, at which gloo would
end the process.
"""

import struct
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from qcomm.errors import ConfigMismatchError
from qcomm.transport.auto_connections import AUTO, agree_on_connections
from qcomm.transport.base import Transport, TransportError
from qcomm.transport.key_file import KeyFile
from qcomm.transport.sealed import KEY_BYTES, Direction, SealedTransport

__all__ = ["MOST_CONNECTIONS", "PLAIN", "ConnectionOptions", "secure"]

# "qcomm", a letter of its own, and the version of this protocol.
MAGIC = 0x71636F6D6D73_03
LABEL = b"qcomm sealed messages 1"
# Magic, whether the sender has a secret, its public key, its number of connections, nothing; a checksum follows.
GREETING = struct.Struct("<qq32sq16x")
CHECKSUM = struct.Struct("<q")
RANKS = struct.Struct("<QQQ")
NO_KEY = bytes(32)

MOST_CONNECTIONS = 64
AUTOMATIC = 0  # in a greeting, the number of connections of a rank whose option is AUTO


class ConnectionOptions(NamedTuple):
    """How the ranks of a group are connected: alike for all its uses and, but for the path of the secret, on all ranks.

    Attributes:
        secret: with which all messages are sealed; None if they are not.
        connections: to each rank, of each channel; AUTO for as many as the ranks agree on when they connect, None for
            those that there are, otherwise one.
    """

    secret: KeyFile | None = None
    connections: int | str | None = None


PLAIN = ConnectionOptions()


def secure(transport: Transport, options: ConnectionOptions) -> Transport:
    """Returns the transport with which a group goes on: one that seals messages if there is a secret. A collective.

    Args:
        transport: new, without a message; it gets its further connections here, and is closed after an error.
        options: with a secret on all ranks or on none.

    Raises:
        ConfigMismatchError: only some ranks have a secret, or they differ in their number of connections.
        TransportError: a rank has another secret or does not answer, or a greeting was altered.
        ValueError, OSError: the secret cannot be read.

    Example:
        >>> import tempfile
        >>> import torch.distributed as dist
        >>> from qcomm.transport.gloo import GlooTransport
        >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
        >>> type(secure(GlooTransport(dist.group.WORLD), PLAIN)).__name__  # there is nobody to greet
        'GlooTransport'
        >>> dist.destroy_process_group()
    """
    if transport.world_size == 1:
        return transport
    with ExitStack() as stack:
        stack.callback(transport.close)
        if options.secret is None:
            _exchange(transport, options, NO_KEY)
            secured = transport
        else:
            secured = _seal(transport, options.secret, options)
        if options.connections == AUTO:
            secured.widen(agree_on_connections(secured))
        stack.pop_all()
        return secured


def _seal(transport: Transport, secret: KeyFile, options: ConnectionOptions) -> Transport:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    secret.read()  # before the others wait for a proof
    private = X25519PrivateKey.generate()
    public_keys = _exchange(transport, options, private.public_key().public_bytes_raw())
    directions = _agree(transport, private, public_keys, secret)
    strangers = [peer for peer in transport.peers if peer not in directions]
    if not strangers:
        sending, receiving = ({peer: pair[way] for peer, pair in directions.items()} for way in range(2))
        sealed = SealedTransport(transport, sending, receiving)
        proof = sealed.start_exchange([torch.zeros(1, dtype=torch.uint8, device="cpu")] * transport.world_size)
        strangers = sealed.finish_and_open(proof.transfers, "waiting for the proof of the secret", proof.broken)
        if not strangers:
            return sealed
    names = ", ".join(str(transport.ranks[rank]) for rank in strangers)
    raise TransportError(
        f"rank {transport.ranks[transport.rank]}: rank(s) {names} did not prove to have the same secret: give every "
        "rank a copy of one key file. If they have one, somebody alters messages on the way"
    )


def _exchange(transport: Transport, options: ConnectionOptions, public_key: bytes) -> list[bytes]:
    """Greets all ranks and makes a named number of connections; returns each rank's public key."""
    has_secret = options.secret is not None
    connections = AUTOMATIC if options.connections == AUTO else int(options.connections or 1)
    words = GREETING.pack(MAGIC, has_secret, public_key, connections)
    message = torch.frombuffer(bytearray(words + CHECKSUM.pack(zlib.crc32(words))), dtype=torch.uint8)
    received = transport.exchange_small([message] * transport.world_size, "waiting for the greetings")
    found: list[tuple[bool, int, bytes]] = []
    for rank, greeting in zip(transport.ranks, received, strict=True):
        data = bytes(greeting.tolist())
        magic, has, key, count = GREETING.unpack_from(data)
        (checksum,) = CHECKSUM.unpack_from(data, GREETING.size)
        if magic != MAGIC or has not in (0, 1) or checksum != zlib.crc32(data[: GREETING.size]):
            raise TransportError(
                f"rank {transport.ranks[transport.rank]}: the greeting of rank {rank} was damaged, or that rank runs "
                "another version of qcomm"
            )
        found.append((bool(has), count, key))
    _check_alike(transport, [has for has, _, _ in found], has_secret)
    _check_connections(transport, [count for _, count, _ in found])
    if connections != AUTOMATIC:
        transport.widen(connections)
    return [key for _, _, key in found]


def _check_alike(transport: Transport, found: Sequence[bool], has_secret: bool) -> None:
    others = [str(rank) for rank, has in zip(transport.ranks, found, strict=True) if has != has_secret]
    if others:
        mine, theirs = ("has one", "have none") if has_secret else ("has none", "have one")
        raise ConfigMismatchError(
            f"ranks are configured differently in secret: rank {transport.ranks[transport.rank]} {mine}, rank(s) "
            f"{', '.join(others)} {theirs}. Every rank must pass a copy of one key file, or none"
        )


def _check_connections(transport: Transport, found: Sequence[int]) -> None:
    mine = found[transport.rank]
    for rank, count in zip(transport.ranks, found, strict=True):
        if count != mine:
            raise ConfigMismatchError(
                f"ranks are configured differently in connections: rank {transport.ranks[transport.rank]} has "
                f"{mine or AUTO}, rank {rank} has {count or AUTO}"
            )


def _agree(
    transport: Transport, private: Any, public_keys: Sequence[bytes], secret: KeyFile
) -> dict[int, tuple[Direction, Direction]]:
    """Returns the directions to and from each rank, without those whose public keys are none.

    Keys and secret are variables of this function, in which no error is raised after it has read the secret.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    material, directions, rank = secret.read(), {}, transport.rank
    for peer in transport.peers:
        try:
            shared = private.exchange(X25519PublicKey.from_public_bytes(public_keys[peer]))
        except ValueError:  # a point with which everybody gets the same result
            continue
        lower, higher = min(rank, peer), max(rank, peer)
        info = LABEL + RANKS.pack(transport.world_size, lower, higher) + public_keys[lower] + public_keys[higher]
        keys = HKDF(algorithm=SHA256(), length=2 * KEY_BYTES, salt=None, info=info).derive(shared + material)
        upward, downward = Direction(keys[:KEY_BYTES]), Direction(keys[KEY_BYTES:])
        directions[peer] = (upward, downward) if rank == lower else (downward, upward)
    return directions
