"""Time of a training step by number of ranks, gradient exchange and rate of the links.

    python bench/bench_scaling.py --launchers torchrun mpirun --worlds 4        # processes of this machine
    python bench/bench_scaling.py --rates 100mbit --worlds 2 --modes weak       # netlab: hosts of their own; root
    torchrun --nproc_per_node=4 bench/bench_scaling.py --json scaling.json      # what a launcher started
    mpirun -np 4 python bench/bench_scaling.py --json scaling.json
    python bench/bench_scaling.py --worlds 2 --trace step.json                  # for chrome://tracing, ui.perfetto.dev

One launch of W ranks measures 1, 2, 4, ... and W of them, the others waiting; one rank trains without any exchange.
Weak scaling: every rank has `--batch` images a step. Strong: all ranks together have `--batch` times W.
X(P) is throughput, images a second of P ranks; efficiency is E(P) = X(P) / (P X(1)), X(1) of the batch that one rank
then has: `--batch`, or all. Ranks that share cores cannot reach 1, so `of local` compares with the same ranks without
an exchange: X(P) / X(P, no exchange). Exposed is what backward waits for after the last gradient is computed, the
slowest rank's. Methods run in turn, so that the machine's moods meet all alike.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from allreduce_pairs import SETTLING
from netlab import NetlabError
from ranks import LOOPBACK, RanksError, about, explain, run_ranks, start_rank, write
from step_trace import RecordedStep, save_trace, trace_events
from training import LOCAL, METHODS, StepTimes, Task, Trainer
from wan import add_wan_options, wan_from

from qcomm.recipes.datasets import load_dataset
from qcomm.recipes.models import MODEL_NAMES
from qcomm.transport.launchers import find_place

WARM_UP = 3  # steps before any is counted: DDP rebuilds its buckets after the first
TRACED = 3  # last steps of a trace
SMALL = Task("resnet20", batch=4, stem_stride=2, amp=False)


@dataclass
class Row:
    """Medians over the steps of the slowest rank's seconds; ``efficiency`` and ``of_local`` as described above."""

    mode: str
    method: str
    ranks: int
    batch: int
    seconds: float
    p10: float
    p90: float
    exposed_seconds: float
    images_per_second: float
    efficiency: float = 0.0
    of_local: float = 0.0
    ratio_to_fp32: float | None = None


def slowest(times: Sequence[StepTimes], group: dist.ProcessGroup | None) -> tuple[list[float], list[float]]:
    """(seconds of each step, exposed seconds of each step), of the slowest rank. A collective."""
    own = torch.tensor([[t.end - t.begin, t.backward - t.ready] for t in times], dtype=torch.float64)
    dist.all_reduce(own, dist.ReduceOp.MAX, group=group)
    return own[:, 0].tolist(), own[:, 1].tolist()


def measure(task: Task, methods: Sequence[str], steps: int, group: dist.ProcessGroup) -> list[Row]:
    """All methods on the ranks of one group."""
    data = load_dataset(task.dataset)
    trainers = {method: Trainer(task, method, group, data) for method in methods}
    images = trainers[methods[0]].batch()
    for method, trainer in trainers.items():
        for _ in range(SETTLING if method == "qcomm auto" else WARM_UP):
            trainer.step(*images)
    times: dict[str, list[StepTimes]] = {method: [] for method in methods}
    for _ in range(steps):
        for method, trainer in trainers.items():
            dist.barrier(group)
            times[method].append(trainer.step(*images))
    rows = []
    for method in methods:
        seconds, exposed = slowest(times[method], group)
        median = statistics.median(seconds)
        cuts = statistics.quantiles(seconds, n=10, method="inclusive") if steps > 1 else seconds * 9
        ranks = dist.get_world_size(group)
        speed = ranks * task.batch / median
        rows.append(Row("", method, ranks, task.batch, median, cuts[0], cuts[8], statistics.median(exposed), speed))
    return rows


def compare(rows: Sequence[Row]) -> None:
    """Fills in what compares a row with others."""
    speeds = {(row.mode, row.ranks, row.method): row.images_per_second for row in rows}
    for row in rows:
        one = speeds[row.mode, 1, LOCAL]
        row.efficiency = row.images_per_second / (row.ranks * one)
        row.of_local = row.images_per_second / speeds[row.mode, row.ranks, LOCAL]
        fp32 = speeds.get((row.mode, row.ranks, "fp32"))
        row.ratio_to_fp32 = row.images_per_second / fp32 if fp32 else None


def counts(world_size: int) -> list[int]:
    """1, 2, 4, ... and ``world_size``."""
    return sorted({1 << power for power in range(world_size.bit_length())} | {world_size})


def run_rank(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """On every rank: all modes and numbers of ranks. Rank 0 has the rows."""
    rank, world_size = start_rank()
    task, methods = task_of(arguments), [LOCAL, *(name for name in arguments.methods if name != LOCAL)]
    rows: list[Row] = []
    for count in counts(world_size):
        group = dist.new_group(range(count))
        batches = {"weak": task.batch, "strong": task.batch * world_size // count}
        measured: dict[int, list[Row]] = {}  # by batch: on all ranks both modes are the same
        for mode in arguments.modes if rank < count else ():
            batch = batches[mode]
            if batch not in measured:
                # One rank has nothing to exchange.
                compared = methods if count > 1 else [LOCAL]
                measured[batch] = measure(replace(task, batch=batch), compared, arguments.steps, group)
            rows += [replace(row, mode=mode) for row in measured[batch]]
        dist.barrier()
    if arguments.trace is not None:
        record_trace(task, methods[-1], arguments.trace)
    if rank == 0:
        compare(rows)
    dist.barrier()
    dist.destroy_process_group()
    return [asdict(row) for row in rows] if rank == 0 else []


def record_trace(task: Task, method: str, path: Path) -> None:
    """Rank 0 writes the last steps of all ranks."""
    trainer, steps = Trainer(task, method), []
    for number in range(WARM_UP + TRACED):
        times = trainer.step(*trainer.batch())
        if number >= WARM_UP:
            steps.append(RecordedStep(times, list(trainer.timeline)))
    dist.barrier()
    # All ranks leave the barrier at about one moment: the clocks of machines differ.
    zero = time.perf_counter() - longest(steps)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, trace_events(dist.get_rank(), method, steps, zero))
    if dist.get_rank() == 0:
        save_trace(path, ranks)


def longest(steps: Sequence[RecordedStep]) -> float:
    """Seconds since the first of these steps began, on the rank where it is longest ago. A collective."""
    seconds = torch.tensor(time.perf_counter() - steps[0].times.begin, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def task_of(arguments: argparse.Namespace) -> Task:
    """What is trained, --small considered."""
    if arguments.small:
        return SMALL
    return Task(arguments.model, batch=arguments.batch, stem_stride=arguments.stem_stride, amp=not arguments.fp32)


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'launch':>9}{'rate':>8}{'mode':>8}{'ranks':>6}{'batch':>6}  {'method':<16}{'ms':>9}{'p10..p90':>18}"
          f"{'exposed':>9}{'images/s':>10}{'E(P)':>7}{'of local':>10}{'x fp32':>8}")  # fmt: skip
    for row in rows:
        spread = f"{1e3 * row['p10']:.1f}..{1e3 * row['p90']:.1f}"
        print(f"{row['launcher']:>9}{row['rate']:>8}{row['mode']:>8}{row['ranks']:>6}{row['batch']:>6}"
              f"  {row['method']:<16}{1e3 * row['seconds']:>9.1f}{spread:>18}{1e3 * row['exposed_seconds']:>9.1f}"
              f"{row['images_per_second']:>10.1f}{row['efficiency']:>7.2f}{row['of_local']:>10.2f}"
              f"{row['ratio_to_fp32'] or 0:>8.2f}", flush=True)  # fmt: skip


def options_for_ranks(arguments: argparse.Namespace) -> list[str]:
    """The same settings for the script on the ranks, which print their figures."""
    options = ["--steps", str(arguments.steps), "--batch", str(arguments.batch), "--model", arguments.model]
    options += ["--methods", *arguments.methods, "--modes", *arguments.modes, "--print-json"]
    options += ["--small"] if arguments.small else []
    options += ["--fp32"] if arguments.fp32 else []
    options += ["--stem-stride", str(arguments.stem_stride)] if arguments.stem_stride else []
    options += ["--trace", str(arguments.trace)] if arguments.trace else []
    return options


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", default=["torchrun"], choices=["torchrun", "mpirun"])
    parser.add_argument("--rates", nargs="+", default=[LOOPBACK], help="as tc writes them, of hosts of their own")
    parser.add_argument("--worlds", nargs="+", type=int, default=[2], help="numbers of ranks to start")
    parser.add_argument("--modes", nargs="+", default=["weak", "strong"], choices=["weak", "strong"])
    parser.add_argument("--methods", nargs="+", default=["fp32", "bf16", "qcomm k=1", "qcomm auto"], choices=METHODS)
    parser.add_argument("--model", default="resnet18", choices=MODEL_NAMES)
    parser.add_argument("--batch", type=int, default=16, help="images a rank and step")
    parser.add_argument("--stem-stride", type=int, choices=[1, 2], help="2: a quarter of the arithmetic")
    parser.add_argument("--fp32", action="store_true", help="without bf16 autocast")
    parser.add_argument("--steps", type=int, default=10, help="that are counted, of each method")
    parser.add_argument("--small", action="store_true", help="a ResNet-20 and four images: does it run?")
    parser.add_argument("--trace", type=Path, help="last steps of the last method, as a Chrome trace")
    parser.add_argument("--print-json", action="store_true", help="on ranks: one line of JSON instead of a table")
    add_wan_options(parser)
    parser.add_argument("--json", type=Path, help="where the figures go")
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    wan, options = wan_from(arguments), options_for_ranks(arguments)
    header = about(wan, task=asdict(task_of(arguments)), steps=arguments.steps)
    if (place := find_place()) is not None:
        found = run_rank(arguments)
        if found and arguments.print_json:
            print(json.dumps(found), flush=True)
        elif found:
            rows = [{"launcher": place.launcher, "rate": "as it is", **row} for row in found]
            show(rows)
            write(arguments.json, {**header, "rows": rows})
        return 0
    rows: list[dict[str, Any]] = []
    try:
        for rate in arguments.rates:
            for launcher in arguments.launchers if rate == LOOPBACK else ["netlab"]:
                for world_size in arguments.worlds:
                    found = run_ranks(__file__, options, world_size, rate, launcher, wan=wan)
                    found = [{"launcher": launcher, "rate": rate, "launched": world_size, **row} for row in found]
                    show(found)
                    rows += found
    except (NetlabError, RanksError) as error:
        return explain(error, "bench_scaling", "without --rates it needs no rights")
    write(arguments.json, {**header, "load_after": about()["load"], "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
