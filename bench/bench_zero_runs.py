"""Speed of zero runs and their distance from the entropy, against k=2 and a copy of memory, for each version.

    python bench/bench_zero_runs.py                                        half a minute
    python bench/bench_zero_runs.py --json bench/results/zero_runs.json
    python bench/bench_zero_runs.py --rounds 3 --elements 1000000          does it run?

Values are Gaussian, each 100 with a log-normal scale of their own (excess kurtosis 2), and residuals uniform over one
step, as error feedback leaves them. k stands for the step that its equilibrium has: s = k g / sqrt(1 - k^2 / 12). A
packet is decoded and compared before anything is timed. Everything runs in turns; a ratio is the median of the rounds'
ratios, with p10 and p90. Times are of this thread's CPU, and GB/s of float32 input.

- encode: packet and new residual, with a step that is forecast. k=2 is measured and its code chosen on a sample before,
  as the hook does: that is in its time.
- encode measured: the same with a pass that measures values and residuals first.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from codec_timing import Key, Spread, gb_per_s, in_turns, quotient

import qcomm
from qcomm.codec import GridKind, Quantizer, decode_into, encode, forecast_quantizer, measure, plan
from qcomm.codec._native import cpu_features, using_cpu_feature
from qcomm.codec.quantizers import Coding, Segment
from qcomm.reference import equilibrium_step

STEPS = (3.0, 3.2, 3.3, 3.4)
BASE = "k=2"
COPY: Key = ("copy", "copy")
BLOCK_STEPS = 512


def gradient(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(count, generator=generator)
    scale = torch.exp(0.35 * torch.randn(count // 100 + 1, generator=generator)).repeat_interleave(100)[:count]
    values *= scale
    return values / values.square().mean().sqrt()


def residual_of(count: int, step: float) -> torch.Tensor:
    return (torch.rand(count, generator=torch.Generator().manual_seed(2)) - 0.5) * step


def check(values: torch.Tensor, quantizer: Quantizer, residual: torch.Tensor) -> dict[str, float]:
    """Decodes a packet, compares, and returns its bits a value and the entropy of its levels."""
    u, kept = values + residual, residual.clone()
    packet = encode([Segment(values, quantizer, kept)], block_steps=BLOCK_STEPS)
    if not torch.equal(u - qcomm.decompress(packet), kept):
        raise SystemExit("bench_zero_runs: a packet decodes to other values than its residual says")
    bits = 8 * packet.numel() / values.numel()
    entropy = qcomm.inspect(packet).segments[0].entropy_bits
    return {"bits": bits, "entropy_bits": entropy, "over_entropy": bits / entropy}


def functions(values: torch.Tensor) -> tuple[dict[Key, Callable[[], object]], dict[str, dict[str, float]]]:
    """What is timed, and sizes by name."""
    count, out, total = values.numel(), torch.empty_like(values), torch.zeros_like(values)
    found: dict[Key, Callable[[], object]] = {COPY: lambda: out.copy_(values)}
    sizes: dict[str, dict[str, float]] = {}

    def add(name: str, grid: qcomm.SigmaGrid, quantizer: Quantizer | None, residual: torch.Tensor) -> None:
        def planned() -> torch.Tensor:
            chosen = plan(measure(values, residual), grid, values, residual)
            return encode([Segment(values, chosen, residual)], block_steps=BLOCK_STEPS)

        packet = planned().clone()
        if quantizer is None:
            found[name, "encode"] = planned
        else:
            sizes[name] = check(values, quantizer, residual)
            found[name, "encode"] = lambda: encode([Segment(values, quantizer, residual)], block_steps=BLOCK_STEPS)
            found[name, "encode measured"] = planned
        found[name, "decode"] = lambda: decode_into(packet, out)
        found[name, "accumulate"] = lambda: decode_into(packet, total, accumulate=True)

    add(BASE, qcomm.SigmaGrid(2.0), None, residual_of(count, equilibrium_step(2.0)))
    for k in STEPS:
        step = equilibrium_step(k)
        # Its residual is uniform: RMS(u)^2 = 1 + step^2 / 12.
        quantizer = forecast_quantizer(qcomm.SigmaGrid(k), step / k, values.dtype)
        if quantizer is None or quantizer.grid != GridKind.SIGMA or quantizer.coding != Coding.RUNS:
            raise SystemExit(f"bench_zero_runs: k={k} is not coded as runs")
        add(f"runs k={k:g}", qcomm.SigmaGrid(k), quantizer, residual_of(count, step))
    return found, sizes


def show(spread: Spread) -> dict[str, float]:
    return {"median": spread.median, "p10": spread.low, "p90": spread.high}


def run(values: torch.Tensor, rounds: int) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    timed, sizes = functions(values)
    times, rows = in_turns(timed, rounds), []
    for (name, stage), seconds in times.items():
        row: dict[str, Any] = {"name": name, "stage": stage, "gb_per_s": show(gb_per_s(values.nbytes, seconds))}
        row["of_copy"] = show(quotient(times[COPY], seconds))
        if name.startswith("runs"):
            row["times_k2"] = show(quotient(times[BASE, stage.split()[0]], seconds))
        rows.append(row)
    return rows, sizes


def main() -> None:
    summary, examples = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--elements", type=int, default=6_553_600, help="float32 values, 25 MiB by default")
    parser.add_argument("--features", nargs="+", default=cpu_features(), choices=cpu_features())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values, versions, sizes = gradient(arguments.elements), {}, {}
    for feature in arguments.features:
        with using_cpu_feature(feature):
            versions[feature], sizes = run(values, arguments.rounds)
        for row in versions[feature]:
            pairs = f"{row['times_k2']['median']:6.2f}x k=2" if "times_k2" in row else ""
            print(
                f"{feature:8} {row['name']:12} {row['stage']:16} {row['gb_per_s']['median']:6.2f} GB/s "
                f"{row['of_copy']['median']:6.2f} of a copy {pairs}",
                flush=True,
            )
    for name, size in sizes.items():
        print(f"{name}: {size['bits']:.3f} bits a value, {size['over_entropy']:.3f} times the entropy")
    small = gradient(65_536)
    over_small = {
        f"k={k:g}": check(small, q, residual_of(65_536, q.step))["over_entropy"]
        for k in STEPS
        if (q := forecast_quantizer(qcomm.SigmaGrid(k), equilibrium_step(k) / k, small.dtype)) is not None
    }
    print("256 KiB, times the entropy:", {name: round(value, 3) for name, value in over_small.items()})
    if arguments.json is not None:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        document = {
            "date": datetime.date.today().isoformat(),
            "commit": commit,
            "machine": platform.processor() or platform.machine(),
            "load": os.getloadavg(),
            "elements": arguments.elements,
            "rounds": arguments.rounds,
            "versions": versions,
            "sizes": sizes,
            "over_entropy_256_kib": over_small,
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
