"""In how many slices a compressed all-reduce is fastest: 1, 2, 4 and 8, in turns, on links of several rates.

    python bench/bench_slices.py [--rates 100mbit 1gbit] [--worlds 2 4] [--mib 25] [--repeats 7] [--json FILE]

Hosts are network namespaces (root, Linux), see netlab.py; qcomm k=1 on ResNet-18's gradients as in bench_allreduce.py.
``MOST_SLICES`` of qcomm/collectives/two_phase_schedule.py is what this says.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import gradient_data
import torch.distributed as dist
from allreduce_methods import GRIDS, Compressed, timed
from netlab import NetlabError
from ranks import RanksError, about, explain, is_rank, run_ranks, start_rank, write
from wan import add_wan_options, wan_from

from qcomm.collectives import two_phase_schedule

GRID = "qcomm k=1"
COUNTS = (1, 2, 4, 8)


def run_rank(arguments: argparse.Namespace) -> None:
    """On every rank; rank 0 prints one line of JSON."""
    rank, _ = start_rank()
    bucket = gradient_data.bucket(gradient_data.load(arguments.gradients, rank), int(arguments.mib * 2**20 / 4))
    method = Compressed(GRIDS[GRID], bucket)
    seconds: dict[int, list[float]] = {count: [] for count in COUNTS}
    for number in range(arguments.repeats + 1):
        for count in COUNTS:
            with mock.patch.object(two_phase_schedule, "MOST_SLICES", count):
                taken = timed(method, bucket.values)
            if number:  # the first time memory is new
                seconds[count].append(taken)
    if rank == 0:
        print(json.dumps(seconds), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def run_world(rate: str, world_size: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    options = [
        "--mib",
        str(arguments.mib),
        "--repeats",
        str(arguments.repeats),
        "--gradients",
        str(arguments.gradients),
    ]
    found = run_ranks(__file__, options, world_size, rate, wan=wan_from(arguments))
    place = {"rate": rate, "world_size": world_size, "mib": arguments.mib}
    return [
        {**place, "slices": int(count), "seconds": statistics.median(seconds), "all": seconds}
        for count, seconds in found.items()
    ]


def means(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Geometric means over places of the time, relative to two slices."""
    base = {(row["rate"], row["world_size"]): row["seconds"] for row in rows if row["slices"] == 2}
    return {
        count: statistics.geometric_mean(
            row["seconds"] / base[row["rate"], row["world_size"]] for row in rows if row["slices"] == count
        )
        for count in COUNTS
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"], help="as tc writes them, or none")
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 4], help="numbers of ranks")
    parser.add_argument("--mib", type=float, default=25.0, help="of the buffer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    add_wan_options(parser)
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    if is_rank():
        run_rank(arguments)
        return 0
    header, rows = about(wan_from(arguments), grid=GRID, repeats=arguments.repeats), []
    try:
        for folder, rate, world_size in gradient_data.worlds(arguments.rates, arguments.worlds):
            arguments.gradients = folder
            found = run_world(rate, world_size, arguments)
            times = "  ".join(f"{row['slices']}: {1e3 * row['seconds']:.1f} ms" for row in found)
            print(f"{rate:>8}, {world_size} ranks, {arguments.mib:g} MiB  {times}", flush=True)
            rows += found
    except (NetlabError, RanksError) as error:
        return explain(error, "bench_slices", "--rates none needs no rights")
    relative = means(rows)
    print("mean, 2 slices = 1:  " + "  ".join(f"{count}: {ratio:.2f}" for count, ratio in relative.items()))
    write(arguments.json, {**header, "load_after": about()["load"], "relative": relative, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
