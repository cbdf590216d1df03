"""Training runs under faults and restarts, each beside an undisturbed run of the same seed: the parent's side."""

import os
import random
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path

from ranks import about, write
from soak_cases import POINTS, draw
from soak_training import Job
from soak_worlds import EXIT_SECONDS, Template, World

STRATEGIES = ("two_phase", "all_gather", "exact_sum", "hierarchical", "none", "bf16")
KINDS = (
    "kill",
    "kill",
    "stop",
    "delay",
    "delay",
    "packet",
    "packet",
    "mean",
    "exception",
    "exception",
    "memory",
    "disk",
)
STEPS = 120
SILENCE_SECONDS = 90.0  # between two messages of a world


@dataclass
class Run:
    """What became of a job, over all of its restarts."""

    accuracy: float = 0.0
    weights: str = ""
    restarts: int = 0
    redone: int = 0
    lost: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    growth: list[dict[str, float]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


class Supervisor:
    """Starts worlds anew where a process is gone, as a launcher does."""

    def __init__(self, template):
        self._template = template
        self._worlds = {}

    def run(self, job, size):
        run, done, left = Run(), 0, {fault.step: fault for fault in job.faults}
        while True:
            world = self._worlds.get(size)
            if world is None:
                world = self._worlds[size] = World("gloo", size, self._template)
            world._tell(("train", replace(job, faults=tuple(left.values()))))
            resumed = done
            done, ended = self._watch(world, run, left, done)
            if len(ended) == size and not any(end.lost for end in ended.values()):
                run.redone += max(end.redone for end in ended.values())
                run.accuracy = ended[0].accuracy
                run.weights = ended[0].weights
                if len({end.weights for end in ended.values()}) > 1:
                    run.violations.append("silent divergence: ranks end with different weights")
                return run
            run.redone += max((end.redone for end in ended.values()), default=0) + 1
            run.restarts += 1
            if trouble := self._renew(size, ended):
                run.violations.append(trouble)
            if run.restarts > 2 * len(job.faults) + 2 or (done == resumed and not left):
                run.violations.append("the run does not get on")
                return run

    def _watch(self, world, run, left, done):
        """(steps done, what ranks said in the end)"""
        waiting = {world.connections[rank]: rank for rank in range(world.size)}
        ended, first, begun = {}, {}, False
        while waiting:
            ready = wait(list(waiting), SILENCE_SECONDS)
            if not ready:
                world._dump(list(waiting.values()))
                run.violations.append(f"hang: rank(s) {sorted(waiting.values())}: {world.log()}")
                break
            for connection in ready:
                rank = waiting[connection]
                try:
                    word, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    del waiting[connection]
                    continue
                if word == "step":
                    if not begun and value != done + 1:
                        run.lost += abs(done + 1 - value)
                        run.violations.append(f"{done} steps were done, and the next one is {value}")
                    done, begun = value, True
                elif word == "sample":
                    self._sample(run, first, rank, value)
                elif word == "done":
                    ended[rank] = value
                    del waiting[connection]
                else:
                    self._act(world, run, left, rank, value)
            for step in [step for step in left if step < done]:
                fault = left.pop(step)
                run.faults[fault.kind] = run.faults.get(fault.kind, 0) + 1
        return done, ended

    def _act(self, world, run, left, rank, number):
        """Does to a rank what its fault is about, at the point that it has reached."""
        fault = next(fault for fault in left.values() if fault.number == number)
        if fault.kind == "kill":
            del left[fault.step]
            run.faults["kill"] = run.faults.get("kill", 0) + 1
            os.kill(world.pids[rank], signal.SIGKILL)
            return
        if fault.kind == "stop":
            os.kill(world.pids[rank], signal.SIGSTOP)
        world._tell("go", [rank])
        threading.Event().wait(fault.seconds)  # the fault itself
        os.kill(world.pids[rank], signal.SIGCONT)

    def _sample(self, run, first, rank, report):
        now = {"descriptors": report.descriptors, "threads": report.threads, "rss_mib": report.rss_kib / 1024}
        begin = first.setdefault(rank, now)
        run.growth.append({name: now[name] - begin[name] for name in now})

    def _renew(self, size, ended):
        """Ends what is left of a world; the ranks that survived have to end by themselves."""
        world = self._worlds.pop(size)
        world._tell(None, list(ended))
        trouble = ""
        for rank in ended:
            if not world._ended(rank, EXIT_SECONDS):
                world._dump([rank])
                trouble = f"hang: rank {rank} does not end after an error: {world.log()}"
            elif code := self._template.exit_code(world.pids.pop(rank)):
                trouble = f"abort: rank {rank} ended with {code}: {world.log()}"
        world.is_usable = False
        world.close()
        return trouble

    def close(self):
        return [trouble for world in self._worlds.values() if (trouble := world.close())]


def plan(seed, number, timeout):
    """(a job without its folder, the number of ranks) of a run; it follows from the seed and the number."""
    dice = random.Random(f"{seed}/run {number}")
    strategy, size = STRATEGIES[number % len(STRATEGIES)], dice.choice((2, 3, 4))
    steps = sorted(dice.sample(range(5, STEPS - 5), len(KINDS)))
    kinds = list(KINDS)
    dice.shuffle(kinds)
    faults = []
    for step, kind in zip(steps, kinds, strict=True):
        if kind == "mean" and strategy in ("two_phase", "all_gather"):
            kind = "packet"  # noqa: PLW2901 - their means are not added on the way
        fault = draw(seed, 1000 * number + step, timeout, ["gloo"])
        seconds = {"stop": 1.3 * timeout, "delay": 0.3 * timeout * dice.random()}.get(kind, 0.0)
        error = dice.choice(("ZeroDivisionError", "RuntimeError")) if kind == "exception" else "MemoryError"
        points = POINTS.get(kind, "any")
        faults.append(
            replace(fault, kind=kind, step=step, rank=dice.randrange(size), points=points, seconds=seconds, error=error)
        )
    return Job(10 * seed + number, strategy, STEPS, "", tuple(faults), timeout), size


def soak(arguments):
    begin, pairs, violations = time.monotonic(), [], []
    print(f"seed {arguments.seed}", flush=True)
    template = Template()
    supervisor = Supervisor(template)
    folder = Path(tempfile.mkdtemp(prefix="qcomm-soak-runs-"))
    numbers = [arguments.only] if arguments.only is not None else range(10_000)
    try:
        for number in numbers:
            if pairs and time.monotonic() - begin > 60 * arguments.minutes:
                break
            job, size = plan(arguments.seed, number, arguments.timeout)
            runs = [
                supervisor.run(replace(job, folder=str(folder / f"{number}-{kind}"), faults=faults), size)
                for kind, faults in (("undisturbed", ()), ("disturbed", job.faults))
            ]
            calm, run = runs
            pairs.append({"number": number, "strategy": job.strategy, "ranks": size, "calm": calm, "run": run})
            print(
                f"run {number}: {job.strategy} on {size} ranks, {sum(run.faults.values())} faults, {run.restarts} "
                f"restarts, {run.redone} steps run again, {run.lost} lost; accuracy {run.accuracy:.4f}, undisturbed "
                f"{calm.accuracy:.4f}, weights {'equal' if run.weights == calm.weights else 'differ'}",
                flush=True,
            )
            for sentence in calm.violations + run.violations:
                violations.append({"run": number, "sentence": sentence})
                again = f"python tests/soak.py --minutes 1 --seed {arguments.seed} --only {number}"
                print(f"VIOLATION, run {number}: {sentence}\n  again: {again}", flush=True)
    finally:
        violations += [{"run": None, "sentence": trouble} for trouble in supervisor.close()]
        template.close()
        shutil.rmtree(folder)
    summary = summarize(pairs)
    print(", ".join(f"{name} {value}" for name, value in summary.items()))
    if arguments.json is not None:
        document = {
            "about": about(command=shlex.join(["python", *sys.argv])),
            "seed": arguments.seed,
            "minutes": round((time.monotonic() - begin) / 60, 1),
            "steps_of_a_run": STEPS,
            **summary,
            "violations": violations,
            "runs": [
                {
                    **{name: pair[name] for name in ("number", "strategy", "ranks")},
                    "undisturbed_accuracy": pair["calm"].accuracy,
                    "same_weights": pair["calm"].weights == pair["run"].weights,
                    **{k: v for k, v in asdict(pair["run"]).items() if k not in ("growth", "weights", "violations")},
                }
                for pair in pairs
            ],
        }
        write(arguments.json, document)
    return 1 if violations else 0


def summarize(pairs):
    """The numbers that the soak is about."""
    runs, calm = [pair["run"] for pair in pairs], [pair["calm"] for pair in pairs]
    growth = [entry for run in runs + calm for entry in run.growth]
    differences = [run.accuracy - other.accuracy for run, other in zip(runs, calm, strict=True)]
    spread = statistics.stdev(other.accuracy for other in calm) if len(calm) > 1 else 0.0
    return {
        "runs": len(runs),
        "faults": sum(sum(run.faults.values()) for run in runs),
        "restarts": sum(run.restarts for run in runs),
        "steps_run_again": sum(run.redone for run in runs),
        "steps_lost_beyond": sum(run.lost for run in runs),
        "accuracy_undisturbed": round(statistics.fmean(other.accuracy for other in calm), 4),
        "accuracy_disturbed": round(statistics.fmean(run.accuracy for run in runs), 4),
        "spread_undisturbed": round(spread, 4),
        "largest_difference_of_a_pair": round(max(map(abs, differences)), 4),
        "pairs_with_the_same_weights": sum(run.weights == other.weights for run, other in zip(runs, calm, strict=True)),
        "largest_growth_of_a_process": {
            name: round(max((entry[name] for entry in growth), default=0), 1)
            for name in ("descriptors", "threads", "rss_mib")
        },
    }
