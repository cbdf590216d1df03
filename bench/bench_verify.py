"""Cost of comparing means: the time of a training step with ``verify``, against the same step without.

    python bench/bench_verify.py --json bench/results/verify.json     # five minutes on two idle cores
    python bench/bench_verify.py --model resnet20 --steps 2           # does it run?

Two ranks of this machine train a ResNet on digits over loopback, the fastest network that there is: on any other the
share is smaller. Six models take their steps in turn: three values of ``verify``, with each of two strategies. A step
is forward, backward with the mean of its gradients, and the optimizer's step. A ratio is that of two steps of the same
turn; medians with p10 and p90. Steps scatter more than the cost, so the fingerprint of all gradients is also timed by
itself, on memory that is in no cache, and given as a share of the step.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import about, is_rank, run_ranks, spread, start_rank, write
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import qcomm
from qcomm.collectives.uncompressed_values import fingerprint
from qcomm.recipes.datasets import load_dataset
from qcomm.recipes.models import build_model

STRATEGIES = ("none", "two_phase")
COMPARED = ("interval", "step")
WARM_UP, BATCH = 4, 8


def make_steps(rank: int, name: str) -> dict[str, list]:
    """Returns a model, its optimizer and its batch for every strategy and value of ``verify``."""
    data = load_dataset("digits")
    first = rank * BATCH
    batch = data.normalise(data.train.images[first : first + BATCH]), data.train.labels[first : first + BATCH]
    made = {}
    for strategy in STRATEGIES:
        for verify in ("off", *COMPARED):
            torch.manual_seed(0)
            model = DistributedDataParallel(build_model(name, in_channels=1, num_classes=10))
            qcomm.attach(model, strategy=strategy, verify=verify)
            made[f"{strategy}, {verify}"] = [model, torch.optim.SGD(model.parameters(), lr=0.01), batch]
    return made


def timed(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Seconds of a step, of the slower rank, both beginning together."""
    dist.barrier()
    begin = time.perf_counter()
    optimizer.zero_grad()
    functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def time_fingerprint(model: torch.nn.Module) -> dict[str, float]:
    """Seconds of the fingerprint of as many values as the model has."""
    elements = sum(parameter.numel() for parameter in model.parameters())
    buffers, seconds = [torch.randn(elements) for _ in range(4)], []
    for turn in range(60):
        begin = time.perf_counter()
        fingerprint([buffers[turn % len(buffers)]])
        seconds.append(time.perf_counter() - begin)
    return spread(seconds)


def run_rank(steps: int, model: str) -> None:
    """On every rank; rank 0 prints one line of JSON."""
    rank, _ = start_rank()
    made = make_steps(rank, model)
    for _ in range(WARM_UP):
        for step in made.values():
            timed(*step)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(steps):
        # In both directions alternately: whatever grows warmer or busier meanwhile meets all alike.
        for name in list(made) if turn % 2 == 0 else reversed(made):
            seconds[name].append(timed(*made[name]))
    rows = []
    for strategy in STRATEGIES:
        off = seconds[f"{strategy}, off"]
        for verify in COMPARED:
            found = seconds[f"{strategy}, {verify}"]
            ratio = spread([mine / other for mine, other in zip(found, off, strict=True)])
            rows.append(
                {"strategy": strategy, "verify": verify, "off": spread(off), "on": spread(found), "ratio": ratio}
            )
    alone = time_fingerprint(next(iter(made.values()))[0])
    if rank == 0:
        share = alone["median"] / statistics.median(seconds["none, off"])
        print(json.dumps({"rows": rows, "fingerprint": alone, "share_of_step": share}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each model")
    parser.add_argument("--model", default="resnet18", help="of qcomm train")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    if is_rank():
        run_rank(arguments.steps, arguments.model)
        return
    header = about(steps=arguments.steps, model=arguments.model, batch=BATCH, network="loopback")
    found = run_ranks(__file__, ["--steps", str(arguments.steps), "--model", arguments.model], 2)
    for row in found["rows"]:
        ratio, on, off = row["ratio"], 1e3 * row["on"]["median"], 1e3 * row["off"]["median"]
        print(f"{row['strategy']:<10} verify={row['verify']:<9} {on:7.1f} ms, off {off:7.1f} ms, ", end="")
        print(f"ratio {ratio['median']:.4f} ({ratio['p10']:.3f} .. {ratio['p90']:.3f})")
    milliseconds, percent = 1e3 * found["fingerprint"]["median"], 100 * found["share_of_step"]
    print(f"fingerprint of all gradients {milliseconds:.2f} ms, {percent:.2f} % of a step with none")
    write(arguments.json, {**header, "load_after": about()["load"], **found})


if __name__ == "__main__":
    main()
