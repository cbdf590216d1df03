"""One training step as a discrete-event simulation.

Backward, the codec, and the link run concurrently. Backward makes gradients; a full bucket's chains of work queue for
codec and link. Each of these serves one step at a time, first come, first served; a link that is shared serves all that
wait in turns. Where buckets have channels, one of a channel begins when the one before it on the channel has ended::

    backward  ████████████████░░████████████░░██████████        slower while others use the GPU
    codec             ▒▒      ▒▒  ▒▒      ▒▒         ▒▒
    link                ▓▓▓▓▓▓▓▓▓▓  ▓▓▓▓▓▓▓▓  ▓▓▓▓▓▓▓▓▓▓▓▓
                                                    |----|      exposed

Ranks differ only by chance. A collective waits for the slowest, so the step is that of the slowest of N ranks. Its
computing time is the largest of N draws from a normal distribution; the mean over its quantiles is reported.
"""

import heapq
import itertools
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import NamedTuple

from qcomm.planner.compute import ComputeTimes
from qcomm.planner.errors import PlanError
from qcomm.planner.methods import Chain, Work

__all__ = ["DRAWS", "Job", "Span", "Step", "chrome_trace", "mean_step", "simulate", "slowest_factors"]

# NCCL's kernels hold about a tenth of the GPU's processors while they run.
LINK_SHARE = 0.1
# Turns in which a step's work on a shared link is served, if it is of one chain.
TURNS = 256
# Number of simulated quantiles of the slowest rank's jitter.
DRAWS = 5


class Job(NamedTuple):
    """A bucket's work: its chains may begin after ``ready`` seconds of backward and ``delay`` more.

    With a ``channel``, they also wait for the end of the earlier jobs of that channel.
    """

    ready: float
    delay: float
    chains: Sequence[Chain]
    channel: int | None = None


class _Place(NamedTuple):
    """A step of a chain, the channel of its job, and the seconds of the step that have been served."""

    chain: Chain
    at: int
    channel: int | None
    served: float = 0.0

    @property
    def work(self) -> Work:
        return self.chain[self.at]

    @property
    def left(self) -> float:
        return self.work.seconds - self.served


class Span(NamedTuple):
    """An activity in a trace, in seconds from the beginning of the step."""

    lane: str
    label: str
    begin: float
    end: float


@dataclass(frozen=True)
class Step:
    """The times of a step, in seconds.

    Args:
        seconds: the whole step.
        exposed: from the end of backward until the last gradient is exchanged.
        link: busy time of the link.
        link_after: busy time of the link after backward.
        codec: busy time of the codec.
        spans: activities for a trace; empty in a mean.
    """

    seconds: float
    exposed: float
    link: float
    link_after: float
    codec: float
    spans: tuple[Span, ...] = ()

    @property
    def overlap(self) -> float:
        """Returns the share of the link's time that backward hides, 1 if the link is not used."""
        return max(0.0, 1 - self.link_after / self.link) if self.link > 0 else 1.0


def simulate(
    times: ComputeTimes,
    jobs: Sequence[Job],
    *,
    factor: float = 1.0,
    codec_share: float = 1.0,
    link_share: float = LINK_SHARE,
    shares_link: bool = False,
) -> Step:
    """Simulates one step of a rank whose computing takes ``factor`` times as long.

    Args:
        times: computing times.
        jobs: buckets in the order in which they become ready.
        factor: slowdown of the slowest rank.
        codec_share: share of the GPU that a busy codec takes from backward; 0 for a codec that runs elsewhere.
        link_share: share of the GPU that a busy link takes from backward.
        shares_link: whether chains share the link, as TCP's streams do.

    Example:
        >>> times = ComputeTimes(forward=1.0, ready=(1.0, 2.0))
        >>> send = (Work("link", 1.5, "all-reduce"),)
        >>> simulate(times, [Job(1.0, 0.0, [send]), Job(2.0, 0.0, [send])], link_share=0.0).seconds
        5.0
    """
    turn = math.inf
    if shares_link:
        works = [work for job in jobs for chain in job.chains for work in chain]
        turn = sum(work.seconds for work in works if work.resource == "link") / TURNS
    run = _Run(times.forward * factor, times.backward * factor, codec_share, link_share, turn)
    return run.all([job._replace(ready=job.ready * factor) for job in jobs])


class _Run:
    """The state of a simulated step."""

    def __init__(self, forward: float, backward: float, codec_share: float, link_share: float, turn: float) -> None:
        self.forward, self.backward = forward, backward
        self.turns = {"codec": math.inf, "link": turn}
        self.shares = {"codec": codec_share, "link": link_share}
        self.now, self.progress, self.backward_end = forward, 0.0, math.inf
        self.queues: dict[str, deque[_Place]] = {"codec": deque(), "link": deque()}
        self.working = {"codec": False, "link": False}
        self.busy = {"codec": 0.0, "link": 0.0}
        self.events: list[tuple[float, int, _Place]] = []
        self.waiting: dict[int, deque[Job]] = {}  # by channel; the first job is under way
        self.under_way: dict[int, int] = {}  # chains of that job
        self.order = itertools.count()
        self.spans = [Span("backward", "forward", 0.0, forward)]

    def all(self, jobs: Sequence[Job]) -> Step:
        coming = deque(jobs)
        while True:
            rate = max(0.0, 1 - sum(self.shares[name] for name, working in self.working.items() if working))
            # Jobs that wait for the end of backward may be a rounding error behind it.
            goal = min(coming[0].ready, self.backward) if coming else self.backward
            left = max(0.0, goal - self.progress)
            ready = self.now + left / rate if rate > 0 else (self.now if left == 0 else math.inf)
            if self.backward_end < math.inf and not coming:
                ready = math.inf
            event = self.events[0][0] if self.events else math.inf
            if ready == event == math.inf:
                break
            if ready <= event:
                self.now, self.progress = ready, goal
                if self.progress >= self.backward and self.backward_end == math.inf:
                    self.backward_end = self.now
                if coming and self.progress >= min(coming[0].ready, self.backward):
                    self.arrive(coming.popleft())
            else:
                self.progress += rate * (event - self.now)
                self.now, _, place = heapq.heappop(self.events)
                if place.work.resource in self.working:
                    self.leave(place)
                else:
                    self.begin(place._replace(at=place.at + 1))
        self.spans.append(Span("backward", "backward", self.forward, self.backward_end))
        end, waited = max(self.now, self.backward_end), self.backward_end
        after = sum(
            span.end - max(span.begin, waited) for span in self.spans if span.lane == "link" and span.end > waited
        )
        return Step(end, end - waited, self.busy["link"], after, self.busy["codec"], tuple(self.spans))

    def arrive(self, job: Job) -> None:
        """Starts a job, unless an earlier one has its channel."""
        if job.channel is None or not job.chains:
            self.start(job)
            return
        queue = self.waiting.setdefault(job.channel, deque())
        queue.append(job)
        if len(queue) == 1:
            self.start(job)

    def start(self, job: Job) -> None:
        if job.channel is not None:
            self.under_way[job.channel] = len(job.chains)
        for chain in job.chains:
            delayed = (Work("wait", job.delay, "agree"), *chain) if job.delay > 0 else chain
            self.begin(_Place(delayed, 0, job.channel))

    def begin(self, place: _Place) -> None:
        """Queues a step of a chain; after its last one, the channel's next job may start."""
        if place.at == len(place.chain):
            self.end(place.channel)
        elif place.work.resource == "wait":
            heapq.heappush(self.events, (self.now + place.work.seconds, next(self.order), place))
        else:
            self.queues[place.work.resource].append(place)
            self.serve(place.work.resource)

    def end(self, channel: int | None) -> None:
        if channel is None:
            return
        self.under_way[channel] -= 1
        if self.under_way[channel] == 0:
            self.waiting[channel].popleft()
            if self.waiting[channel]:
                self.start(self.waiting[channel][0])

    def serve(self, resource: str) -> None:
        """Starts the next step in a queue, or its next turn, if the resource is idle."""
        if self.working[resource] or not self.queues[resource]:
            return
        place = self.queues[resource].popleft()
        self.working[resource] = True
        seconds = place.left if place.left <= 1.5 * self.turns[resource] else self.turns[resource]
        end = self.now + seconds
        self.busy[resource] += seconds
        self.spans.append(Span(resource, place.work.label, self.now, end))
        heapq.heappush(self.events, (end, next(self.order), place._replace(served=place.served + seconds)))

    def leave(self, place: _Place) -> None:
        """Ends a step's turn. If something is left of it, it waits behind all others for its next one."""
        resource = place.work.resource
        self.working[resource] = False
        if place.left > self.turns[resource] / 2:  # not what rounding left
            self.queues[resource].append(place)
            self.serve(resource)
        else:
            self.serve(resource)
            self.begin(place._replace(at=place.at + 1, served=0.0))


def slowest_factors(ranks: int, jitter: float, draws: int = DRAWS) -> list[float]:
    """Returns equally likely values of the slowest rank's computing time, as factors of the mean rank's.

    Args:
        ranks: number of ranks, of which the slowest counts.
        jitter: standard deviation of a rank's time, as a fraction of it.
        draws: number of values.

    Raises:
        PlanError: the jitter is not in [0, 0.5].

    Example:
        >>> [round(factor, 3) for factor in slowest_factors(1024, 0.01, draws=3)]
        [1.029, 1.032, 1.036]
    """
    if not 0 <= jitter <= 0.5:
        raise PlanError(f"straggler is {jitter}; it must be in 0..0.5, such as 0.01 for a deviation of 1 %")
    if jitter == 0:
        return [1.0]
    normal = NormalDist()
    # The largest of N is below x with the N-th power of one's probability.
    return [max(0.1, 1 + jitter * normal.inv_cdf(((i + 0.5) / draws) ** (1 / ranks))) for i in range(draws)]


def mean_step(steps: Sequence[Step]) -> Step:
    """Returns the mean of several steps, without spans."""
    return Step(
        seconds=fmean(step.seconds for step in steps),
        exposed=fmean(step.exposed for step in steps),
        link=fmean(step.link for step in steps),
        link_after=fmean(step.link_after for step in steps),
        codec=fmean(step.codec for step in steps),
    )


def chrome_trace(step: Step) -> str:
    """Returns a step's spans as JSON for chrome://tracing or Perfetto: one process, a thread per lane, microseconds."""
    lanes = {lane: number for number, lane in enumerate(("backward", "codec", "link"))}
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 0, "tid": number, "name": "thread_name", "args": {"name": lane}}
        for lane, number in lanes.items()
    ]
    for lane, label, begin, end in sorted(step.spans, key=lambda span: span.begin):
        events.append(
            {"ph": "X", "pid": 0, "tid": lanes[lane], "name": label, "ts": 1e6 * begin, "dur": 1e6 * (end - begin)}
        )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
