"""Transports of several ranks in one process, and whoever sits on the wires between them."""

import queue
import threading
from datetime import timedelta

import torch

from qcomm.transport import Transfer, Transport

SECONDS = 10.0  # most that a rank waits for another


class Wires:
    """Carries messages as bytes. ``meddle``, if set, replaces those from one rank to another before they arrive.

    Attributes:
        carried: what was sent, as (source, target, tag, bytes).
        failed: ranks that left because of a fault of their own.
        meddle: called with the same four; returns the messages that arrive in its place.
    """

    def __init__(self):
        self.carried, self.meddle, self.failed = [], None, []
        self._queues, self._closed = {}, set()
        self._lock = threading.Lock()

    def put(self, source, target, tag, data):
        self.carried.append((source, target, tag, data))
        for message in [data] if self.meddle is None else self.meddle(source, target, tag, data):
            self.queue_of(source, target, tag).put(message)

    def queue_of(self, source, target, tag):
        with self._lock:
            ends = source, target, tag
            if ends not in self._queues:
                self._queues[ends] = queue.SimpleQueue()
                if source in self._closed:
                    self._queues[ends].put(None)
            return self._queues[ends]

    def close(self, source):
        """Wakes those who wait for a rank."""
        with self._lock:
            self._closed.add(source)
            for ends, waiting in self._queues.items():
                if ends[0] == source:
                    waiting.put(None)


class WiredTransport(Transport):
    """A rank's end of the wires. A message fills the front of its buffer, and leaves the rest, as gloo does."""

    def __init__(self, wires, rank, world_size):
        super().__init__([10 + other for other in range(world_size)], rank, timedelta(seconds=SECONDS))
        self._wires, self._is_closed = wires, False

    @property
    def is_closed(self):
        return self._is_closed

    def start_send(self, target, message, tag):
        self._wires.put(self.rank, target, tag, bytes(message.view(torch.uint8).tolist()))
        return Transfer(target, None)

    def start_receive(self, source, buffer, tag):
        buffer.view(torch.uint8).fill_(0xAB)  # not memory of this process that held the message before it was sent
        return Transfer(source, (self._wires.queue_of(source, self.rank, tag), buffer))

    def _wait(self, transfers):
        failures = []
        for rank, work in transfers:
            if work is None:
                continue
            waiting, buffer = work
            try:
                data = waiting.get(timeout=SECONDS)
            except queue.Empty:
                data = None
            if data is None:
                failures.append((rank, RuntimeError("nothing came")))
                continue
            buffer.view(torch.uint8)[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        return failures

    def _blame(self, lost):
        self.blamed = set(lost)
        return lost

    def abandon(self, transfers):
        self.close()

    def cancel(self, transfers):
        raise AssertionError("nothing is posted ahead")

    def sum(self, buffers, what):
        raise AssertionError("a sum would travel open")

    def close(self):
        self._is_closed = True
        self._wires.close(self.rank)

    def fail(self):
        self._wires.failed.append(self.rank)
        self.close()


def on_all_ranks(world_size, act, wires=None):
    """What ``act(transport)`` returns or raises on each rank, all at once."""
    wires = Wires() if wires is None else wires
    results = [None] * world_size

    def run(rank):
        try:
            results[rank] = act(WiredTransport(wires, rank, world_size))
        except (RuntimeError, ValueError, OSError) as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
