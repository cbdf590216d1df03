"""How long does the mean of a gradient bucket take, over links of which rate, against what torch does without qcomm?

    python bench/bench_allreduce.py                                    # netlab: 100 Mb/s, 1 Gb/s; 2, 4 hosts; root
    python bench/bench_allreduce.py --rates none --worlds 2            # this machine's loopback, no rights needed
    python bench/bench_allreduce.py --mib 1 4 25 --json allreduce.json
    torchrun --nproc_per_node=2 bench/bench_allreduce.py               # the network that there is

The buffer holds gradients of ResNet-18 after some steps on digits, every rank's from its own images, in the order of
backward.
Methods run in turn, so that the machine's moods meet all alike; each result is checked against the float64 mean first.
algbw is the buffer's fp32 bytes over time, busbw that times 2 (W - 1) / W: what each link of an fp32 ring would carry.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from netlab import UNAVAILABLE, Netlab, NetlabError
from torch.nn import functional

import qcomm
from qcomm.agreement import Fields
from qcomm.communicator import get_communicator
from qcomm.error_feedback import ErrorFeedback
from qcomm.layout import BucketLayout, TensorSpec
from qcomm.mean import MeanTask
from qcomm.recipes.datasets import load_dataset
from qcomm.recipes.models import build_model
from qcomm.telemetry import Event, Telemetry
from qcomm.two_phase import two_phase_mean

MIN_ELEMENTS = 1024
STEPS, BATCH = 20, 16
GRIDS: dict[str, qcomm.grids.Grid] = {
    "qcomm k=0.5": qcomm.SigmaGrid(0.5),
    "qcomm k=1": qcomm.SigmaGrid(1.0),
    "qcomm k=2": qcomm.SigmaGrid(2.0),
    "qcomm range c=6": qcomm.RangeGrid("compact"),
}

Method = Callable[[torch.Tensor], int]  # averages a buffer in place, returns the bytes that this rank sent


def gradients(rank: int) -> list[torch.Tensor]:
    """ResNet-18's gradients, last layer first, flat. The weights are the same on all ranks, the images are not."""
    torch.manual_seed(0)
    data = load_dataset("digits")
    model = build_model("resnet18", in_channels=1, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.randperm(len(data.train.labels), generator=torch.Generator().manual_seed(1))
    for step in range(STEPS + 1):
        last = step == STEPS
        chosen = order[BATCH * (step + last * rank) :][:BATCH]
        optimizer.zero_grad()
        functional.cross_entropy(model(data.normalise(data.train.images[chosen])), data.train.labels[chosen]).backward()
        if not last:
            optimizer.step()
    return [p.grad.reshape(-1) for p in reversed(list(model.parameters())) if p.grad is not None]


def bucket(rank: int, elements: int) -> tuple[torch.Tensor, list[TensorSpec]]:
    """The first ``elements`` values, from the beginning again where the model has fewer, and where its tensors are."""
    parts, specs, offset = gradients(rank), [], 0
    values = torch.empty(elements)
    while offset < elements:
        for part in parts:
            count = min(part.numel(), elements - offset)
            if count:
                values[offset : offset + count] = part[:count]
                specs.append(TensorSpec(f"tensor {len(specs)}", offset, count, count >= MIN_ELEMENTS))
            offset += count
    return values, specs


def plain(dtype: torch.dtype) -> Method:
    """Torch's own all-reduce, in ``dtype``, as its compression hooks do it."""

    def average(buffer: torch.Tensor) -> int:
        world_size = dist.get_world_size()
        sent = buffer.to(dtype)
        sent.div_(world_size)
        dist.all_reduce(sent)
        if sent is not buffer:
            buffer.copy_(sent)
        return 2 * (world_size - 1) * sent.nbytes // world_size

    return average


def compressed(
    grid: qcomm.grids.Grid, specs: Sequence[TensorSpec], error_feedback: bool, num_threads: int, timeline: list[Event]
) -> Method:
    """What the hook does for one bucket; ``timeline`` is that of the last call."""
    communicator = get_communicator(dist.distributed_c10d._get_default_group())
    layout = BucketLayout(specs, dist.get_world_size())
    feedback = ErrorFeedback() if error_feedback else None

    def average(buffer: torch.Tensor) -> int:
        timeline.clear()
        telemetry = Telemetry(timeline)
        task = MeanTask(buffer, layout, grid, Fields({}), telemetry, feedback, num_threads=num_threads)
        communicator.submit(lambda: two_phase_mean(task, communicator)).wait()
        return int(telemetry.stats()["bytes_sent"])

    return average


@dataclass
class Row:
    """One method on one buffer; seconds are of the slowest rank."""

    method: str
    mib: float
    seconds: float
    p10: float
    p90: float
    ratio_to_fp32: float
    ratio_to_bf16: float
    algbw_gb_per_s: float
    busbw_gb_per_s: float
    bytes_sent: int
    relative_error: float
    wrong: int


def timed(average: Method, values: torch.Tensor) -> float:
    buffer = values.clone()
    dist.barrier()
    begin = time.perf_counter()
    average(buffer)
    seconds = torch.tensor(time.perf_counter() - begin)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def check(average: Method, values: torch.Tensor, mean: torch.Tensor, tolerance: float) -> tuple[int, float, int]:
    """(bytes sent, relative error, elements that are off by more than ``tolerance`` or differ between ranks)."""
    buffer = values.clone()
    sent = average(buffer)
    error = (buffer.double() - mean).abs()
    first = buffer.clone()
    dist.broadcast(first, 0)
    wrong = torch.tensor(int((error > tolerance).sum()) + int((buffer != first).sum()))
    dist.all_reduce(wrong)
    return sent, float(error.norm() / mean.norm()), int(wrong)


def show_timeline(name: str, timeline: Sequence[Event]) -> None:
    """Milliseconds from the beginning, and what was begun then."""
    print(f"timeline of rank 0, {name}", file=sys.stderr)
    for _, event, seconds in timeline:
        print(f"{1e3 * (seconds - timeline[0][2]):>9.2f} ms  {event}", file=sys.stderr, flush=True)


def measure(mib: float, arguments: argparse.Namespace) -> list[Row]:
    """On every rank: all methods on one buffer size."""
    repeats = arguments.repeats
    values, specs = bucket(dist.get_rank(), int(mib * 2**20 / 4))
    mean = values.double()
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    methods = {"fp32": plain(torch.float32), "fp16": plain(torch.float16), "bf16": plain(torch.bfloat16)}
    timelines: dict[str, list[Event]] = {name: [] for name in GRIDS}
    for name, grid in GRIDS.items():
        methods[name] = compressed(grid, specs, arguments.error_feedback, arguments.num_threads, timelines[name])
    # The largest value decides how far a 16-bit sum or the coarsest of the grids may be off.
    largest = values.abs().max()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    checked = {name: check(method, values, mean, float(largest)) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            seconds[name].append(timed(method, values))
    if arguments.timeline and dist.get_rank() == 0:
        for name, timeline in timelines.items():
            show_timeline(name, timeline)
    rows = []
    for name, times in seconds.items():
        median, cuts = statistics.median(times), statistics.quantiles(times, n=10) if repeats > 1 else times * 9
        ratios = [
            statistics.median(a / b for a, b in zip(seconds[base], times, strict=True)) for base in ("fp32", "bf16")
        ]
        algbw = values.nbytes / median / 1e9
        busbw = algbw * 2 * (dist.get_world_size() - 1) / dist.get_world_size()
        sent, error, wrong = checked[name]
        rows.append(Row(name, mib, median, cuts[0], cuts[8], *ratios, algbw, busbw, sent, error, wrong))
    return rows


def run_rank(arguments: argparse.Namespace) -> None:
    """On every rank; rank 0 prints one line of JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [row for mib in arguments.mib for row in measure(mib, arguments)]
    if dist.get_rank() == 0:
        print(json.dumps([asdict(row) for row in rows]), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def run_world(rate: str, world_size: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts the ranks, on hosts of their own or, for rate "none", as processes of this machine."""
    options = ["--repeats", str(arguments.repeats), "--mib", *map(str, arguments.mib)]
    options += ["--num-threads", str(arguments.num_threads)]
    options += ["--error-feedback"] if arguments.error_feedback else []
    options += ["--timeline"] if arguments.timeline else []
    script = [str(Path(__file__).resolve()), *options]
    quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if rate == "none":
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={world_size}",
            *script,
        ]
        text = subprocess.run(
            command, env={**os.environ, **quiet}, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    else:
        read_end, write_end = os.pipe()
        with Netlab(world_size, rate) as lab, os.fdopen(read_end) as reader:
            os.environ.update(quiet)
            status = lab.run([sys.executable, *script], stdout=write_end)
            os.close(write_end)
            text = reader.read()
        if status != 0:
            raise SystemExit(f"bench_allreduce: a rank ended with status {status}")
    rows: list[dict[str, Any]] = json.loads(text.splitlines()[-1])
    return [{"rate": rate, "world_size": world_size, **row} for row in rows]


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'rate':>8}{'ranks':>6}{'MiB':>6}  {'method':<16}{'ms':>9}{'p10..p90':>18}{'x fp32':>8}{'x bf16':>8}"
          f"{'algbw':>8}{'busbw':>8}{'MB sent':>9}{'error':>9}{'#wrong':>8}")  # fmt: skip
    for row in rows:
        spread = f"{1e3 * row['p10']:.1f}..{1e3 * row['p90']:.1f}"
        print(f"{row['rate']:>8}{row['world_size']:>6}{row['mib']:>6g}  {row['method']:<16}{1e3 * row['seconds']:>9.1f}"
              f"{spread:>18}{row['ratio_to_fp32']:>8.2f}{row['ratio_to_bf16']:>8.2f}{row['algbw_gb_per_s']:>8.3f}"
              f"{row['busbw_gb_per_s']:>8.3f}{row['bytes_sent'] / 1e6:>9.3f}{row['relative_error']:>9.4f}"
              f"{row['wrong']:>8}", flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"], help="as tc writes them, or none")
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 4], help="numbers of ranks")
    parser.add_argument("--mib", nargs="+", type=float, default=[25.0], help="sizes of the buffer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--error-feedback", action="store_true", help="as the hook does by default")
    parser.add_argument("--num-threads", type=int, default=1, help="of each rank's codec")
    parser.add_argument("--timeline", action="store_true", help="also what rank 0 began when in the last repeat")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        run_rank(arguments)
        return 0
    rows: list[dict[str, Any]] = []
    try:
        for rate in arguments.rates:
            for world_size in arguments.worlds:
                found = run_world(rate, world_size, arguments)
                show(found)
                rows += found
    except NetlabError as error:
        print(f"bench_allreduce: {error}; --rates none needs no rights", file=sys.stderr)
        return UNAVAILABLE
    if arguments.json:
        header = {"torch": torch.__version__, "load": os.getloadavg(), "cores": os.cpu_count()}
        header |= {"error_feedback": arguments.error_feedback, "repeats": arguments.repeats}
        header |= {"num_threads": arguments.num_threads}
        arguments.json.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
