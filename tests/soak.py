"""Random faults in random steps: kills, stops, cut links, delays, flipped bits, exceptions, full disks.

    python tests/soak.py --faults 1000 --seed 7        # a table of kinds and outcomes; about 40 minutes on one core
    python tests/soak.py --seed 7 --only 123           # that one fault again
    python tests/soak.py --seconds 60                  # as many as fit, of a seed that is printed
    python tests/soak.py --transports sealed           # over this transport alone
    python tests/soak.py --seed 7 --kinds kill stop    # of those 1000, the faults of these kinds
    python tests/soak.py --minutes 30 --seed 7         # training runs under faults and restarts

Every fault has a rule for its outcome (tests/support/soak_cases.py). What breaks a rule is printed with the command
that runs this one fault again, and the exit status is 1. It is 1, too, where an error of the soak itself ends a lane,
or no fault was reached. Links are cut between network namespaces, which need root; ranks over MPI need mpirun, and
sealed messages the package cryptography. Without them the other faults run, and the reason is printed.
"""

import argparse
import queue
import random
import shlex
import signal
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "support"), str(HERE.parents[0] / "bench"), str(HERE.parents[0])]

from ranks import about, write  # noqa: E402
from soak_cases import RULES, TRANSPORTS, draw, judge  # noqa: E402
from soak_worlds import Links, Template, World, WorldError, available_transports  # noqa: E402

from qcomm.communicator import CHANNELS  # noqa: E402

LARGEST = 4  # world
MOST_RANKS = 9  # alive at a time: gloo's threads of those that wait for a fault take a processor's time, too
WINDOW = 100  # faults that are run in an order which lets worlds be used again
# More than after a world's first fault. Connections that have just ended may still be there, those of all channels.
MOST_DESCRIPTORS, MOST_THREADS = 16 * CHANNELS, 8 * CHANNELS


class Pool:
    """Worlds that wait for the next fault of their kind. One lane of the soak has one pool of up to ``ranks`` ranks."""

    def __init__(self, template, lab, ranks=MOST_RANKS):
        self._template, self._lab, self._ranks = template, lab, max(ranks, LARGEST)
        self._worlds = {}  # the last one was used last

    def run(self, case):
        """(what was seen, the world's log, growth, trouble with worlds that ended for it): of a case."""
        key = case.transport, case.world_size
        ended = "" if key in self._worlds else self._make_room(case.world_size)
        if key not in self._worlds:
            lab = self._lab if case.transport == "link" else None
            self._worlds[key] = World(case.transport, case.world_size, self._template, lab)
        world = self._worlds[key] = self._worlds.pop(key)
        seen = world.run(case)
        grown = _growth(world, seen)
        log = world.log()
        if not world.is_usable:
            del self._worlds[key]
            if trouble := world.close():
                seen.trouble = seen.trouble or trouble
        return seen, log, grown, ended

    def _make_room(self, ranks):
        """Ends the worlds that were used least recently; what went wrong with it."""
        troubles = []
        while self._worlds and sum(world.size for world in self._worlds.values()) + ranks > self._ranks:
            troubles.append(self._worlds.pop(next(iter(self._worlds))).close())
        return " ".join(filter(None, troubles))

    def close(self):
        return [trouble for world in self._worlds.values() if (trouble := world.close())]


def _growth(world, seen):
    """Descriptors, threads and MiB of the rank that has most more of them than after its first case."""
    now = {rank: report for rank, report in enumerate(seen.checks) if report is not None}
    if len(now) < world.size:
        return None
    if not world.first:
        world.first = now
        return None
    return {
        "cases": world.cases,
        "transport": world.transport,
        "descriptors": max(now[rank].descriptors - first.descriptors for rank, first in world.first.items()),
        "threads": max(now[rank].threads - first.threads for rank, first in world.first.items()),
        "rss_mib": max((now[rank].rss_kib - first.rss_kib) / 1024 for rank, first in world.first.items()),
    }


class Soak:
    """Draws cases, runs them in ``jobs`` lanes and keeps their outcomes."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.table = defaultdict(Counter)
        self.violations, self.growth = [], []
        self.transports, self.reasons = available_transports()
        if arguments.transports is not None:
            self.transports = [name for name in self.transports if name in arguments.transports]
        self._lock = threading.Lock()
        self._numbers = queue.SimpleQueue()
        self._begin = time.monotonic()
        for number in self._in_order([arguments.only] if arguments.only is not None else range(arguments.faults)):
            self._numbers.put(number)

    def _in_order(self, numbers):
        """Those of a kind of world one after the other, but in a limited time, which should see all kinds."""
        if self.arguments.kinds is not None:
            numbers = [number for number in numbers if self._draw(number).kind in self.arguments.kinds]
        window = WINDOW if self.arguments.seconds is None else 1
        for begin in range(0, len(numbers), window):
            yield from sorted(numbers[begin : begin + window], key=self._world_of)

    def _world_of(self, number):
        case = self._draw(number)
        return case.transport, case.world_size

    def _draw(self, number):
        return draw(self.arguments.seed, number, self.arguments.timeout, self.transports)

    def end_soon(self, *_):
        """Begins no further fault; worlds and namespaces are removed as at any end."""
        self.arguments.seconds = 0.0

    def run(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.end_soon)
        template = Template()
        with ThreadPoolExecutor(self.arguments.jobs) as lanes:
            ended = [lanes.submit(self._lane, template) for _ in range(self.arguments.jobs)]
        template.close()
        for error in (lane.exception() for lane in ended):
            if error is not None:
                self._violated("the end of a lane", "".join(traceback.format_exception(error)))
        return time.monotonic() - self._begin

    def _lane(self, template):
        if "link" not in self.transports:
            return self._run_lane(Pool(template, None, MOST_RANKS // self.arguments.jobs))
        with Links(LARGEST) as lab:
            return self._run_lane(Pool(template, lab, MOST_RANKS // self.arguments.jobs))

    def _run_lane(self, pool):
        try:
            while self.arguments.seconds is None or time.monotonic() - self._begin < self.arguments.seconds:
                try:
                    number = self._numbers.get_nowait()
                except queue.Empty:
                    break
                self._run_case(pool, number)
        finally:
            for trouble in pool.close():
                self._violated("the end of a world", trouble)

    def _run_case(self, pool, number):
        arguments = self.arguments
        case = self._draw(number)
        begin = time.monotonic()
        try:
            seen, log, grown, ended = pool.run(case)
        except WorldError as error:
            self._violated(f"fault {number} ({case.kind})", f"no world: {error}")
            return
        if ended:
            self._violated("the end of a world", ended)
        fired = any(report is not None and report.fired for report in seen.reports) or None in seen.reports
        outcome, wrong = judge(case, seen) if fired else ("not reached", [])
        if grown is not None and (grown["descriptors"] > MOST_DESCRIPTORS or grown["threads"] > MOST_THREADS):
            wrong.append(f"leak: after {grown['cases']} faults a rank has more than after its first one: {grown}")
        with self._lock:
            self.table[case.kind][outcome] += 1
            if grown is not None:
                self.growth.append(grown)
            if arguments.verbose or wrong:
                where = next((r.fired for r in seen.reports if r is not None and r.fired), None)
                print(
                    f"{number}: {case.kind} of rank {case.rank} of {case.world_size} ({case.transport}), "
                    f"{case.strategy}, step {case.step}, at {where}: {outcome} ({time.monotonic() - begin:.1f} s)"
                    + (f", growth {grown}" if arguments.verbose else ""),
                    flush=True,
                )
        for sentence in wrong:
            self._violated(f"fault {number} ({case.kind})", sentence, log if arguments.verbose else "")

    def _violated(self, what, sentence, log=""):
        again = [sys.executable, "tests/soak.py", "--seed", str(self.arguments.seed)]
        again += ["--only", what.split()[1]] if what.startswith("fault") else ["--faults", str(self.arguments.faults)]
        if self.arguments.transports is not None:
            again += ["--transports", *self.arguments.transports]
        with self._lock:
            self.violations.append({"what": what, "sentence": sentence, "again": shlex.join(again[1:])})
            print(f"VIOLATION, {what}: {sentence}\n  again: {shlex.join(again)}", flush=True)
            if log:
                print(log, flush=True)


def show(table):
    """Prints kinds and outcomes."""
    outcomes = sorted({outcome for counts in table.values() for outcome in counts})
    for kind, counts in sorted(table.items()):
        print(f"{kind:10}" + "".join(f"  {counts[name]:4} {name}" for name in outcomes if counts[name]))


def faults(arguments):
    soak = Soak(arguments)
    for reason in soak.reasons:
        print(reason)
    if not soak.transports:
        print(f"none of {arguments.transports} can run here")
        return 1
    print(f"seed {arguments.seed}", flush=True)
    seconds = soak.run()
    show(soak.table)
    count = sum(sum(counts.values()) for counts in soak.table.values())
    reached = count - sum(counts["not reached"] for counts in soak.table.values())
    grown = {
        name: max((entry[name] for entry in soak.growth), default=0) for name in ("descriptors", "threads", "rss_mib")
    }
    print(
        f"{count} faults, {reached} of them reached, in {seconds / 60:.1f} minutes, "
        f"{60 * count / seconds:.0f} a minute; "
        f"{len(soak.violations)} violations; largest growth of a rank: {grown['descriptors']} descriptors, "
        f"{grown['threads']} threads, {grown['rss_mib']:.1f} MiB"
    )
    if arguments.json is not None:
        document = {
            "about": about(command=shlex.join(["python", *sys.argv])),
            "seed": arguments.seed,
            "faults": count,
            "reached": reached,
            "seconds": round(seconds),
            "left_out": soak.reasons,
            "outcomes": {kind: dict(counts) for kind, counts in sorted(soak.table.items())},
            "violations": soak.violations,
            "largest_growth_of_a_rank": grown,
            "longest_lived_world": max((entry["cases"] for entry in soak.growth), default=0),
        }
        write(arguments.json, document)
    if not reached:
        print("no fault was reached, so that nothing is shown")
    return 1 if soak.violations or not reached else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="of all choices; a fresh one is drawn and printed without it")
    parser.add_argument("--faults", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--only", type=int, metavar="N", help="run fault N of the seed alone")
    parser.add_argument("--seconds", type=float, help="begin no further fault after this time")
    parser.add_argument("--minutes", type=float, help="train under faults and restarts, instead of single faults")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, help="those that are drawn (default: all)")
    parser.add_argument("--kinds", nargs="+", choices=sorted(RULES), help="leave out faults of others (default: none)")
    parser.add_argument("--timeout", type=float, default=4.0, help="of the groups, in seconds (default: 4)")
    parser.add_argument("--jobs", type=int, default=1, help="faults at the same time (default: 1)")
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    parser.add_argument("--verbose", action="store_true", help="a line for every fault, and the ranks' output")
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = random.SystemRandom().randrange(1 << 32)
    if arguments.minutes is not None:
        from soak_minutes import soak

        return soak(arguments)
    return faults(arguments)


if __name__ == "__main__":
    sys.exit(main())
