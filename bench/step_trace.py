"""Steps of training as a Chrome trace, for chrome://tracing or https://ui.perfetto.dev.

A process a rank, with rows for what the training thread does, exposed communication included; for what the exchange
does, where it tells (qcomm's worker thread: encode, exchange, reduce, decode); and for every bucket from ready to
done. Format: "Trace Event Format", Google, complete ("X"), instant ("i") and metadata ("M") events; microseconds.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from training import StepTimes

from qcomm.collectives.telemetry import Event

TRAINING, EXCHANGE, BUCKETS = 1, 2, 3  # rows; of the buckets, which overlap, the first


class RecordedStep(NamedTuple):
    """A step of one rank, times as they are on that rank's clock."""

    times: StepTimes
    timeline: list[Event]


def trace_events(rank: int, method: str, steps: Sequence[RecordedStep], zero: float) -> list[dict[str, Any]]:
    """A rank's events.

    Args:
        rank: becomes the process.
        method: of exchange, for its name.
        steps: in order.
        zero: the rank's clock when the trace begins; all ranks take theirs at one moment.
    """
    found: list[dict[str, Any]] = [_named("process_name", rank, 0, f"rank {rank}, {method}")]
    found += [_named("thread_name", rank, TRAINING, "training"), _named("thread_name", rank, EXCHANGE, "exchange")]
    buckets = {index for _, timeline in steps for index, _, _ in timeline}
    found += [_named("thread_name", rank, BUCKETS + index, f"bucket {index}") for index in sorted(buckets)]

    def span(row: int, name: str, begin: float, end: float, **arguments: object) -> None:
        times = {"ts": 1e6 * (begin - zero), "dur": 1e6 * (end - begin)}
        found.append({"name": name, "ph": "X", "pid": rank, "tid": row, **times, "args": arguments})

    for number, (times, timeline) in enumerate(steps):
        span(TRAINING, "forward", times.begin, times.forward, step=number)
        span(TRAINING, "backward", times.forward, times.ready, step=number)
        if times.backward > times.ready:
            span(TRAINING, "exposed communication", times.ready, times.backward, step=number)
        span(TRAINING, "optimizer", times.backward, times.end, step=number)
        ready = {index: at for index, event, at in timeline if event == "ready"}
        for index, at in ready.items():
            instant = {"name": f"bucket {index} ready", "ph": "i", "s": "t", "ts": 1e6 * (at - zero)}
            found.append({**instant, "pid": rank, "tid": TRAINING})
        for index, event, at in timeline:
            if event == "done":
                span(BUCKETS + index, f"bucket {index}", ready[index], at, step=number)
        # Each phase ends where the next one of the worker begins: it does one thing at a time.
        phases = [(index, event, at) for index, event, at in timeline if event != "ready"]
        for (index, event, at), (_, _, until) in pairwise(phases):
            if event != "done":
                span(EXCHANGE, event, at, until, bucket=index, step=number)
    return found


def _named(kind: str, rank: int, row: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": row, "args": {"name": name}}


def save_trace(path: Path, ranks: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Writes the events of all ranks."""
    events = [event for rank in ranks for event in rank]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")
