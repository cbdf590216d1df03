"""Faults of tests/soak.py: what happens when, and the rule by which its outcome is right, written before it runs.

A case follows from the seed and its number alone, so one fault can be run again by itself.
"""

import random
import re
from dataclasses import dataclass, field, replace

STRATEGIES = ("two_phase", "all_gather", "exact_sum", "hierarchical", "none", "bf16", "auto")
UNCOMPRESSED = ("none", "bf16", "auto")  # they may bypass the handshake; "auto" mostly comes to do so here
ADDED_ON_THE_WAY = ("none", "bf16", "exact_sum", "hierarchical")  # their means are compared
BYPASSED = 31  # steps until ranks agree again
AGREED = 2  # steps before the first bypass

# Kinds and how often each is drawn, by transport: "link" is gloo between network namespaces, "sealed" gloo and
# "sealed-mpi" MPI with a secret. Under mpirun a killed rank ends the job, and a new one takes seconds.
WEIGHTS = {
    "gloo": {"kill": 12, "stop": 8, "delay": 12, "packet": 16, "mean": 12, "exception": 16, "memory": 12, "disk": 6},
    "link": {"outage": 3, "cut": 1},
    "mpi": {"kill": 2, "stop": 6, "delay": 12, "packet": 16, "mean": 10, "exception": 16, "memory": 12, "disk": 3},
}
WEIGHTS |= {"sealed": WEIGHTS["gloo"], "sealed-mpi": WEIGHTS["mpi"]}
TRANSPORTS = {"gloo": 62, "link": 12, "mpi": 10, "sealed": 12, "sealed-mpi": 4}
KEY_FILE = "key"  # of sealed messages, in the folder of a world
POINTS = {"exception": "codec", "packet": "send", "mean": "mean"}  # all others begin at any point
DEVIATIONS = {"none": 1e-4, "bf16": 3e-2, "auto": 1.2}  # of a mean from the exact one, by its norm; otherwise:
DEVIATION = 1.2  # a grid of two standard deviations in both phases, and no step before


def is_sealed(transport):
    return transport.startswith("sealed")


def is_mpi(transport):
    return transport.endswith("mpi")


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        number: with the seed it determines all others.
        kind, transport, world_size: of the fault, and of the world that has it.
        rank: that has it.
        step: in which it begins, counted from 0; ``steps`` are run.
        points, fraction: the class of points of that step, and which of them, from 0 to 1.
        seconds: that a delay or an outage takes.
        comes_back: whether a stopped rank is continued.
        place, bit: of a flipped bit, the place from 0 to 1.
        error: the type of an exception.
        fresh: whether the connections are new ones.
    """

    number: int
    kind: str
    transport: str
    world_size: int
    rank: int
    strategy: str
    step: int
    steps: int
    points: str
    fraction: float
    seconds: float
    comes_back: bool
    place: float
    bit: int
    error: str
    verify: str
    grid: float | None
    error_feedback: bool
    min_elements: int
    ranks_per_node: int | None
    slice_elements: int
    timeout: float
    fresh: bool = False

    @property
    def bypasses(self):
        """Whether later steps of its strategy go without a handshake; sealed ones never do."""
        return self.strategy in UNCOMPRESSED and self.verify != "step" and not is_sealed(self.transport)

    @property
    def may_bypass(self):
        """Whether the fault may fall in a step without a handshake, whose errors are gloo's own."""
        return self.bypasses and self.step >= AGREED

    @property
    def late(self):
        """Steps after which all ranks know at the latest."""
        return BYPASSED + 1 if self.bypasses else 1


def draw(seed, number, timeout, transports):
    """The case of a number."""
    dice = random.Random(f"{seed}/{number}")
    transport = dice.choices(transports, [TRANSPORTS[name] for name in transports])[0]
    kind = dice.choices(*zip(*WEIGHTS[transport].items(), strict=True))[0]
    world_size, strategy = dice.choice((2, 2, 3, 3, 4)), dice.choice(STRATEGIES)
    if kind == "mean":
        strategy = dice.choice(ADDED_ON_THE_WAY)
    step = dice.randrange(1, 5)
    may_bypass = strategy in UNCOMPRESSED and not is_sealed(transport)
    long = may_bypass and kind in ("packet", "mean", "exception", "memory")
    limit = {"delay": 0.3, "outage": 0.15}.get(kind, 0.0) * timeout
    return Case(
        number=number,
        kind=kind,
        transport=transport,
        world_size=world_size,
        rank=dice.randrange(world_size),
        strategy=strategy,
        step=step,
        steps=step + 4 + (BYPASSED if long else 0),
        points=POINTS.get(kind, "any"),
        fraction=dice.random(),
        seconds=dice.uniform(0.02, 1.0) * limit,
        comes_back=dice.random() < 0.5,
        place=dice.random(),
        bit=dice.randrange(8),
        error=dice.choice(("ZeroDivisionError", "RuntimeError")) if kind == "exception" else "MemoryError",
        verify=dice.choice(("interval", "interval", "step")),
        grid=dice.choice((1.0, 2.0, None)),
        error_feedback=dice.random() < 0.7,
        min_elements=dice.choice((0, 100, 1024)),
        ranks_per_node=dice.choice([n for n in (1, 2, 3, 4) if world_size % n == 0])
        if strategy == "hierarchical"
        else None,
        slice_elements=dice.choice((300, 1000, 1 << 18)),
        timeout=timeout,
    )


@dataclass
class StepReport:
    """A step on one rank: the digest of its gradients, or its error."""

    digest: str | None
    error: str | None
    text: str
    broken: bool
    seconds: float
    note: str = ""


@dataclass
class Report:
    """What became of a case on one rank."""

    steps: list[StepReport]
    fired: str | None
    deviation: float | None
    rss_kib: int
    threads: int
    descriptors: int


@dataclass
class Observed:
    """What the parent saw of a case.

    Attributes:
        reports: by rank; None of one that was killed, or has not come back.
        exits: of ranks that ended unasked, by rank.
        hung: ranks that did not come back in time.
        job: the exit code of mpirun, where it ended.
        checks: reports of the steps after the fault; empty where the world was given up.
        trouble: of the end of a world that was given up.
    """

    reports: list[Report | None]
    exits: dict[int, int] = field(default_factory=dict)
    hung: list[int] = field(default_factory=list)
    job: int | None = None
    checks: list[Report | None] = field(default_factory=list)
    trouble: str = ""


def judge(case, seen):
    """(outcome, violations): the outcome is a column of the table, and violations are sentences."""
    wrong = []
    if seen.hung:
        wrong.append(f"hang: rank(s) {seen.hung} did not come back")
    if seen.exits:
        wrong.append(f"abort: ranks ended by themselves, exit codes {seen.exits}")
    if seen.trouble:
        wrong.append(seen.trouble)
    if wrong:
        return "violation", wrong
    if case.kind == "kill" and is_mpi(case.transport):
        return ("job ended", []) if seen.job else ("violation", [f"mpirun ended with {seen.job} after a kill"])
    outcome, wrong = RULES[case.kind](case, seen)
    wrong += _divergence(case, seen) + _health(case, seen)
    return ("violation" if wrong else outcome), wrong


def _divergence(case, seen):
    """Ranks whose gradients differ, or of which only some have a step, have all heard of it soon after."""
    reports = {rank: report for rank, report in enumerate(seen.reports) if report is not None}
    errors = {rank: [n for n, step in enumerate(report.steps) if step.error] for rank, report in reports.items()}
    for number in range(case.steps):
        got = {rank: report.steps[number] for rank, report in reports.items() if number < len(report.steps)}
        digests = {step.digest for step in got.values()}
        if len(digests) < 2:
            continue
        for rank, at in errors.items():
            if not any(number <= n <= number + case.late for n in at):
                ends = len(reports[rank].steps) <= number + 1 and case.kind in ("kill", "stop", "cut")
                if not ends:
                    return [f"silent divergence: step {number} differs, and rank {rank} has errors in steps {at} only"]
    return []


def _health(case, seen):
    """After a fault that leaves the world alive, two steps are equal on all ranks and near the exact mean."""
    wrong = []
    for rank, report in enumerate(seen.checks):
        errors = [step.text for step in report.steps if step.error]
        if errors:
            wrong.append(f"the world did not recover: rank {rank}: {errors[0]}")
        elif not report.deviation <= DEVIATIONS.get(case.strategy, DEVIATION):
            wrong.append(
                f"wrong mean after the fault: it deviates by {report.deviation:.3g} of its norm on rank {rank}"
            )
    if len({tuple(step.digest for step in report.steps) for report in seen.checks}) > 1:
        wrong.append("silent divergence after the fault")
    return wrong


def errors_of(report):
    return [step for step in report.steps if step.error]


def first_errors(seen):
    """By rank, of those that reported: the first error or None."""
    found = {rank: errors_of(report) for rank, report in enumerate(seen.reports) if report is not None}
    return {rank: errors[0] if errors else None for rank, errors in found.items()}


def blamed(text):
    """Ranks that an error names as failed or missing."""
    named = {int(number) for number in re.findall(r"rank (\d+) failed", text)}
    for group in re.findall(r"no answer from rank\(s\) ([\d, ]+)", text):
        named |= {int(number) for number in group.replace(",", " ").split()}
    for group in re.findall(r"header of rank(?:\(s\))? ([\d, ]+)", text):
        named |= {int(number) for number in group.replace(",", " ").split()}
    return named


def _all_fail(case, seen, ranks, named=True):
    """Every rank of ``ranks`` has an error; with ``named`` one that names the faulty rank.

    A rank that is gone or silent announces nothing. In gloo's own sum nobody knows then which one it is.
    """
    first = first_errors(seen)
    silent = [rank for rank in ranks if rank in first and first[rank] is None]
    if silent:
        return "", [f"no error on rank(s) {silent}"]
    names = {rank: blamed(first[rank].text) for rank in ranks if rank in first}
    unnamed = [rank for rank, blame in names.items() if case.rank not in blame and rank != case.rank]
    if not unnamed:
        return "error, rank named", []
    if not named or case.may_bypass:
        return "error, no rank named", []
    return "", [f"rank(s) {unnamed} do not name rank {case.rank}: {first[unnamed[0]].text}"]


def _innocent(case, seen):
    """Nobody else is named where the faulty rank is gone."""
    for rank, error in first_errors(seen).items():
        others = blamed(error.text) - {case.rank} if error is not None and rank != case.rank else set()
        if others:
            return [f"rank {rank} blames rank(s) {sorted(others)} for rank {case.rank}: {error.text}"]
    return []


def of_kill(case, seen):
    others = [rank for rank in range(case.world_size) if rank != case.rank]
    outcome, wrong = _all_fail(case, seen, others, named=case.strategy not in UNCOMPRESSED)
    return outcome, wrong + _innocent(case, seen)


def of_stop(case, seen):
    others = [rank for rank in range(case.world_size) if rank != case.rank]
    # A rank that waits for the stopped one is silent, too. Where their timeouts end together, it is named in its place.
    outcome, wrong = _all_fail(case, seen, others, named=False)
    if case.comes_back and not wrong and first_errors(seen)[case.rank] is None:
        wrong.append(f"rank {case.rank} went on after it was stopped, without an error")
    return outcome, wrong


def of_cut(case, seen):
    return _all_fail(case, seen, range(case.world_size), named=False)


def of_delay(case, seen):
    for rank, error in first_errors(seen).items():
        if error is not None:
            return "", [f"a delay within the timeout is an error on rank {rank}: {error.text}"]
    return "no effect", []


def of_exception(case, seen):
    outcome, wrong = _all_fail(case, seen, range(case.world_size))
    own = first_errors(seen)[case.rank]
    if own is not None and "boom" not in own.text:
        wrong.append(f"rank {case.rank} does not say what it failed of: {own.text}")
    return outcome, wrong + _innocent(case, seen)


def of_packet(case, seen):
    first = first_errors(seen)
    if all(error is None for error in first.values()):
        fired = seen.reports[case.rank].fired or ""
        # With verify="step", too, damage that is no larger than what rounding may do.
        uncovered = "send of a sum" in fired
        if uncovered and not is_sealed(case.transport) and not _divergence(case, seen):
            return "same mean on all, as documented", []
        return "", [f"a flipped bit had no consequence: {fired}"]
    silent = [rank for rank, error in first.items() if error is None]
    if silent:
        return "", [f"a flipped bit is an error on some ranks, and none on {silent}"]
    return ("divergence named" if any(e.error == "DivergenceError" for e in first.values()) else "error on all"), []


def of_mean(case, seen):
    first = first_errors(seen)
    silent = [rank for rank, error in first.items() if error is None]
    if silent:
        return "", [f"a damaged mean is no error on rank(s) {silent}"]
    wrong = [f"not a DivergenceError: {error.text}" for error in first.values() if error.error != "DivergenceError"][:1]
    return "divergence named", wrong


def of_disk(case, seen):
    wrong = []
    for rank, report in enumerate(seen.reports):
        full, after = report.steps
        if full.error != "RecipeError" or f"rank {case.rank}" not in full.text:
            wrong.append(f"rank {rank} says of the full disk: {full.error} {full.text}")
        if full.note != "epoch-0001":
            wrong.append(f"after the full disk there are {full.note}")
        if after.error or after.note != "epoch-0003":
            wrong.append(f"the next checkpoint on rank {rank}: {after.text} {after.note}")
    return "error, rank named", wrong


RULES = {
    "kill": of_kill,
    "stop": of_stop,
    "cut": of_cut,
    "delay": of_delay,
    "outage": of_delay,
    "exception": of_exception,
    "memory": of_exception,
    "packet": of_packet,
    "mean": of_mean,
    "disk": of_disk,
}


def renewed(case):
    """The same with new connections."""
    return replace(case, fresh=True)
