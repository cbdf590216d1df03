"""Time of training to a fixed accuracy over a slow link, by gradient exchange.

    python bench/bench_time_to_accuracy.py                         # netlab: two hosts, 100 Mb/s; root
    python bench/bench_time_to_accuracy.py --rate none             # this machine's loopback, no rights needed
    python bench/bench_time_to_accuracy.py --target 0.95 --seeds 3 --json time_to_accuracy.json

ResNet-18 on digits with bf16 autocast, 16 images a rank and step; every method has the same weights, images and
learning rate for a seed. The clock counts training steps alone, not the tests between them. A run ends at the first
test that reaches the target, or after `--most-steps`. PowerSGD is torch's hook with the fewest uncompressed first steps
that it allows.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from netlab import NetlabError
from ranks import RanksError, about, explain, is_rank, run_ranks, start_rank, write
from training import METHODS, Task, Trainer
from wan import add_wan_options, wan_from

WARM_UP = 10  # steps in which the learning rate rises
SMALL = Task("resnet20", batch=4, stem_stride=2, amp=False)


def run_method(method: str, task: Task, target: float, most_steps: int, test_every: int) -> dict[str, Any]:
    """One run, on every rank; the points of its curve are (step, seconds, accuracy)."""
    trainer = Trainer(task, method)
    points: list[tuple[int, float, float]] = []
    seconds, step, accuracy = 0.0, 0, 0.0
    while step < most_steps and accuracy < target:
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(min(test_every, most_steps - step)):
            step += 1
            for group in trainer.optimizer.param_groups:
                group["lr"] = task.learning_rate * min(1.0, step / WARM_UP)
            trainer.step(*trainer.batch())
        dist.barrier()
        seconds += time.perf_counter() - begin
        accuracy = trainer.evaluate()
        points.append((step, seconds, accuracy))
    reached = accuracy >= target
    return {
        "method": method,
        "seed": task.seed,
        "reached": reached,
        "steps": step,
        "seconds": seconds,
        "test_accuracy": accuracy,
        "points": points,
    }


def run_rank(arguments: argparse.Namespace, task: Task) -> None:
    """On every rank; rank 0 prints one line of JSON."""
    rank, _ = start_rank()
    runs = [
        run_method(method, replace(task, seed=seed), arguments.target, arguments.most_steps, arguments.test_every)
        for seed in range(arguments.seeds)
        for method in arguments.methods
    ]
    if rank == 0:
        print(json.dumps(runs), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def show(runs: Sequence[dict[str, Any]], target: float) -> None:
    print(f"{'method':<16}{'seed':>5}{f's to {target:.0%}':>12}{'steps':>7}{'ms a step':>11}{'accuracy':>10}")
    for run in runs:
        seconds = f"{run['seconds']:.1f}" if run["reached"] else f"> {run['seconds']:.1f}"
        print(f"{run['method']:<16}{run['seed']:>5}{seconds:>12}{run['steps']:>7}"
              f"{1e3 * run['seconds'] / run['steps']:>11.1f}{run['test_accuracy']:>10.2%}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="100mbit", help="as tc writes it, or none")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["fp32", "bf16", "powersgd r=2", "qcomm k=1", "qcomm k=2"]
    )
    parser.add_argument("--target", type=float, default=0.9, help="test accuracy, 0..1")
    parser.add_argument("--most-steps", type=int, default=200)
    parser.add_argument("--test-every", type=int, default=5, help="steps from one test to the next")
    parser.add_argument("--stem-stride", type=int, choices=[1, 2], default=2, help="2: a quarter of the arithmetic")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a ResNet-20 and four images a step: does it run?")
    add_wan_options(parser)
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    task = SMALL if arguments.small else Task(stem_stride=arguments.stem_stride)
    if is_rank():
        run_rank(arguments, task)
        return 0
    wan = wan_from(arguments)
    header = about(wan, task=asdict(task), rate=arguments.rate, ranks=arguments.ranks, target=arguments.target)
    options = ["--methods", *arguments.methods, "--target", str(arguments.target), "--seeds", str(arguments.seeds)]
    options += ["--most-steps", str(arguments.most_steps), "--test-every", str(arguments.test_every)]
    options += ["--stem-stride", str(arguments.stem_stride), *(["--small"] if arguments.small else [])]
    try:
        runs = run_ranks(__file__, options, arguments.ranks, arguments.rate, wan=wan)
    except (NetlabError, RanksError) as error:
        return explain(error, "bench_time_to_accuracy", "--rate none needs no rights")
    show(runs, arguments.target)
    write(arguments.json, {**header, "load_after": about()["load"], "runs": runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
