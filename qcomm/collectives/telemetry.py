"""Counters of the cost of a rank's collectives: bytes that crossed the network, bits per element, seconds."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from qcomm.codec import CHECKSUM_BYTES, DIMENSION_BYTES, PACKET_HEADER_BYTES, Quantizer, record_bytes
from qcomm.collectives.layout import BucketLayout, Chunk, TensorSpec
from qcomm.transport import Traffic

__all__ = ["Counters", "Event", "Telemetry"]

# (bucket index, event, seconds on time.perf_counter's clock)
Event = tuple[int, str, float]

# Purposes of bytes: the two phases, uncompressed values inside a node, headers that announce sizes and other small
# things.
TRAFFIC_KINDS = ("phase1", "phase2", "inside", "overhead")

# Bytes of a flat packet besides segments and values.
PACKET_BYTES = PACKET_HEADER_BYTES + DIMENSION_BYTES


@dataclass
class Counters:
    """Sums over collectives; :meth:`Telemetry.stats` shows the first group of names unchanged.

    "Phase 1" carries every rank's values to the owners of their chunks, or to all ranks if chunks have no owner.
    "Phase 2" carries the owners' means or sums to every rank.
    """

    steps: int = 0
    buckets: int = 0
    elements: int = 0
    elements_compressed: int = 0
    bytes_uncompressed: int = 0
    bytes_sent_phase1: int = 0
    bytes_sent_phase2: int = 0
    bytes_sent_inside: int = 0
    bytes_sent_overhead: int = 0
    bytes_received_phase1: int = 0
    bytes_received_phase2: int = 0
    bytes_received_inside: int = 0
    bytes_received_overhead: int = 0
    nonfinite_tensors: int = 0
    dropped_values: int = 0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    communication_seconds: float = 0.0
    wait_seconds: float = 0.0
    copy_seconds: float = 0.0
    # Packets of a phase, each counted once: a rank's values for the other owners, then the means of all owners.
    packet_bytes_phase1: int = 0
    packet_bytes_phase2: int = 0
    # Their bytes for uncompressed elements.
    raw_bytes_phase1: int = 0
    raw_bytes_phase2: int = 0
    # Elements in them, all and compressed.
    carried_phase1: int = 0
    carried_phase2: int = 0
    carried_compressed_phase1: int = 0
    carried_compressed_phase2: int = 0


@dataclass
class Telemetry:
    """Collects counters from the worker thread; may be read from any thread.

    Attributes:
        timeline: None, or a list that every event of every bucket is appended to.
        observer: None, or a function called with (bucket index, event) on the thread of the event. It must not raise.

    Each event marks the beginning of the step it names. "ready" comes on the calling thread. Then the worker thread
    has "encode", "exchange_1", "reduce", "exchange_2", ..., "decode" and "done", as far as the strategy has them.

    Of a bucket in slices all events but "ready" and "done" come once for each slice, in the order of
    :mod:`qcomm.collectives.two_phase_schedule`. "exchange_1" and "exchange_2" are then the waits for a slice's
    messages.

    With ``device_codec`` there are "ready", "launch" and "launched", on the calling thread. A bucket that bypasses the
    worker thread has "ready" and "exchange_1" on the calling thread and "done" on gloo's.
    """

    timeline: list[Event] | None = None
    observer: Callable[[int, str], None] | None = None
    _counters: Counters = field(default_factory=Counters)
    _tensors: dict[str, Quantizer] = field(default_factory=dict)
    _strategies: dict[int, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __getstate__(self) -> dict[str, Any]:
        """Returns counters, quantizers and strategies; locks and observers are not pickled."""
        with self._lock:
            tables = {"_tensors": dict(self._tensors), "_strategies": dict(self._strategies)}
            return {"_counters": replace(self._counters), **tables}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def mark(self, index: int, event: str) -> None:
        """Records an event of bucket ``index``."""
        if self.timeline is not None:
            self.timeline.append((index, event, time.perf_counter()))
        if self.observer is not None:
            self.observer(index, event)

    def add(self, **amounts: float) -> None:
        """Adds to counters by name."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._counters, name, getattr(self._counters, name) + amount)

    def add_traffic(self, kind: str, traffic: Traffic) -> None:
        """Counts bytes of ``kind``: one of TRAFFIC_KINDS."""
        self.add(**{f"bytes_sent_{kind}": traffic.sent, f"bytes_received_{kind}": traffic.received})

    def add_traffics(self, traffic: Mapping[str, Traffic]) -> None:
        """Counts bytes of several kinds."""
        sent = {f"bytes_sent_{kind}": amount.sent for kind, amount in traffic.items()}
        received = {f"bytes_received_{kind}": amount.received for kind, amount in traffic.items()}
        self.add(**sent, **received)

    @contextmanager
    def timed(self, counter: str) -> Iterator[None]:
        """Adds the seconds that the body takes, whether or not it raises."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(**{counter: time.perf_counter() - begin})

    def count_bucket(self, layout: BucketLayout, item_bytes: int, times: int = 1) -> None:
        """Counts a bucket that was averaged."""
        self.add(
            buckets=times,
            elements=times * layout.elements,
            elements_compressed=times * layout.compressed_elements,
            bytes_uncompressed=times * layout.elements * item_bytes,
        )

    def count_packets(self, phase: int, chunks: Sequence[Chunk], sizes: Sequence[int], dtype: torch.dtype) -> None:
        """Counts packets of a phase by the chunks they carry; ``dtype`` is that of a raw value."""
        raw = 0
        for chunk in chunks:
            if chunk.raw_count:
                raw += record_bytes(dtype) + CHECKSUM_BYTES + -(-chunk.raw_count * dtype.itemsize // 4) * 4
                raw += 0 if chunk.compressed_count else PACKET_BYTES
        self._count(phase, sum(sizes), raw, sum(c.count for c in chunks), sum(c.compressed_count for c in chunks))

    def count_two_phases(
        self,
        packets: Mapping[int, Sequence[tuple[Chunk, int]]],
        dtype: torch.dtype,
        quantizers: Sequence[tuple[TensorSpec, Quantizer]],
        nonfinite_tensors: int,
    ) -> None:
        """Counts a collective in two phases.

        Args:
            packets: by phase: the chunks that packets carried, and their sizes in bytes.
            dtype: of a raw value.
            quantizers: of each tensor.
            nonfinite_tensors: number of tensors that held NaN or infinity.
        """
        for phase, sized in packets.items():
            self.count_packets(phase, [chunk for chunk, _ in sized], [size for _, size in sized], dtype)
        with self._lock:
            self._tensors.update((p.key, quantizer) for tensor, quantizer in quantizers for p in tensor.parameters)
            self._counters.nonfinite_tensors += nonfinite_tensors

    def count_uncompressed(
        self, phase: int, layout: BucketLayout, item_bytes: int, more: int = 0, times: int = 1
    ) -> None:
        """Counts an uncompressed phase, which carries every element once.

        ``more`` is the number of additional bytes for raw elements.
        """
        elements, compressed = times * layout.elements, times * layout.compressed_elements
        raw = (elements - compressed) * item_bytes + times * more
        self._count(phase, elements * item_bytes + times * more, raw, elements, compressed)

    def _count(self, phase: int, packet_bytes: int, raw_bytes: int, carried: int, compressed: int) -> None:
        amounts = {"packet_bytes": packet_bytes, "raw_bytes": raw_bytes}
        amounts |= {"carried": carried, "carried_compressed": compressed}
        self.add(**{f"{name}_phase{phase}": amount for name, amount in amounts.items()})

    def note_strategy(self, index: int, strategy: str) -> None:
        """Records how bucket ``index`` was averaged last."""
        with self._lock:
            self._strategies[index] = strategy

    def strategies(self) -> set[str]:
        """Returns the strategies of the buckets' last means."""
        with self._lock:
            return set(self._strategies.values())

    def note_quantizer(self, tensor: TensorSpec, quantizer: Quantizer) -> None:
        """Records how a tensor was quantized last."""
        with self._lock:
            self._tensors.update((parameter.key, quantizer) for parameter in tensor.parameters)

    def stats(self) -> dict[str, Any]:
        """Returns all counters and the figures derived from them; see ``CompressionState.stats``."""
        with self._lock:
            counters = replace(self._counters)
            tensors, strategies = dict(self._tensors), dict(sorted(self._strategies.items()))
        shown = [f.name for f in fields(Counters)][: [f.name for f in fields(Counters)].index("packet_bytes_phase1")]
        bits = [
            _bits(packet_bytes, carried)
            for packet_bytes, carried in (
                (counters.packet_bytes_phase1, counters.carried_phase1),
                (counters.packet_bytes_phase2, counters.carried_phase2),
            )
        ]
        compressed = [
            _bits(counters.packet_bytes_phase1 - counters.raw_bytes_phase1, counters.carried_compressed_phase1),
            _bits(counters.packet_bytes_phase2 - counters.raw_bytes_phase2, counters.carried_compressed_phase2),
        ]
        return {
            **{name: getattr(counters, name) for name in shown},
            "bytes_sent": sum(getattr(counters, f"bytes_sent_{kind}") for kind in TRAFFIC_KINDS),
            "bytes_received": sum(getattr(counters, f"bytes_received_{kind}") for kind in TRAFFIC_KINDS),
            "bits_per_element": _mean_of_phases(bits),
            "bits_per_element_compressed": _mean_of_phases(compressed),
            "bits_per_element_phase1": compressed[0],
            "bits_per_element_phase2": compressed[1],
            "strategies": strategies,
            "tensors": {
                key: {
                    "grid": q.grid.name.lower(),
                    "coding": q.coding.name.lower(),
                    "num_bits": q.num_bits,
                    "step": q.step,
                }
                for key, q in tensors.items()
            },
        }

    def reset(self) -> None:
        """Sets all counters to zero."""
        with self._lock:
            self._counters = Counters()
            self._tensors = {}
            self._strategies = {}


def _bits(count_bytes: int, elements: int) -> float:
    return 8 * count_bytes / elements if elements else 0.0


def _mean_of_phases(bits: Sequence[float]) -> float:
    # In a world of one the first phase carries nothing.
    carried = [value for value in bits if value]
    return sum(carried) / len(carried) if carried else 0.0
