"""Points of a step at which a fault of tests/soak.py begins: calls of the codec and of the transport on this rank.

``install`` wraps the functions once in every rank. They count their calls and do nothing else until a fault is armed.
"""

import functools
import inspect
import sys
import threading
from collections import Counter

import qcomm
import qcomm.codec
from qcomm.collectives.rounds import Rounds
from qcomm.collectives.two_phase_steps import MeanSteps
from qcomm.collectives.uncompressed_values import UncompressedValues
from qcomm.transport.base import Transport
from qcomm.transport.gloo import GlooTransport
from qcomm.transport.mpi import MpiTransport
from qcomm.transport.sealed import Direction, SealedTransport

CODEC_FUNCTIONS = ("encode", "decode_into", "measure", "plan", "forecast_quantizer", "divide_to_bfloat")
CODEC_METHODS = (
    *((MeanSteps, name) for name in ("begin", "encode", "reduce", "encode_mean", "decode")),
    *((UncompressedValues, name) for name in ("load", "fingerprint", "store")),
)


class Points:
    """Counts the points that this rank passes, by their class: "codec", "send" (of a message), "mean", and "any".

    A message or a mean is at hand at a point of its class; a fault may return another message in its place.
    """

    def __init__(self):
        self.passed = Counter()
        self._lock = threading.Lock()
        self._due = self._kind = self._act = None

    def arm(self, kind, number, act):
        """Calls ``act(name, value)`` once, at the point ``number`` of a class, counted from now."""
        with self._lock:
            self._kind, self._due, self._act = kind, self.passed[kind] + number, act

    def disarm(self):
        with self._lock:
            self._act = None

    def reach(self, kinds, name, value=None):
        """Passes a point; returns the value, which a fault may have changed."""
        with self._lock:
            self.passed.update(kinds)
            act = self._act
            if act is None or self._kind not in kinds or self.passed[self._kind] < self._due:
                return value
            self._act = None
        changed = act(name, value)
        return value if changed is None else changed


POINTS = Points()
in_sum = threading.local()  # whether this thread's messages carry parts of sums, which have no checksum


def _before(owner, name, *kinds):
    """Makes a point of each call, before it."""
    original = getattr(owner, name)
    label = f"{getattr(owner, '__name__', '')}.{name}".removeprefix("qcomm.")

    @functools.wraps(original)
    def passing(*args, **keywords):
        POINTS.reach(kinds, label)
        return original(*args, **keywords)

    setattr(owner, name, passing)


def _of_sends(owner):
    original = owner.start_send

    @functools.wraps(original)
    def sending(self, target, message, tag):
        label = f"{owner.__name__}.{'send of a sum' if getattr(in_sum, 'now', False) else 'start_send'}"
        return original(self, target, POINTS.reach(("any", "send"), label, message), tag)

    owner.start_send = sending


def _of_sums(owner):
    original = owner.sum

    @functools.wraps(original)
    def summing(self, buffers, what):
        POINTS.reach(("any",), f"{owner.__name__}.sum")
        in_sum.now = True
        try:
            return original(self, buffers, what)
        finally:
            in_sum.now = False

    owner.sum = summing


def _of_means():
    bypassed, agreed = UncompressedValues.fingerprint, Rounds.note_mean

    @functools.wraps(bypassed)
    def of_bypassed(self, buffer):
        POINTS.reach(("mean",), "bypassed mean", buffer if self._rounded is None else self._rounded)
        return bypassed(self, buffer)

    @functools.wraps(agreed)
    def of_agreed(self):
        POINTS.reach(("mean",), "agreed mean", self.task.buffer)
        return agreed(self)

    UncompressedValues.fingerprint, Rounds.note_mean = of_bypassed, of_agreed


def install():
    """Wraps the functions in this process."""
    _of_means()
    for owner, name in CODEC_METHODS:
        _before(owner, name, "any", "codec")
    codec = {getattr(qcomm.codec, name): name for name in CODEC_FUNCTIONS}
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("qcomm.collectives."):
            for name, value in list(vars(module).items()):
                if inspect.isfunction(value) and value in codec:
                    _before(module, name, "any", "codec")
    _before(Transport, "finish", "any")
    for owner, name in ((SealedTransport, "sum"), (Direction, "seal"), (Direction, "open")):
        _before(owner, name, "any")
    for owner in (GlooTransport, MpiTransport):  # which carry sealed messages, too
        _before(owner, "start_receive", "any")
        _of_sends(owner)
        _of_sums(owner)
