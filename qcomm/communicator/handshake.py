"""Handshake: one header from each rank, with which a collective starts.

A header names the collective, reports the sender's fault if there is one, and announces the sizes of its packets.

The header goes from every rank to every other. All ranks see the same W headers, so all take the same decision. They go
on, or they tell each other the details and raise. A rank that failed therefore still sends its header, and no rank
waits for a packet that will not come. :mod:`qcomm.communicator.pipeline` reports faults between slices. Steps that
bypass the worker have no handshake, and on a device a bucket that all ranks know mostly has none.

A rank need not wait for the others' headers before it sends its packet: the header says that a message follows. Where
ranks do not agree they take such messages, and drop them.

A header is eleven int64: ``MAGIC, sequence, phase, phase of the fault or 0, fingerprint of the configuration, bytes of
the packet for the receiver``, nanoseconds of work and of waiting (:class:`Took`), the fingerprint of the means that the
sender got since its last handshake (:class:`Means`), the number of messages that follow without an agreement, and a
checksum of the ten others (:func:`header_checksum`).
"""

import hashlib
import json
import struct
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

import torch

from qcomm.communicator.faults import Fault, Phase
from qcomm.errors import CollectiveError, ConfigMismatchError, DivergenceError
from qcomm.transport import MESSAGE_BYTES, Mail, Traffic, Transport, TransportError

__all__ = [
    "HEADER_BYTES",
    "MAGIC",
    "UNTIMED",
    "Agreed",
    "Fields",
    "Handshake",
    "Means",
    "Took",
    "agreed_time",
    "header_checksum",
    "raise_faults",
]

# "qcomm" and the version of this protocol. It distinguishes versions whose headers are equally long. gloo ends the
# process on messages that are longer than expected.
MAGIC = 0x71636F6D6D07
HEADER_WORDS = 11
HEADER_BYTES = 8 * HEADER_WORDS
# Details have a fixed size, which needs no announcement. It holds a dozen fields or the first lines of an error.
DETAIL_BYTES = 4096
# Fingerprints that fit, with their names.
MOST_MEANS = 32
# Messages that a rank sends behind a header without an agreement.
MOST_FOLLOWING = 2

# For error messages, made once.
_AFTER = {phase: f"after {phase}" for phase in Phase}


def header_checksum(words: Sequence[int]) -> int:
    """Returns the checksum of a header's other words: its last word, in this and all later versions.

    Example:
        >>> header_checksum([1, 2]) == header_checksum([1, 2 + 2**40])
        False
    """
    return zlib.crc32(struct.pack(f"<{len(words)}q", *words))


class Means:
    """Fingerprints of the means that this rank got since its last handshake, by collective.

    Example:
        >>> means = Means()
        >>> means.note("bucket 0, step 1", 17)
        >>> means.fingerprint == 0, means.take().values, means.fingerprint
        (False, {'bucket 0, step 1': 17}, 0)
    """

    def __init__(self, values: Mapping[str, int] | None = None) -> None:
        self.values = dict(values or {})

    def note(self, name: str, fingerprint: int) -> None:
        """Adds the mean of one collective."""
        self.values[name] = fingerprint

    def update(self, values: Mapping[str, int]) -> None:
        """Adds means that were got without the worker."""
        self.values.update(values)

    def take(self) -> "Means":
        """Returns the last of them, as many as details have room for, and forgets all."""
        taken, self.values = Means(dict([*self.values.items()][-MOST_MEANS:])), {}
        return taken

    @property
    def fingerprint(self) -> int:
        """Returns one number for all of them; 0 if there are none."""
        return Fields({name: str(value) for name, value in self.values.items()}).fingerprint if self.values else 0


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


NO_MEANS = Means()


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
        packets: of other ranks for this one, where packets travel with the headers; none of no bytes.
        traffic: bytes of the headers.
        last_time: nanoseconds of the last collective of this kind, the same on all ranks; 0 if it is unknown.
        waited: nanoseconds that this rank waited for headers.
    """

    sizes: list[int]
    packets: Mapping[int, torch.Tensor]
    traffic: Traffic
    last_time: int
    waited: int


class Handshake:
    """Headers of one exchange under way; :meth:`finish` checks that no rank has a fault and that all agree.

    A rank may compute in between, which hides their latency. That work must not need the agreement.

    Args:
        transport: of the communicator.
        mail: of the communicator.
        sequence: number of the collective, counted alike on all ranks.
        phase: the one that was just finished.
        fields: of the collective.
        sizes: bytes of this rank's packet for each rank.
        limits: maximum number of bytes in a packet of each rank; 0 where nothing is expected.
        fault: of this rank, if it has one.
        own_time: of the last collective of this kind on this rank.
        means: that this rank got since its last handshake.
        packets: for each rank, which travel with the headers; None where sizes are only announced.
        following: messages that the caller sends to each rank before :meth:`finish`, as it must.

    Raises:
        TransportError: the connections of this rank are closed.
    """

    def __init__(
        self,
        transport: Transport,
        mail: Mail,
        sequence: int,
        phase: Phase,
        fields: Fields,
        sizes: Sequence[int],
        limits: Sequence[int],
        fault: Fault | None,
        own_time: Took = UNTIMED,
        means: Means = NO_MEANS,
        packets: Sequence[torch.Tensor] | None = None,
        following: int = 0,
    ) -> None:
        self._transport, self._mail = transport, mail
        self._phase, self._fields, self._limits, self._fault = phase, fields, limits, fault
        self._means, self._carries, self._is_last = means, packets is not None, following == 0
        code, got = fault.phase if fault else 0, means.fingerprint
        begin = [MAGIC, sequence, phase, code, fields.fingerprint]
        self._headers = []
        for rank, size in enumerate(sizes):
            with_header = self._carries and rank != transport.rank and 0 < size <= MESSAGE_BYTES
            words = [*begin, size, *own_time, got, following + with_header]
            self._headers.append([*words, header_checksum(words)])
        mail.hold_tails()
        for target in transport.targets:
            mail.send(target, torch.tensor(self._headers[target], dtype=torch.int64, device="cpu").view(torch.uint8))
            if packets is not None and 0 < sizes[target] <= MESSAGE_BYTES:
                mail.send(target, packets[target])
            elif packets is not None and sizes[target]:
                mail.send_tail(target, packets[target])

    def finish(self) -> Agreed:
        """Waits for all headers; returns if no rank has a fault and all agree, and raises on every rank otherwise.

        Raises:
            CollectiveError: some rank has a fault.
            TransportError: a peer is gone, or its header is damaged or impossible.
            ConfigMismatchError: naming the fields that differ.
            DivergenceError: naming the collective whose means differ.
        """
        begin, transport = time.perf_counter_ns(), self._transport
        fronts = self._mail.take(_AFTER[self._phase])
        received = [
            self._headers[rank] if rank == transport.rank else fronts[rank][:HEADER_BYTES].view(torch.int64).tolist()
            for rank in range(transport.world_size)
        ]
        damaged = [
            transport.ranks[rank] for rank, header in enumerate(received) if header[-1] != header_checksum(header[:-1])
        ]
        if damaged:
            # The others cannot know. Closing the connections tells them.
            raise TransportError(
                f"rank {transport.ranks[transport.rank]}, {_AFTER[self._phase]}: the header of rank(s) "
                f"{', '.join(map(str, damaged))} was damaged on its way (wrong checksum)"
            )
        if any(header[0] != MAGIC for header in received):
            self._drop(received)
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
            self._drop(received)
            raise_faults(transport, faults, self._fault)
        if any(header[4] != received[0][4] for header in received):
            self._drop(received)
            _raise_mismatch(transport, self._fields)
        incoming = [header[5] for header in received]
        for rank, (size, limit) in enumerate(zip(incoming, self._limits, strict=True)):
            if not (0 <= size <= limit and (size > 0) == (limit > 0)):
                # The others cannot know. Closing the connections tells them.
                raise TransportError(
                    f"rank {transport.ranks[rank]} announced a packet of {size} bytes, at most {limit} are possible "
                    "here"
                )
        waited = time.perf_counter_ns() - begin
        if any(header[8] != received[0][8] for header in received):
            different = _difference(transport, self._means)
            if different is not None:
                self._drop(received)
                raise different
        traffic = HEADER_BYTES * (transport.world_size - 1)
        last_time = agreed_time([Took(*header[6:8]) for header in received])
        self._mail.release_tails(wanted=True)
        packets = self._take_packets(incoming) if self._carries else {}
        if self._is_last:
            self._mail.flush(_AFTER[self._phase])
        return Agreed(incoming, packets, Traffic(traffic, traffic), last_time, waited)

    def _take_packets(self, sizes: Sequence[int]) -> dict[int, torch.Tensor]:
        """Returns the other ranks' packets for this one."""
        what, peers = f"exchanging packets {_AFTER[self._phase]}", self._transport.sources
        taken = self._mail.take(what, [peer for peer in peers if 0 < sizes[peer] <= MESSAGE_BYTES])
        tails = self._mail.take_tails({peer: sizes[peer] for peer in peers if sizes[peer] > MESSAGE_BYTES}, what)
        return {source: packet[: sizes[source]] for source, packet in (taken | tails).items()}

    def _drop(self, received: Sequence[Sequence[int]]) -> None:
        """Takes the messages that ranks sent behind their headers, since they will not be used."""
        self._mail.release_tails(wanted=False)
        left = {rank: header[9] for rank, header in enumerate(received) if rank != self._transport.rank}
        if any(not 0 <= count <= MOST_FOLLOWING for count in left.values()):
            raise TransportError(f"ranks announced impossible numbers of messages: {sorted(left.values())}")
        while sources := [rank for rank in self._transport.sources if left[rank] > 0]:
            self._mail.take("dropping messages after a fault", sources)
            left = {rank: count - 1 for rank, count in left.items()}
        self._mail.flush("dropping messages after a fault")


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


def _difference(transport: Transport, own: Means) -> DivergenceError | None:
    """Returns an error on all ranks if some mean differs. A collective: all know that their fingerprints do.

    A mean that not all ranks tell of, as after an error, is not compared.
    """
    details = _exchange_details(transport, {name: f"{value:016x}" for name, value in own.values.items()})
    for name in own.values:
        values = [known.get(name) for known in details]
        if None not in values and len(set(values)) > 1:
            return DivergenceError(
                f"ranks got different means of {name}: {_by_value([str(value) for value in values], transport)} (their "
                "fingerprints). A value was damaged on its way or in memory. If they were used (verify='interval'), "
                "weights differ: resume from a checkpoint of an earlier step, or copy one rank's weights with "
                "qcomm.broadcast_parameters"
            )
    return None


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
