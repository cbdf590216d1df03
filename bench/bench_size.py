"""Sizes of packets against the entropy of their symbols, by kind of data.

    python bench/bench_size.py [--json FILE] [--elements 1 100 10000 1000000 10000000] [--quick]

Six distributions, range grids of 4 to 12 bits and sigma grids of k = 0.5, 1 and 2. For each packet: H, the entropy of
its symbols in bits; the package-merge optimum of their histogram; the payload; the coding that was chosen. The bench
ends with status 1 if one breaks what docs/format.md promises:

- an element is off by more than half a step (and the rounding of its dtype);
- a payload with one code is larger than the optimum by more than 134 bytes a block, or, of coded blocks alone, by
  fewer than 8;
- with H >= 2.2 and no symbol above 0.4 the optimum is above 1.05 H;
- a packet is larger than fixed-width symbols by more than 0.5 % + 128 bytes, or than raw values by more than 128.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import qcomm
from qcomm.codec.huffman import code_lengths
from qcomm.codec.quantize import quantize

SIZES = (1, 100, 10_000, 1_000_000, 10_000_000)
GRIDS: dict[str, qcomm.codec.Grid] = {
    **{f"range {bits}": qcomm.RangeGrid(num_bits=bits) for bits in range(4, 13)},
    **{f"sigma {k:g}": qcomm.SigmaGrid(k) for k in (0.5, 1.0, 2.0)},
}
# Bytes of a coded block beyond its codewords: info, 32 start windows, less the bits of codewords that are in them.
LEAST_OVERHEAD, MOST_OVERHEAD = 8, 134


def make(name: str, n: int) -> torch.Tensor:
    """Values of a distribution, the same every time."""
    generator = torch.Generator().manual_seed(n)
    normal = torch.randn(4, n, generator=generator)
    u = torch.rand(n, generator=generator)
    values = {
        "gaussian": lambda: normal[0],
        "laplace": lambda: normal[0].sign() * -torch.log(1 - u),
        "student t3": lambda: normal[0] / (normal[1:].square().sum(0) / 3).sqrt(),
        "uniform": lambda: u,
        "sparse": lambda: normal[0] * (u < 0.01),
        "constant": lambda: torch.full((n,), 0.37),
    }
    return values[name]()


DISTRIBUTIONS = ("gaussian", "laplace", "student t3", "uniform", "sparse", "constant")


@dataclass
class Row:
    """One packet; bits are of one value."""

    distribution: str
    elements: int
    grid: str
    num_bits: int
    coding: str
    entropy: float
    p_max: float
    optimum: float
    payload: float
    total: float
    overhead_bytes_a_block: float
    violations: list[str]


def measure(distribution: str, n: int, name: str) -> Row:
    x, grid = make(distribution, n), GRIDS[name]
    packet = qcomm.compress(x, grid)
    info = qcomm.inspect(packet)
    violations = []
    error = float((qcomm.decompress(packet).double() - x.double()).abs().max())
    if error > info.segments[0].step / 2 + 2.5 * torch.finfo(x.dtype).eps * float(x.abs().max()):
        violations.append(f"an element is off by {error}, the step is {info.segments[0].step}")
    if info.total_bytes > 4 * n + 128:
        violations.append(f"{info.total_bytes} bytes, raw is {4 * n}")
    entropy = optimum = p_max = overhead = 0.0
    if info.coding in ("fixed", "single", "pair"):
        symbols, _ = quantize(x, grid)
        counts = torch.bincount(symbols, minlength=2**info.num_bits)
        p = counts[counts > 0].double() / n
        entropy, p_max = float(-(p * p.log2()).sum()) + 0.0, float(p.max())
        fixed = info.num_bits * n / 8
        if info.total_bytes > 1.005 * fixed + 128:
            violations.append(f"{info.total_bytes} bytes, fixed-width symbols take {fixed}")
        lengths = code_lengths(counts, min(max(info.num_bits + 4, 12), 15))
        optimum = float((counts * lengths).sum()) / 8
        blocks = -(-n // (32 * info.block_steps))
        overhead = (info.payload_bytes - optimum) / blocks
        if name.startswith("range") and info.coding == "single":
            if overhead > MOST_OVERHEAD:
                violations.append(f"{overhead} bytes a block above the optimum")
            if overhead < LEAST_OVERHEAD and distribution not in ("sparse", "constant", "uniform"):
                violations.append(f"{overhead} bytes a block above the optimum: less than possible")
        if entropy >= 2.2 and p_max <= 0.4 and 8 * optimum / n > 1.05 * entropy:
            violations.append(f"the optimum is {8 * optimum / n / entropy} of the entropy")
    return Row(
        distribution, n, name, info.num_bits, info.coding, entropy, p_max, 8 * optimum / n, 8 * info.payload_bytes / n,
        8 * info.total_bytes / n, overhead, violations,
    )  # fmt: skip


def show(rows: list[Row], elements: int) -> None:
    table = Table(title=f"Bits a value, all headers counted, and the entropy H; {elements:,} values; coding chosen")
    table.add_column("grid")
    for distribution in DISTRIBUTIONS:
        table.add_column(distribution, justify="right")
    for name in GRIDS:
        found = {row.distribution: row for row in rows if row.grid == name and row.elements == elements}
        cells = [f"{found[d].total:.3f} ({found[d].entropy:.3f}) {found[d].coding}" for d in DISTRIBUTIONS]
        table.add_row(name, *cells)
    Console(width=160).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--elements", type=int, nargs="+", default=list(SIZES), metavar="N")
    parser.add_argument("--quick", action="store_true", help="up to 10,000 elements: does it run?")
    args = parser.parse_args()
    sizes = [n for n in args.elements if n <= 10_000] if args.quick else args.elements
    cases = [(d, n, name) for n in sizes for d in DISTRIBUTIONS for name in GRIDS]
    rows = [measure(*case) for case in track(cases, disable=not sys.stderr.isatty())]
    show(rows, max(sizes))
    broken = [
        f"{row.distribution}, {row.elements} elements, {row.grid}: {text}" for row in rows for text in row.violations
    ]
    print(f"{len(rows)} packets, {len(broken)} broken promises", *broken, sep="\n")
    if args.json:
        document = {
            "command": " ".join(["python", *sys.argv]),
            "torch": torch.__version__,
            "rows": list(map(asdict, rows)),
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
