"""The timing of bench_codec.py: everything in turns, so that a busy neighbour slows all that is compared alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Key = tuple[str, str]  # codec, stage
Times = dict[Key, list[float]]  # seconds of this thread's CPU, one of each round


@dataclass(frozen=True)
class Spread:
    """Median, p10 and p90."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Spread":
        """Of at least one sample."""
        ordered = sorted(samples)
        tail = len(ordered) // 10
        return cls(statistics.median(ordered), ordered[tail], ordered[-1 - tail])


def in_turns(functions: dict[Key, Callable[[], object]], rounds: int) -> Times:
    """Calls all functions in each of ``rounds`` rounds; a round before them does not count."""
    times: Times = {key: [] for key in functions}
    for turn in range(rounds + 1):
        for key, function in functions.items():
            begin = time.thread_time()
            function()
            seconds = time.thread_time() - begin
            if turn > 0:
                times[key].append(seconds)
    return times


def fastest(times: Times, codec: str, stage: str) -> Key | None:
    """The key with the least median among codecs and stages whose names begin so."""
    found = [key for key in times if key[0].startswith(codec) and key[1].startswith(stage)]
    return min(found, key=lambda key: statistics.median(times[key]), default=None)


def quotient(dividend: Sequence[float], divisor: Sequence[float]) -> Spread:
    """Of two functions' times, round by round."""
    return Spread.of([a / b for a, b in zip(dividend, divisor, strict=True)])


def gb_per_s(nbytes: int, seconds: Sequence[float]) -> Spread:
    return Spread.of([nbytes / s / 1e9 for s in seconds])
