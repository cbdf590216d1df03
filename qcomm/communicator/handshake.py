"""Handshake: one header from each rank, with which a collective starts.

A header names the collective, reports the sender's fault if there is one, and announces the sizes of its packets.

The header goes from every rank to every other. All ranks see the same W headers, so all take the same decision. They go
on, or they tell each other the details and raise. A rank that failed therefore still sends its header, and no rank
waits for a packet that will not come. :mod:`qcomm.communicator.pipeline` reports faults between slices. Steps that
bypass the worker have no handshake, and on a device a bucket that all ranks know mostly has none.

A header is eight int64: ``MAGIC, sequence, phase, phase of the fault or 0, fingerprint of the configuration, bytes of
the packet for the receiver``, and nanoseconds of work and of waiting (:class:`Took`).
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch

from qcomm.communicator.faults import Fault, Phase
from qcomm.errors import CollectiveError, ConfigMismatchError
from qcomm.transport import Exchange, Traffic, Transport, TransportError

__all__ = ["MAGIC", "UNTIMED", "Agreed", "Fields", "Handshake", "Took", "agreed_time", "raise_faults"]

# "qcomm" and the version of this protocol. It distinguishes versions whose headers are equally long. gloo ends the
# process on messages that are longer than expected.
MAGIC = 0x71636F6D6D05
HEADER_WORDS = 8
# Details have a fixed size, which needs no announcement. It holds a dozen fields or the first lines of an error.
DETAIL_BYTES = 4096


# For error messages, made once.
_AFTER = {phase: f"after {phase}" for phase in Phase}


class Fields:
    """The configuration of one collective as text, field by field; it has to be equal on all ranks.

    Args:
        values: field names, the most informative first, and their values as text.

    Example:
        >>> a, b = Fields({"dtype": "float32"}), Fields({"dtype": "float64"})
        >>> a.fingerprint == b.fingerprint
        False
    """

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = dict(values)
        digest = hashlib.sha256(json.dumps(self.values).encode()).digest()
        self.fingerprint = int.from_bytes(digest[:8], "little", signed=True)

    def extended(self, name: str, value: str) -> "Fields":
        """Returns these fields and one more."""
        return Fields({**self.values, name: value})


class Took(NamedTuple):
    """Nanoseconds of one rank's last collective of a kind; zeros if there was none, or it failed.

    Attributes:
        work: all but the wait.
        wait: for the others' headers, once this rank had nothing else to do. The shortest wait of all ranks is that
            of the last rank to arrive, and it is the cost of the headers. Longer waits show that other ranks were late.
    """

    work: int = 0
    wait: int = 0


UNTIMED = Took()


def agreed_time(times: Sequence[Took]) -> int:
    """Returns the duration of a collective without the wait for late ranks: the longest work and the cost of headers.

    Example:
        >>> agreed_time([Took(work=50, wait=2), Took(work=40, wait=300)])
        52
    """
    if any(time.work <= 0 for time in times):
        return 0  # it failed on some rank
    return max(time.work for time in times) + min(time.wait for time in times)


class Agreed(NamedTuple):
    """The result of a handshake: no rank has a fault, and all run the same collective.

    Attributes:
        sizes: bytes of each rank's packet for this rank.
        traffic: bytes of the headers.
        last_time: nanoseconds of the last collective of this kind, the same on all ranks; 0 if it is unknown.
        waited: nanoseconds that this rank waited for headers.
    """

    sizes: list[int]
    traffic: Traffic
    last_time: int
    waited: int


class Handshake:
    """Headers of one exchange under way; :meth:`finish` checks that no rank has a fault and that all agree.

    A rank may compute in between, which hides their latency. That work must not need the agreement.

    Args:
        transport: of the communicator.
        sequence: number of the collective, counted alike on all ranks.
        phase: the one that was just finished.
        fields: of the collective.
        sizes: bytes of this rank's packet for each rank.
        limits: maximum number of bytes in a packet of each rank; 0 where nothing is expected.
        fault: of this rank, if it has one.
        own_time: of the last collective of this kind on this rank.

    Raises:
        TransportError: the connections of this rank are closed.
    """

    def __init__(
        self,
        transport: Transport,
        sequence: int,
        phase: Phase,
        fields: Fields,
        sizes: Sequence[int],
        limits: Sequence[int],
        fault: Fault | None,
        own_time: Took = UNTIMED,
    ) -> None:
        self._transport, self._phase, self._fields, self._limits, self._fault = transport, phase, fields, limits, fault
        code = fault.phase if fault else 0
        headers = [
            torch.tensor(
                [MAGIC, sequence, phase, code, fields.fingerprint, size, *own_time], dtype=torch.int64, device="cpu"
            )
            for size in sizes
        ]
        self._under_way: list[Exchange] = [transport.start_exchange(headers)]

    def finish(self) -> Agreed:
        """Waits for all headers; returns if no rank has a fault and all agree, and raises on every rank otherwise.

        Raises:
            CollectiveError: some rank has a fault.
            TransportError: a peer is gone, or its header is impossible.
            ConfigMismatchError: naming the fields that differ.
        """
        begin, transport = time.perf_counter_ns(), self._transport
        # A reference to a transfer, as in the traceback of a later error, keeps gloo's connections open.
        messages = transport.finish_exchange(self._under_way.pop(), _AFTER[self._phase])
        received = [header.tolist() for header in messages]
        if any(header[0] != MAGIC for header in received):
            raise ConfigMismatchError(
                f"ranks run incompatible versions of qcomm: {_by_value([hex(h[0]) for h in received], transport)}"
            )
        if any(header[1:3] != received[0][1:3] for header in received):
            raise TransportError(
                "ranks are in different collectives (number, phase): "
                + _by_value([str(header[1:3]) for header in received], transport)
            )
        faults = {rank: Phase(header[3]) for rank, header in enumerate(received) if header[3]}
        if faults:
            raise_faults(transport, faults, self._fault)
        if any(header[4] != received[0][4] for header in received):
            _raise_mismatch(transport, self._fields)
        incoming = [header[5] for header in received]
        for rank, (size, limit) in enumerate(zip(incoming, self._limits, strict=True)):
            if not (0 <= size <= limit and (size > 0) == (limit > 0)):
                # The others cannot know. Closing the connections tells them.
                raise TransportError(
                    f"rank {transport.ranks[rank]} announced a packet of {size} bytes, at most {limit} are possible "
                    "here"
                )
        traffic = HEADER_WORDS * 8 * (transport.world_size - 1)
        last_time = agreed_time([Took(*header[6:]) for header in received])
        return Agreed(incoming, Traffic(traffic, traffic), last_time, time.perf_counter_ns() - begin)


def raise_faults(transport: Transport, faults: Mapping[int, Phase], own: Fault | None) -> NoReturn:
    """Tells the others this rank's error and raises the errors of all ranks. A collective: all know ``faults``."""
    text = f"{type(own.error).__name__}: {own.error}" if own else ""
    details = _exchange_details(transport, {"fault": text})
    lines = [
        f"rank {transport.ranks[rank]} failed while {phase}: {details[rank]['fault']}" for rank, phase in faults.items()
    ]
    raise CollectiveError("; ".join(lines)) from (own.error if own else None)


def _raise_mismatch(transport: Transport, fields: Fields) -> None:
    details = _exchange_details(transport, fields.values)
    names = list(dict.fromkeys(name for values in details for name in values))
    lines = []
    for name in names:
        values = [values.get(name, "(absent)") for values in details]
        if len(set(values)) > 1:
            lines.append(f"{name}: {_by_value(values, transport)}")
    raise ConfigMismatchError(
        "ranks are configured differently in " + "; ".join(lines) + ". Every rank must pass the same"
    )


def _by_value(values: Sequence[str], transport: Transport) -> str:
    """Returns the ranks of each value, as 'a on rank 0, b on ranks 1 2'."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(transport.ranks[rank])
    return ", ".join(
        f"{value} on rank{'s' if len(ranks) > 1 else ''} {' '.join(map(str, ranks))}" for value, ranks in groups.items()
    )


def _cut(value: str, limit: int) -> str:
    """Returns at most ``limit`` characters and a digest, which differs between values that differ after the cut."""
    return value if len(value) <= limit else f"{value[:limit]}... ({hashlib.sha256(value.encode()).hexdigest()[:8]})"


def _exchange_details(transport: Transport, details: Mapping[str, str]) -> list[dict[str, str]]:
    limit, text = DETAIL_BYTES, json.dumps(dict(details)).encode()
    while len(text) > DETAIL_BYTES:
        limit //= 2
        text = json.dumps({name: _cut(value, limit) for name, value in details.items()}).encode()
    message = torch.frombuffer(bytearray(text.ljust(DETAIL_BYTES)), dtype=torch.uint8)
    received = transport.exchange_small([message] * transport.world_size, "telling what is wrong")
    return [json.loads(bytes(text.tolist())) for text in received]
