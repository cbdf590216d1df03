"""Time of the mean of a gradient bucket, by rate of the links, against the ways there are without qcomm.

    python bench/bench_allreduce.py                                    # netlab: 100 Mb/s, 1 Gb/s; 2, 4 hosts; root
    python bench/bench_allreduce.py --rates none --worlds 2            # this machine's loopback, no rights needed
    python bench/bench_allreduce.py --rates 1gbit --worlds 2 --sizes 64K 1M 25M 256M
    python bench/bench_allreduce.py --strategies two_phase auto
    python bench/bench_allreduce.py --pairs 60 --rates none            # is auto ever slower than doing nothing?
    torchrun --nproc_per_node=2 bench/bench_allreduce.py               # the network that there is

The buffer holds gradients of ResNet-18 after some steps on digits, every rank's from its own images, in the order of
backward. Methods run in turn, so that the machine's moods meet all alike; the first result of each is checked.
algbw is the buffer's fp32 bytes over time, busbw that times 2 (W - 1) / W: what each link of an fp32 ring would carry.
#wrong counts elements that differ between ranks or are off the float64 mean by more than the method's bound.
Exits 1 where something is wrong, 77 where there are no rights for netlab.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gradient_data
import torch
import torch.distributed as dist
from allreduce_methods import Compressed, Method, allowed_error, make_methods, timed
from allreduce_pairs import run_pairs, show_pairs
from netlab import NetlabError
from ranks import RanksError, about, explain, is_rank, run_ranks, start_rank, write
from wan import add_wan_options, wan_from

from qcomm.collectives.options import STRATEGIES
from qcomm.collectives.telemetry import Event

# Calls with error feedback before the timed ones: a coarse step's residuals take some to come to rest, and rates fall.
WARM_UP = 30
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass
class Row:
    """One method on one buffer; seconds are of the slowest rank, bytes of the last call, errors of the first."""

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
    bounded: bool  # whether `wrong` also counts elements beyond a bound
    chosen: str | None  # the strategy that auto ended with


def size_in_mib(text: str) -> float:
    """64K, 1.5M or 1G: bytes of the buffer."""
    unit = UNITS.get(text[-1:].upper())
    try:
        found = float(text[:-1]) * unit / UNITS["M"] if unit else -1.0
    except ValueError:
        found = -1.0
    if not found * UNITS["M"] >= 4:
        raise argparse.ArgumentTypeError(f"must be a size such as 64K, 25M or 1G, got {text!r}")
    return found


def check(name: str, method: Method, values: torch.Tensor, mean: torch.Tensor) -> tuple[float, int, bool]:
    """(relative error, wrong elements, whether there is a bound) of the first call of a method."""
    allowed = allowed_error(name, method, values, mean.to(values.dtype))
    buffer = values.clone()
    method(buffer)
    error = float((buffer.double() - mean).norm() / mean.norm())
    return error, count_wrong(buffer, mean, allowed), allowed is not None


def count_wrong(result: torch.Tensor, mean: torch.Tensor, allowed: torch.Tensor | None) -> int:
    """Elements of all ranks' results that differ from rank 0's, are not finite or are off by more than ``allowed``."""
    first = result.clone()
    dist.broadcast(first, 0)
    bad = (result != first) | ~result.isfinite()
    if allowed is not None:
        bad |= (result.double() - mean).abs() > allowed
    wrong = bad.sum()
    dist.all_reduce(wrong)
    return int(wrong)


def show_timeline(name: str, timeline: Sequence[Event]) -> None:
    """Milliseconds from the beginning, and what was begun then."""
    print(f"timeline of rank 0, {name}", file=sys.stderr)
    for _, event, seconds in timeline:
        print(f"{1e3 * (seconds - timeline[0][2]):>9.2f} ms  {event}", file=sys.stderr, flush=True)


def measure(mib: float, parts: Sequence[torch.Tensor], arguments: argparse.Namespace) -> list[Row]:
    """On every rank: all methods on one buffer size."""
    repeats = arguments.repeats
    bucket = gradient_data.bucket(parts, int(mib * 2**20 / 4))
    values = bucket.values
    mean = values.double()
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    methods = make_methods(bucket, arguments.strategies, arguments.error_feedback, arguments.num_threads)
    checked = {name: check(name, method, values, mean) for name, method in methods.items()}
    for method in methods.values():
        for _ in range(WARM_UP if isinstance(method, Compressed) and arguments.error_feedback else 0):
            method.average(values.clone())
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            seconds[name].append(timed(method, values))
    # With error feedback there is more to send than in the first call.
    bytes_sent = {name: method(values.clone()) for name, method in methods.items()}
    rows = []
    for name, times in seconds.items():
        method = methods[name]
        if arguments.timeline and dist.get_rank() == 0 and isinstance(method, Compressed):
            show_timeline(name, method.timeline)
        median, cuts = (
            statistics.median(times),
            statistics.quantiles(times, n=10, method="inclusive") if repeats > 1 else times * 9,
        )
        ratios = [
            statistics.median(a / b for a, b in zip(seconds[base], times, strict=True)) for base in ("fp32", "bf16")
        ]
        algbw = values.nbytes / median / 1e9
        busbw = algbw * 2 * (dist.get_world_size() - 1) / dist.get_world_size()
        error, wrong, bounded = checked[name]
        chosen = method.chosen if isinstance(method, Compressed) and method.strategy == "auto" else None
        rows.append(
            Row(
                name,
                mib,
                median,
                cuts[0],
                cuts[8],
                *ratios,
                algbw,
                busbw,
                bytes_sent[name],
                error,
                wrong,
                bounded,
                chosen,
            )
        )
    return rows


def run_rank(arguments: argparse.Namespace) -> None:
    """On every rank; rank 0 prints one line of JSON."""
    rank, _ = start_rank()
    parts = gradient_data.load(arguments.gradients, rank)
    rows: list[Any] = []
    for mib in arguments.sizes:
        if arguments.pairs:
            bucket = gradient_data.bucket(parts, int(mib * 2**20 / 4))
            rows += run_pairs(bucket, mib, arguments.pairs, arguments.error_feedback, arguments.num_threads)
        else:
            rows += measure(mib, parts, arguments)
    if rank == 0:
        print(json.dumps([asdict(row) for row in rows]), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def run_world(rate: str, world_size: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Starts the ranks, on hosts of their own or, for rate "none", as processes of this machine."""
    options = ["--repeats", str(arguments.repeats), "--sizes", *(f"{mib * 1024:.17g}K" for mib in arguments.sizes)]
    options += ["--num-threads", str(arguments.num_threads), "--gradients", str(arguments.gradients)]
    options += ["--strategies", *arguments.strategies, "--pairs", str(arguments.pairs)]
    options += ["--error-feedback"] if arguments.error_feedback else []
    options += ["--timeline"] if arguments.timeline else []
    rows = run_ranks(__file__, options, world_size, rate, wan=wan_from(arguments))
    return [{"rate": rate, "world_size": world_size, **row} for row in rows]


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'rate':>8}{'ranks':>6}{'MiB':>8}  {'method':<22}{'ms':>9}{'p10..p90':>18}{'x fp32':>8}{'x bf16':>8}"
          f"{'algbw':>8}{'busbw':>8}{'MB sent':>9}{'error':>9}{'#wrong':>8}")  # fmt: skip
    for row in rows:
        spread = f"{1e3 * row['p10']:.1f}..{1e3 * row['p90']:.1f}"
        wrong = f"{row['wrong']}" + ("" if row["bounded"] else "*")
        print(f"{row['rate']:>8}{row['world_size']:>6}{row['mib']:>8g}  {row['method']:<22}{1e3 * row['seconds']:>9.1f}"
              f"{spread:>18}{row['ratio_to_fp32']:>8.2f}{row['ratio_to_bf16']:>8.2f}{row['algbw_gb_per_s']:>8.3f}"
              f"{row['busbw_gb_per_s']:>8.3f}{row['bytes_sent'] / 1e6:>9.3f}{row['relative_error']:>9.4f}"
              f"{wrong:>8} {row['chosen'] or ''}", flush=True)  # fmt: skip
    if any(not row["bounded"] for row in rows):
        print("* there is no bound: only what differs between ranks, and what is not finite")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"], help="as tc writes them, or none")
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 4], help="numbers of ranks")
    parser.add_argument("--sizes", nargs="+", type=size_in_mib, default=[25.0], help="of the buffer, e.g. 64K 1M 25M")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=["two_phase"], help="of qcomm")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=0, help="only: so many pairs of auto and fp32, auto and bf16")
    parser.add_argument("--error-feedback", action="store_true", help="as the hook does by default")
    parser.add_argument("--num-threads", type=int, default=1, help="of each rank's codec")
    parser.add_argument("--timeline", action="store_true", help="also what rank 0 began when in the last repeat")
    parser.add_argument("--gradients", type=Path, help="where gradient_data.save put them; made anew without it")
    add_wan_options(parser)
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    if is_rank():
        run_rank(arguments)
        return 0
    rows: list[dict[str, Any]] = []
    settings = {"error_feedback": arguments.error_feedback, "repeats": arguments.repeats or arguments.pairs}
    header = about(wan_from(arguments), **settings, num_threads=arguments.num_threads)
    try:
        for folder, rate, world_size in gradient_data.worlds(arguments.rates, arguments.worlds):
            arguments.gradients = folder
            found = run_world(rate, world_size, arguments)
            (show_pairs if arguments.pairs else show)(found)
            rows += found
    except (NetlabError, RanksError) as error:
        return explain(error, "bench_allreduce", "--rates none needs no rights")
    write(arguments.json, {**header, "load_after": about()["load"], "rows": rows})
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
