#!/usr/bin/env python3
"""Writes the static code tables of the packet format.

They go to csrc/include/qcomm/static_tables.h and qcomm/reference/static_tables.py.

    python tools/make_static_tables.py            # writes both files
    python tools/make_static_tables.py --check    # exits 1 when they differ from what would be written
    python tools/make_static_tables.py --report   # what the tables cost above the entropy; writes nothing

The tables are part of the wire format: once released they never change, new ones get new numbers. They are code lengths
for a model of gradients relative to their RMS:

- one value: the mean of a Gaussian and a Laplace distribution of unit variance. Gradients of convolutions lie between
  the two (excess kurtosis 1 to 2.5).
- two neighbours: one quarter independent values as above, three quarters a Gaussian pair with correlation 0.4 whose
  common scale is log-normal (sigma 0.3). Neighbours in a convolution's kernel see nearly the same inputs: in a
  ResNet-20 on Fashion-MNIST their correlation is 0.3 to 0.8, so that a pair code beats the entropy of single values.

- zero runs: values that are not zero with probability p, each independent of the others, as where a coarse step leaves
  few of them. Of those that are not zero, 97 % are levels -1 and 1, 2.8 % are -2 and 2, the rest -3 and 3.

Every symbol gets a floor of 2^-16 of the probability, an escape 2^-11: no symbol is without a code, and none is dear.
"""

import argparse
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 12
SYMBOL_FLOOR = 2.0**-16
ESCAPE_PROBABILITY = 2.0**-11
CORRELATION = 0.4
SCALE_SIGMA = 0.3
CORRELATED_PART = 0.75
WEIGHT_UNIT = 2.0**40
# Classes of zero runs, (shortest run, extra bits): single runs to 7, then four classes an octave, at most 5 extra bits.
RUN_CLASSES = [
    *((run, 0) for run in range(8)),
    *(
        (base + i * (1 << extra), extra)
        for base, extra in ((8, 1), (16, 2), (32, 3), (64, 4), (128, 5))
        for i in range(4)
    ),
    *((256 + 32 * i, 5) for i in range(8)),
]
RUN_LIMIT = 11
SKIP = 512  # zeros of the token that has no value
RUN_LEVELS = {1: 0.97, 2: 0.028, 3: 0.002}  # probability of -level or level
RUN_TABLES = 12


def num_bits(k: float) -> int:
    """The packet format's rule for a sigma grid's alphabet."""
    return next(n for n in range(4, 17) if (2 ** (n - 1) - 0.5) * k >= 6.25)


def gaussian_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def laplace_cdf(x: float) -> float:
    tail = 0.5 * math.exp(-abs(x) * math.sqrt(2))
    return tail if x < 0 else 1 - tail


def level_probabilities(
    k: float, bits: int, cdf: Callable[[float], float], mean: float = 0.0, scale: float = 1.0
) -> list[float]:
    """Of the symbols of a mid-tread grid with step k, the escape symbol last."""
    radius = 2 ** (bits - 1) - 1
    edge = [cdf(((q - 0.5) * k - mean) / scale) for q in range(-radius, radius + 2)]
    return [b - a for a, b in pairwise(edge)] + [ESCAPE_PROBABILITY]


def single_probabilities(k: float, bits: int) -> list[float]:
    pairs = zip(level_probabilities(k, bits, gaussian_cdf), level_probabilities(k, bits, laplace_cdf), strict=True)
    return [(a + b) / 2 for a, b in pairs]


def normal_nodes(count: int) -> list[tuple[float, float]]:
    """(weight, z): a standard normal variable as a fine equidistant sum over [-5, 5]."""
    nodes = [-5 + 10 * i / (count - 1) for i in range(count)]
    weights = [math.exp(-z * z / 2) for z in nodes]
    return [(w / sum(weights), z) for w, z in zip(weights, nodes, strict=True)]


def correlated_probabilities(k: float, bits: int) -> list[list[float]]:
    """Of pairs (first, second): given the common part of both values, and the common scale, they are independent."""
    size = 2**bits
    joint = [[0.0] * size for _ in range(size)]
    for scale_weight, s in normal_nodes(21):
        scale = math.exp(SCALE_SIGMA * s - SCALE_SIGMA**2)  # so that the mixture has unit variance
        for weight, z in normal_nodes(41):
            own = level_probabilities(
                k / scale, bits, gaussian_cdf, math.sqrt(CORRELATION) * z, math.sqrt(1 - CORRELATION)
            )
            for a in range(size):
                for b in range(size):
                    joint[a][b] += scale_weight * weight * own[a] * own[b]
    return joint


def pair_probabilities(k: float) -> list[float]:
    """Of the symbols first | second << 4."""
    gaussian = level_probabilities(k, 4, gaussian_cdf)
    laplace = level_probabilities(k, 4, laplace_cdf)
    joint = correlated_probabilities(k, 4)
    table = []
    for symbol in range(256):
        a, b = symbol & 15, symbol >> 4
        independent = (gaussian[a] * gaussian[b] + laplace[a] * laplace[b]) / 2
        table.append((1 - CORRELATED_PART) * independent + CORRELATED_PART * joint[a][b])
    return table


def package_merge(weights: list[int], limit: int) -> list[int]:
    """Optimal code lengths of at most ``limit`` bits (Larmore and Hirschberg 1990), ties as in the packet format."""
    order = sorted(range(len(weights)), key=lambda s: (weights[s], s))
    leaves = [(weights[s], 0) for s in order]
    levels = [leaves]
    for _ in range(limit - 1):
        below = levels[-1]
        packages = [(below[i][0] + below[i + 1][0], 1) for i in range(0, len(below) - 1, 2)]
        levels.append(sorted(leaves + packages))
    lengths = [0] * len(weights)
    take = 2 * len(weights) - 2
    for level in reversed(levels):
        symbols = sum(1 for item in level[:take] if item[1] == 0)
        for s in order[:symbols]:
            lengths[s] += 1
        take = 2 * (take - symbols)
    return lengths


def run_probabilities(p: float) -> list[float]:
    """Of the tokens of zero runs, where a share ``p`` of the values is not zero: class * 6 + value, then the skip."""
    tokens = []
    for shortest, extra in RUN_CLASSES:
        share = (1 - p) ** shortest - (1 - p) ** (shortest + (1 << extra))
        tokens += [share * RUN_LEVELS[abs(level)] / 2 for level in (-3, -2, -1, 1, 2, 3)]
    return [*tokens, (1 - p) ** SKIP]


def lengths_of(probabilities: list[float], limit: int = LIMIT) -> str:
    weights = [round(max(p, SYMBOL_FLOOR) * WEIGHT_UNIT) for p in probabilities]
    return "".join(f"{n:x}" for n in package_merge(weights, limit))


def make_tables() -> list[tuple[int, int, bool, float, str]]:
    """(number, num_bits, pair, step, one hexadecimal digit a symbol)."""
    tables = []
    for j in range(-13, 9):
        k = 2.0 ** (j / 4)
        tables.append((j + 14, num_bits(k), False, k, lengths_of(single_probabilities(k, num_bits(k)))))
    for j in range(-1, 9):
        k = 2.0 ** (j / 4)
        tables.append((j + 65, 4, True, k, lengths_of(pair_probabilities(k))))
    return tables


def make_run_tables() -> list[str]:
    """One hexadecimal digit a token; table t is for a share of 2^(-(t + 3) / 2)."""
    return [lengths_of(run_probabilities(2.0 ** (-(t + 3) / 2)), RUN_LIMIT) for t in range(RUN_TABLES)]


def make_run_bounds() -> list[int]:
    """Table t + 1 is nearer than t where the share is below 2^(-(2 t + 7) / 4): in units of 2^-32."""
    return [math.floor(2.0 ** (32 - (2 * t + 7) / 4)) for t in range(RUN_TABLES - 1)]


def cpp_header(tables: list[tuple[int, int, bool, float, str]]) -> str:
    lines = [
        "// Written by tools/make_static_tables.py, which describes the model behind it.",
        "// Part of the wire format: entries never change.",
        "#pragma once",
        "",
        "#include <cstdint>",
        "",
        "namespace qcomm {",
        "",
        "struct StaticTable {",
        "    std::uint8_t id;",
        "    std::uint8_t num_bits;",
        "    bool pair;",
        "    float step;           // in units of the RMS: what the table was made for",
        "    const char* lengths;  // one hexadecimal digit a symbol",
        "};",
        "",
        "// clang-format off",
        "inline constexpr StaticTable kStaticTables[] = {",
    ]
    for number, bits, pair, step, lengths in tables:
        chunks = [f'"{lengths[i : i + 64]}"' for i in range(0, len(lengths), 64)]
        lines.append(f"    {{{number}, {bits}, {'true' if pair else 'false'}, {step:.9g}F,")
        lines.extend(f"     {chunk}" for chunk in chunks)
        lines[-1] += "},"
    lines += [
        "};",
        "",
        "// Codes of zero runs, one digit a token: of table t 2^(-(t + 3) / 2) of the values are not zero.",
        f"inline constexpr const char* kRunTables[{RUN_TABLES}] = {{",
    ]
    for lengths in make_run_tables():
        lines.extend(f'    "{lengths[i : i + 100]}"' for i in range(0, len(lengths), 100))
        lines[-1] += ","
    bounds = ", ".join(f"{bound}u" for bound in make_run_bounds())
    lines += [
        "};",
        "// Table t + 1 is the nearer one where the share, in units of 2^-32, is below bound t.",
        f"inline constexpr std::uint32_t kRunTableBounds[{RUN_TABLES - 1}] = {{",
        f"    {bounds}}};",
    ]
    lines += ["// clang-format on", "", "}  // namespace qcomm", ""]
    return "\n".join(lines).replace(" 1F,", " 1.0F,").replace(" 2F,", " 2.0F,").replace(" 4F,", " 4.0F,")


def python_module(tables: list[tuple[int, int, bool, float, str]]) -> str:
    lines = [
        '"""Static code tables of the packet format, for qcomm.reference. Written by tools/make_static_tables.py."""',
        "",
        "# number: (num_bits, pair, code lengths as one hexadecimal digit a symbol)",
        "STATIC_TABLES: dict[int, tuple[int, bool, str]] = {",
    ]
    for number, bits, pair, _, lengths in tables:
        lines.append(f"    {number}: (")
        lines.append(f"        {bits},")
        lines.append(f"        {pair},")
        chunks = [f'"{lengths[i : i + 64]}"' for i in range(0, len(lengths), 64)]
        lines.extend(f"        {chunk}" for chunk in chunks)
        lines[-1] += ","
        lines.append("    ),")
    lines += [
        "}",
        "",
        "# one hexadecimal digit a token of zero runs",
        "RUN_TABLES: tuple[str, ...] = (",
    ]
    for lengths in make_run_tables():
        chunks = [f'"{lengths[i : i + 100]}"' for i in range(0, len(lengths), 100)]
        lines += [f"    {chunk}" for chunk in chunks]
        lines[-1] += ","
    lines += [")", "RUN_TABLE_BOUNDS = (", *(f"    {bound}," for bound in make_run_bounds()), ")"]
    return "\n".join([*lines, ""])


def student_t3_cdf(x: float) -> float:
    """Of unit variance, where the usual form has three: heavier tails than gradients have."""
    return 0.5 + (x / (1 + x * x) + math.atan(x)) / math.pi


DATA = {"Gaussian": gaussian_cdf, "Laplace": laplace_cdf, "Student-t(3)": student_t3_cdf}
REPORTED_STEPS = (0.25, 0.5, 1.0, 1.4, 2.0, 2.8, 4.0)


def cost(k: float, cdf: Callable[[float], float], bits: int, pair: bool, lengths: str) -> tuple[float, float]:
    """(bits a value, entropy in bits a value) of independent values of unit RMS; escapes count as symbols only."""
    p = level_probabilities(k, bits, cdf)[:-1]
    p.append(max(0.0, 1 - math.fsum(p)))
    entropy = -math.fsum(q * math.log2(q) for q in p if q > 0)
    length = [int(digit, 16) for digit in lengths]
    if pair:
        return math.fsum(p[s & 15] * p[s >> 4] * n for s, n in enumerate(length)) / 2, entropy
    return math.fsum(q * n for q, n in zip(p, length, strict=True)), entropy


def report(tables: list[tuple[int, int, bool, float, str]]) -> str:
    """A line for each step, distribution and kind of code."""
    lines = [f"{'step':>5}  {'data':<13} {'code':<7} {'entropy':>7} {'bits':>7} {'excess':>7} {'ratio':>6}"]
    for k in REPORTED_STEPS:
        nearest = min((abs(math.log2(k / t[3])), t[3]) for t in tables)[1]
        for name, cdf in DATA.items():
            for _, bits, pair, step, lengths in tables:
                if step == nearest:
                    spent, entropy = cost(k, cdf, bits, pair, lengths)
                    figures = f"{entropy:7.4f} {spent:7.4f} {spent - entropy:7.4f} {spent / entropy:6.3f}"
                    lines.append(f"{k:5}  {name:<13} {'pair' if pair else 'single':<7} {figures}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--report", action="store_true", help="print bits a value against the entropy; write nothing")
    arguments = parser.parse_args()
    check, tables = arguments.check, make_tables()
    if arguments.report:
        print(report(tables))
        return 0
    outputs = {
        ROOT / "csrc/include/qcomm/static_tables.h": cpp_header(tables),
        ROOT / "qcomm/reference/static_tables.py": python_module(tables),
    }
    stale = [path for path, text in outputs.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{'differs' if check else 'wrote'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(outputs[path])
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
