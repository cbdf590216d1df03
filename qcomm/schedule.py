"""In which order a rank does the steps of a sliced collective, so that codec and network work at the same time.

::

    tick            0   1   2   3   4   5   6   7 ...
    encode slice    0   1   2   3   4   5   6   7
    reduce slice            0   1   2   3   4   5          what encode sent two ticks ago
    decode slice                    0   1   2   3          what reduce sent two ticks ago

Every message has two ticks to arrive while the rank computes, and a link that is slower than the codec always has one
more message to carry than the one it is at. The order is fixed, and so the same on all ranks: nobody has to find out
what has arrived, and no two ranks can wait for each other.
"""

from enum import Enum

__all__ = ["Step", "schedule"]

LAG = 2  # ticks between what sends a message and what needs it


class Step(Enum):
    """What a rank does with a slice."""

    ENCODE = "encode"
    REDUCE = "reduce"
    DECODE = "decode"


def schedule(slices: int) -> list[tuple[Step, int]]:
    """The steps of a collective of so many slices, in order.

    Example:
        >>> [f"{step.value} {number}" for step, number in schedule(2)]
        ['encode 0', 'encode 1', 'reduce 0', 'reduce 1', 'decode 0', 'decode 1']
    """
    ticks = range(slices + 2 * LAG)
    steps = [(step, tick - behind * LAG) for tick in ticks for behind, step in enumerate(Step)]
    return [(step, number) for step, number in steps if 0 <= number < slices]
