"""Faults: an error of one rank in a collective, kept so that all ranks can be told of it."""

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple, ParamSpec, TypeVar

from qcomm.errors import CollectiveError

__all__ = ["Fault", "LateFaultError", "Phase", "attempt"]

P = ParamSpec("P")
T = TypeVar("T")


class Phase(IntEnum):
    """The work of a rank when it failed.

    In a header it is also the work that the rank has just finished. The first headers of every strategy say ENCODE.
    Ranks that are about to do different things therefore find out there.
    """

    PREPARE = 1  # checking the arguments, computing the layout
    ENCODE = 2
    REDUCE = 3  # decoding the others' packets of the own chunk, encoding their mean
    DECODE = 4  # decoding the means
    MEASURE = 5  # before ranks agree on a shared grid
    QUANTIZE = 6  # on that grid
    NODE = 7  # adding the values of a node, encoding their sum

    def __str__(self) -> str:
        texts = {
            Phase.PREPARE: "preparing the exchange",
            Phase.ENCODE: "compressing its values",
            Phase.REDUCE: "averaging its chunk",
            Phase.DECODE: "decoding the result",
            Phase.MEASURE: "measuring its values",
            Phase.QUANTIZE: "quantizing its values on the shared grid",
            Phase.NODE: "adding and compressing its node's values",
        }
        return texts[self]


class Fault(NamedTuple):
    """An exception that keeps this rank from going on, and the phase in which it was raised."""

    phase: Phase
    error: Exception


class LateFaultError(CollectiveError):
    """This rank failed after its last message. The others went on and learn of it in the next collective."""


def attempt(phase: Phase, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T | None, Fault | None]:
    """Runs a step of this rank; keeps its error, which the other ranks must learn before they wait for its packets."""
    try:
        return step(*args, **kwargs), None
    except Exception as error:  # noqa: BLE001 - any: it is raised again, on every rank, by the next exchange
        return None, Fault(phase, error)
