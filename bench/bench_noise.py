"""Cost of measuring gradient noise: the time of a training step with ``noise=``, against the same step without.

    python bench/bench_noise.py --json bench/results/noise.json     # two minutes on two idle cores
    python bench/bench_noise.py --steps 2                           # does it run?

Two ranks of this machine train a ResNet on digits. Models with and without take their steps in turn, and a ratio is
that of two steps of the same turn; medians with p10 and p90. On a busy machine steps scatter by far more than the cost.
So the processor time of the measurement is also taken by itself, as a share of the processor time of its step, all
threads of the rank counted. Every step is measured here, and by default one in four is.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import about, is_rank, run_ranks, spread, start_rank, write
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import qcomm
from qcomm.recipes.datasets import load_dataset
from qcomm.recipes.models import build_model

WARM_UP, BATCH = 3, 32


class Timed(qcomm.GradientNoise):
    """Counts the processor time of its own work in backward.

    Attributes:
        seconds: since they were set to 0.
    """

    seconds = 0.0

    def begin(self, *arguments: Any) -> None:
        """As of GradientNoise, timed."""
        self._time(super().begin, *arguments)

    def finish(self, *arguments: Any) -> None:
        """As of GradientNoise, timed."""
        self._time(super().finish, *arguments)

    def _time(self, work: Callable[..., None], *arguments: Any) -> None:
        begin = time.thread_time()
        work(*arguments)
        self.seconds += time.thread_time() - begin


def timed(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """Wall seconds of a step, of the slower rank, and processor seconds of this one."""
    dist.barrier()
    begin, cpu = time.perf_counter(), time.process_time()
    optimizer.zero_grad()
    functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    cpu = time.process_time() - cpu
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds), cpu


def run_rank(steps: int, name: str) -> None:
    """On every rank; rank 0 prints one line of JSON."""
    rank, _ = start_rank()
    data = load_dataset("digits")
    first = rank * BATCH
    batch = data.normalise(data.train.images[first : first + BATCH]), data.train.labels[first : first + BATCH]
    noise, made = Timed(BATCH, every=1), []
    for measured in (noise, None):
        torch.manual_seed(0)
        model = DistributedDataParallel(build_model(name, in_channels=1, num_classes=10))
        qcomm.attach(model, strategy="two_phase", noise=measured)
        made.append((model, torch.optim.SGD(model.parameters(), lr=0.01), batch))
    ratios, shares = [], []
    for turn in range(WARM_UP + steps):
        noise.seconds, found = 0.0, {}
        # In both directions alternately: whatever grows warmer or busier meanwhile meets both alike.
        for number in (0, 1) if turn % 2 == 0 else (1, 0):
            found[number] = timed(*made[number])
        if turn >= WARM_UP:
            ratios.append(found[0][0] / found[1][0])
            shares.append(noise.seconds / (found[0][1] - noise.seconds))
    assert noise.total().steps == WARM_UP + steps
    if rank == 0:
        parameters = sum(parameter.numel() for parameter in made[0][0].parameters())
        row = {"model": name, "parameters": parameters, "batch": BATCH, "ratio": spread(ratios)}
        print(json.dumps({**row, "share_of_step": spread(shares)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each model")
    parser.add_argument("--model", default="resnet20", help="of qcomm train")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    if is_rank():
        run_rank(arguments.steps, arguments.model)
        return
    header = about(steps=arguments.steps)
    found = run_ranks(__file__, ["--steps", str(arguments.steps), "--model", arguments.model], 2)
    share, ratio = found["share_of_step"], found["ratio"]
    print(f"{found['model']}: {100 * share['median']:.2f} % of a step ({100 * share['p10']:.2f} .. ", end="")
    print(f"{100 * share['p90']:.2f}), ratio of steps {ratio['median']:.3f} ({ratio['p10']:.3f} .. {ratio['p90']:.3f})")
    write(arguments.json, {**header, "rows": [found]})


if __name__ == "__main__":
    main()
