"""Time of several ``qcomm.all_reduce(async_op=True)`` under way at once, against the same calls one after another.

    python bench/bench_async.py --json bench/results/async.json      # four links between two hosts; as root
    python bench/bench_async.py --rates none --delays-ms 0 --mib 0.25 --turns 2     # does it run?

A turn averages the same tensors once in each way, the first of them alternately: one call after another; all calls
begun and then waited for; and torch's own all-reduce of fp32 in both ways. All ranks begin at one moment, and the
slowest one counts. A ratio is that of the two ways in one turn. Both ways must leave the same bits on all ranks, or the
bench fails. ``all_reduce`` has no error feedback, so every turn sends the same bytes. Without ``--delays-ms`` tc limits
the links.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_wan import BEGIN_SECONDS, wait_for_all
from netlab import NetlabError
from ranks import RanksError, about, explain, is_rank, run_ranks, spread, start_rank, write
from wan import Wan

import qcomm

GRID = qcomm.SigmaGrid(1.0)
WARM_UP = 2  # turns
Way = Callable[[Sequence[torch.Tensor]], None]


@dataclass(frozen=True)
class Case:
    """So many tensors of one size, on every rank."""

    tensors: int
    mib: float
    turns: int


def one_after_another(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        qcomm.all_reduce(tensor, GRID, strategy="two_phase")


def under_way(tensors: Sequence[torch.Tensor]) -> None:
    works = [qcomm.all_reduce(tensor, GRID, strategy="two_phase", async_op=True) for tensor in tensors]
    for work in works:
        assert work is not None
        work.wait()


def torch_one_after_another(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        dist.all_reduce(tensor)


def torch_under_way(tensors: Sequence[torch.Tensor]) -> None:
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in works:
        assert work is not None
        work.wait()


# Each pair: one after another, and under way.
WAYS: dict[str, tuple[Way, Way]] = {
    "qcomm k=1": (one_after_another, under_way),
    "fp32": (torch_one_after_another, torch_under_way),
}


def measure(case: Case, margin: float) -> list[dict[str, Any]]:
    """On every rank: a row for each of WAYS."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    values = [torch.randn(int(case.mib * 2**18), generator=generator) for _ in range(case.tensors)]
    rows = []
    for method, ways in WAYS.items():
        times: list[list[float]] = []
        for turn in range(-WARM_UP, case.turns):
            seconds, results = [0.0, 0.0], []
            for which in (0, 1) if turn % 2 else (1, 0):
                seconds[which], result = timed(ways[which], values, margin)
                results.append(result)
            check(method, *results)
            times += [seconds] if turn >= 0 else []
        slowest = torch.tensor(times, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        sequential, together = slowest.T.tolist()
        ratios = [one / other for one, other in zip(sequential, together, strict=True)]
        rows.append(
            {
                "method": method,
                "one_after_another": spread(sequential),
                "under_way": spread(together),
                "ratio": spread(ratios),
                "all_seconds": slowest.tolist(),
            }
        )
    return rows


def timed(way: Way, values: Sequence[torch.Tensor], margin: float) -> tuple[float, list[torch.Tensor]]:
    """Seconds of this rank from a moment common to all until it has all means, and those."""
    tensors = [value.clone() for value in values]
    wait_for_all(margin)
    begin = time.perf_counter()
    way(tensors)
    return time.perf_counter() - begin, tensors


def check(method: str, mine: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> None:
    """Raises ValueError unless both ways have the same bits on all ranks."""
    first = torch.stack([tensor.view(torch.int32).sum() for tensor in mine])
    differ = torch.tensor(float(not all(map(torch.equal, mine, others))))
    least, most = first.clone(), first.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(differ)
    if differ or not torch.equal(least, most):
        raise ValueError(f"{method}: both ways must leave the same bits on all ranks")


def run_rank(case: Case, margin: float) -> None:
    """On every rank; rank 0 prints one line of JSON."""
    rank, _ = start_rank()
    rows = measure(case, margin)
    if rank == 0:
        print(json.dumps(rows), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def show(row: dict[str, Any]) -> None:
    ways = "  ".join(f"{name} {1e3 * row[name]['median']:8.1f} ms" for name in ("one_after_another", "under_way"))
    ratio = f"ratio {row['ratio']['median']:.2f} ({row['ratio']['p10']:.2f} .. {row['ratio']['p90']:.2f})"
    print(f"{row['rate']:>8} {row['delay_ms']:>5g} ms  {row['method']:<10} {ways}  {ratio}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument(
        "--rates", nargs="+", default=["1gbit", "100mbit"], help="of every host's link, as tc writes it"
    )
    parser.add_argument("--delays-ms", nargs="+", type=float, default=[0.0, 50.0], help="one way, between two hosts")
    parser.add_argument("--tensors", type=int, default=8)
    parser.add_argument("--mib", type=float, default=4.0, help="of each tensor")
    parser.add_argument("--turns", type=int, default=9, help="that are counted")
    parser.add_argument("--margin", type=float, default=BEGIN_SECONDS, help="seconds until all ranks begin")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    for name, least in (("turns", 2), ("tensors", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(arguments, name)}")
    case = Case(arguments.tensors, arguments.mib, arguments.turns)
    if is_rank():
        run_rank(case, arguments.margin)
        return 0
    header, rows = about(hosts=arguments.hosts, strategy="two_phase", **asdict(case)), []
    options = [f"--{name}={value}" for name, value in asdict(case).items()]
    for rate, delay_ms in itertools.product(arguments.rates, arguments.delays_ms):
        # The agreement on a begin takes a tree's or a ring's messages, one after another.
        margin = BEGIN_SECONDS + 2 * arguments.hosts * delay_ms / 1e3
        wan = Wan(delay_ms=delay_ms) if delay_ms else None
        try:
            found = run_ranks(__file__, [*options, f"--margin={margin}"], arguments.hosts, rate, wan=wan)
        except (NetlabError, RanksError) as error:
            return explain(error, "bench_async", "--rates none --delays-ms 0 needs no rights")
        for row in found:
            rows.append({"rate": rate, "delay_ms": delay_ms, **row})
            show(rows[-1])
    write(arguments.json, {**header, "load_after": about()["load"], "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
