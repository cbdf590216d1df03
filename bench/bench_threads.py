"""The worth of a second thread: encode, encode with residual, decode and statistics, 1 thread against more.

    python bench/bench_threads.py [--json FILE] [--threads 2] [--elements 6553600] [--repeats 21] [--quick]

Wall time, in turns, of 25 MiB of float32; the ratio is taken pair by pair, with p10 and p90. Results are compared:
another number of threads has to write the same bytes. Other work on the machine's cores shows as a lower ratio.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import qcomm
from qcomm.codec._native import measure
from qcomm.codec.packet import Segment, decode_into, encode
from qcomm.codec.quantize import plan

GRIDS: dict[str, qcomm.codec.Grid] = {
    "sigma k=1": qcomm.SigmaGrid(1.0),
    "sigma k=2": qcomm.SigmaGrid(2.0),
    "range c=2": qcomm.RangeGrid(c=2),
}


def stages(grid: qcomm.codec.Grid, x: torch.Tensor) -> dict[str, Callable[[int], torch.Tensor | None]]:
    """Name -> what a stage does with so many threads; its result where that can be compared."""
    quantizer, residual, out = plan(measure(x), grid, x), torch.zeros_like(x), torch.empty_like(x)
    packet = encode([Segment(x, quantizer)])

    def decoded(threads: int) -> torch.Tensor:
        decode_into(packet, out, num_threads=threads)
        return out

    def measured(threads: int) -> None:
        measure(x, num_threads=threads)

    def with_residual(threads: int) -> None:
        encode([Segment(x, quantizer, residual)], num_threads=threads)

    return {
        "encode": lambda threads: encode([Segment(x, quantizer)], num_threads=threads),
        "encode_ef": with_residual,
        "decode": decoded,
        "measure": measured,
    }


CALLS = 10  # in a row: a core that sleeps takes about as long to wake as a call does, and in training none sleeps


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--elements", type=int, default=6_553_600)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="3 repeats: does it run?")
    arguments = parser.parse_args()
    repeats, threads = 3 if arguments.quick else arguments.repeats, arguments.threads
    torch.set_num_threads(1)
    x = torch.randn(arguments.elements, generator=torch.Generator().manual_seed(0))
    rows = []
    print(f"{'grid':<12}{'stage':<12}{'GB/s, 1':>9}{f'GB/s, {threads}':>9}{'ratio':>7}{'p10..p90':>14}")
    for name, grid in GRIDS.items():
        for stage, run in stages(grid, x).items():
            expected = run(1)
            expected = None if expected is None else expected.clone()
            found = run(threads)
            if expected is not None and (found is None or not found.equal(expected)):
                print(f"{name}, {stage}: {threads} threads have another result", file=sys.stderr)
                return 1
            one, more = [], []
            for _ in range(repeats):
                one.append(seconds(lambda run=run: run(1)))
                more.append(seconds(lambda run=run: run(threads)))
            ratios = [a / b for a, b in zip(one, more, strict=True)]
            cuts = statistics.quantiles(ratios, n=10)
            speeds = [x.nbytes / statistics.median(times) / 1e9 for times in (one, more)]
            row = {"grid": name, "stage": stage, "gb_per_s_1": speeds[0], "gb_per_s": speeds[1]}
            rows.append({**row, "ratio": statistics.median(ratios), "p10": cuts[0], "p90": cuts[-1]})
            print(f"{name:<12}{stage:<12}{speeds[0]:>9.2f}{speeds[1]:>9.2f}{statistics.median(ratios):>7.2f}"
                  f"{f'{cuts[0]:.2f}..{cuts[-1]:.2f}':>14}", flush=True)  # fmt: skip
    if arguments.json:
        header = {
            "threads": threads,
            "cores": os.cpu_count(),
            "load": os.getloadavg(),
            "features": qcomm.cpu_features(),
        }
        arguments.json.write_text(json.dumps({**header, "elements": arguments.elements, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
