"""Speed of the codec on one core and size of its packets, against other coders, on the same symbols.

    python bench/bench_codec.py                              all of it: two minutes, the first time four
    python bench/bench_codec.py --json bench/results/codec.json
    python bench/bench_codec.py --rounds 5 --no-peers        qcomm alone
    python bench/bench_codec.py --quick                      100,000 values, 3 rounds: does it run?

Every result is checked before it is timed; a wrong one ends the bench with status 1. Times are of this thread's CPU.
What is compared runs in turns, round by round, and a ratio is the median of the rounds' ratios, with p10 and p90. GB/s
are of float32 input.

Data sets: a, Laplace with a log-normal scale for each 1000 values, 6 bits; b, Gaussian, 8 bits; c, heavy-tailed
Laplace, 10 bits; all on the range grid.

What is timed:

- encode: statistics, plan, histogram, code and packet, from float32 values; encode_ef adds a residual and writes the
  new one; decode and accumulate end in float32 values. Packets have checksums.
- encode k=1: the same on the sigma grid with its built-in table.
- symbol stage: the library's encode_packet and decode_packet, in which a copy of ready symbols (in the time, too)
  replaces the grid's arithmetic; histogram, table, headers and checksums are in it. Huff0 and FSE, which are inside
  zstd, get the same bytes, one a symbol, and count and build their tables as well; they have no checksums, so the stage
  is also timed without them. Huff0 runs with one table for all and with one for each 128 KiB, with 1 and 4 streams,
  and with its decoders X1 and X2: the fastest is what counts.
- zstd -1, zlib -1, lz4 and constriction compress the symbols, so quantization is not counted on their side.

zstd's sources come from the package index (bench/codec_peers.py); lz4 and constriction count where they are installed.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from ctypes import memmove
from dataclasses import asdict
from pathlib import Path

import torch
from codec_data import DATA_SETS, DataSet, bits_over_entropy, gaussian, laplace, statistics_of
from codec_goals import goals, show_goals
from codec_peers import Coder, SymbolStage, Unavailable, ZstdCoders, missing_packages, slow_coders
from codec_results import Results, figures, show_figures
from codec_timing import Key, in_turns
from rich.console import Console
from rich.progress import track

import qcomm
from qcomm.codec import _native, quantizers
from qcomm.codec._native import measure
from qcomm.codec.packet import Segment, decode_into, encode
from qcomm.codec.quantize import dequantize, plan, quantize

STEPS = 512  # symbols a lane in a block; what large tensors get


def check(ok: bool, what: str) -> None:
    """Ends the bench on a wrong result."""
    if not ok:
        sys.exit(f"wrong result: {what}")


def whole_encode(values: torch.Tensor, grid: qcomm.codec.Grid, residual: torch.Tensor | None = None) -> torch.Tensor:
    """All that a sender does with a tensor."""
    quantizer = plan(measure(values, residual), grid, values, residual)
    return encode([Segment(values, quantizer, residual)], block_steps=STEPS)


def qcomm_functions(
    codec: str, values: torch.Tensor, grid: qcomm.codec.Grid, version: str
) -> dict[Key, Callable[[], object]]:
    """Encode, encode_ef, decode and accumulate with one version of the inner loops, after a check of each."""

    def bound(function: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            with _native.using_cpu_feature(version):
                return function()

        return call

    packet = bound(lambda: whole_encode(values, grid))().clone()
    out, total, residual = torch.empty_like(values), torch.zeros_like(values), torch.zeros_like(values)
    functions = {
        "encode": bound(lambda: whole_encode(values, grid)),
        "encode_ef": bound(lambda: whole_encode(values, grid, residual)),
        "decode": bound(lambda: decode_into(packet, out)),
        "accumulate": bound(lambda: decode_into(packet, total, accumulate=True)),
    }
    what = f"{grid.describe()} {version}"
    symbols, quantizer = quantize(values, grid)
    inside = symbols != 2**quantizer.num_bits - 1 if quantizer.grid == quantizers.GridKind.SIGMA else symbols >= 0
    functions["decode"]()
    functions["accumulate"]()
    check(bool((out == dequantize(symbols, quantizer))[inside].all()) and out[~inside].equal(values[~inside]), what)
    check(total.equal(out), f"{what}, accumulate")
    check(bool(functions["encode_ef"]().equal(packet)) and residual.equal(values - out), f"{what}, encode_ef")
    return {(codec, stage): function for stage, function in functions.items()}


class Bench:
    """One run: its figures grow data set by data set."""

    def __init__(self, count: int, rounds: int, with_peers: bool) -> None:
        self.results, self.rounds, self.with_peers = Results(count), rounds, with_peers
        self.missing: dict[str, str] = {}
        self.stage: SymbolStage | None = None
        self.zstd: ZstdCoders | None = None
        with self.optional("symbol stage"):
            self.stage = SymbolStage()
        if with_peers:
            with self.optional("Huff0, FSE and zstd"):
                self.zstd = ZstdCoders()
            self.missing |= missing_packages()

    @contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """What needs something that this machine may not have."""
        try:
            yield
        except Unavailable as error:
            self.missing[what] = str(error)

    def run(self, data_set: DataSet) -> None:
        """Checks and times everything on one data set."""
        results, name = self.results, data_set.name
        values = data_set.values(results.count)
        symbols, quantizer = quantize(values, data_set.grid)
        results.statistics[name], results.bits[name] = statistics_of(symbols), {}
        copy = torch.empty_like(values)
        functions: dict[Key, Callable[[], object]] = {
            ("memcpy", "copy"): lambda: memmove(copy.data_ptr(), values.data_ptr(), values.nbytes)
        }
        data = symbols.to(torch.uint8 if quantizer.num_bits <= 8 else torch.int16)
        coders = []
        packet = whole_encode(values, data_set.grid).clone()
        for version in qcomm.cpu_features():
            for codec, grid in ("qcomm", data_set.grid), ("qcomm k=1", qcomm.SigmaGrid(1.0, coding="single")):
                functions |= qcomm_functions(f"{codec} {version}", values, grid, version)
                results.bits[name][f"{codec} {version}"] = 8 * whole_encode(values, grid).numel() / results.count
            for checksums in (True, False) if self.stage else ():
                coder = self.stage.coder(values, data, quantizer.num_bits, version, checksums, STEPS)
                check(coder.encode() == packet.numel() or not checksums, "the symbol stage writes another packet")
                coders.append(coder)
        if self.zstd is not None:
            coders += self.zstd.coders(data)
        results.times[name] = in_turns(functions | self.bind(name, coders), self.rounds)
        if self.with_peers:
            results.times[name] |= in_turns(self.bind(name, slow_coders(data, symbols)), min(3, self.rounds))
        for steps in (128, 512):
            results.over_entropy[f"{name}, S={steps}"] = bits_over_entropy(values, data_set.grid, steps)

    def bind(self, data_set: str, coders: Iterable[Coder]) -> dict[Key, Callable[[], object]]:
        """The coders' functions, after a round trip of each."""
        functions: dict[Key, Callable[[], object]] = {}
        for coder in coders:
            try:
                coder.verify()
            except ValueError as error:
                check(False, str(error))
            self.results.bits[data_set][coder.name] = 8 * coder.nbytes / coder.count
            self.results.counts[coder.name] = coder.count
            functions[coder.name, "encode"] = coder.encode
            functions |= {(coder.name, stage): decode for stage, decode in coder.decoders.items()}
        return functions


def processor() -> str:
    """The processor's name, where the system tells it, with the numbers that say which generation it is."""
    info = Path("/proc/cpuinfo")
    lines = [line.split(":", 1) for line in (info.read_text().splitlines() if info.exists() else []) if ":" in line]
    about = {key.strip(): value.strip() for key, value in reversed(lines)}
    if "model name" not in about:
        return platform.processor()
    return f"{about['model name']}, family {about.get('cpu family')}, model {about.get('model')}"


def machine(bench: Bench) -> dict[str, object]:
    """What makes a result comparable with another machine's."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "qcomm": qcomm.__version__,
        "commit": commit,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "features": list(qcomm.cpu_features()),
        "torch": torch.__version__,
        "zstd": bench.zstd.version if bench.zstd else None,
        "elements": bench.results.count,
        "rounds": bench.rounds,
        "block_steps": STEPS,
        "not_available": bench.missing,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--elements", type=int, default=6_553_600, help="float32 values in a data set (25 MiB)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-peers", action="store_true", help="qcomm alone")
    parser.add_argument("--quick", action="store_true", help="100,000 values, 3 rounds: does it run?")
    options = parser.parse_args()
    count, rounds = (100_000, 3) if options.quick else (options.elements, options.rounds)
    torch.set_num_threads(1)
    bench = Bench(count, rounds, not options.no_peers)
    about = machine(bench)
    console = Console()
    for key, value in about.items():
        console.print(f"# {key}: {value}", highlight=False)
    for data_set in track(DATA_SETS, disable=not sys.stderr.isatty(), console=Console(stderr=True)):
        bench.run(data_set)
    for name, make in ("Laplace", laplace), ("Gaussian", gaussian):
        values = make(count, torch.Generator().manual_seed(1))
        size = bits_over_entropy(values, qcomm.SigmaGrid(2.0, coding="pair"), STEPS)
        bench.results.over_entropy[f"pair code, k=2, {name}"] = size
    about["load_average_after"] = os.getloadavg()
    rows, verdicts = figures(bench.results), goals(bench.results, qcomm.cpu_features())
    show_figures(console, rows)
    show_goals(console, verdicts)
    if options.json is not None:
        document = {
            **about,
            "figures": list(map(asdict, rows)),
            "goals": [{**asdict(goal), "verdict": goal.verdict} for goal in verdicts],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
