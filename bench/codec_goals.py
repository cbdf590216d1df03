"""The goals of bench_codec.py's figures: ratios that must be reached, and speeds that are aimed at."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from codec_results import Results
from codec_timing import Key, Spread, fastest, gb_per_s, quotient
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Goal:
    """A figure and its limit. ``value`` is None where a peer is missing."""

    what: str
    value: Spread | None
    sense: str  # ">=" or "<="
    limit: float
    unit: str  # "x" for ratios, "GB/s"
    binding: bool
    note: str = ""

    @property
    def verdict(self) -> str:
        """Reached or missed by p10 to p90 of the rounds; where the limit is between them, one run cannot tell."""
        if self.value is None:
            return "not available"
        within = (lambda x: x >= self.limit) if self.sense == ">=" else (lambda x: x <= self.limit)
        outcomes = {within(self.value.low), within(self.value.high)}
        return "undecided" if len(outcomes) > 1 else "reached" if outcomes == {True} else "missed"


# GB/s of float32 input on one core: version of the inner loops -> limit; data set, codec, stage.
SPEEDS: tuple[tuple[str, str, str, dict[str, float]], ...] = (
    ("a", "qcomm", "encode", {"avx512": 5.0, "avx2": 3.5, "scalar": 1.5}),
    ("b", "qcomm", "encode", {"avx512": 3.7, "avx2": 3.5, "scalar": 1.5}),
    ("a", "qcomm k=1", "encode", {"avx512": 7.0, "avx2": 4.0, "scalar": 1.5}),
    ("b", "qcomm k=1", "encode", {"avx512": 7.0, "avx2": 4.0, "scalar": 1.5}),
    ("c", "qcomm", "encode", {"avx512": 3.3, "avx2": 3.0, "scalar": 1.4}),
    ("a", "qcomm", "decode", {"avx512": 11.0, "avx2": 8.0, "scalar": 2.3}),
    ("b", "qcomm", "decode", {"avx512": 11.0, "avx2": 8.0, "scalar": 2.3}),
    ("c", "qcomm", "decode", {"avx512": 10.0, "avx2": 6.5, "scalar": 2.3}),
    ("a", "qcomm", "accumulate", {"avx512": 10.0, "avx2": 6.5, "scalar": 2.0}),
    ("b", "qcomm", "accumulate", {"avx512": 10.0, "avx2": 6.5, "scalar": 2.0}),
)
# Bits with all headers over the entropy of the symbols: see Results.over_entropy.
SIZES = {
    "a, S=512": 1.04,
    "a, S=128": 1.07,
    "b, S=512": 1.012,
    "c, S=512": 1.02,
    "pair code, k=2, Laplace": 1.10,
    "pair code, k=2, Gaussian": 1.10,
}


def goals(results: Results, features: Sequence[str]) -> list[Goal]:
    """All of them, with the fastest inner loops where nothing else is said."""
    return [*coder_goals(results, features[-1]), *size_goals(results), *speed_goals(results, features)]


def coder_goals(results: Results, version: str) -> Iterator[Goal]:
    def ratio(data_set: str, mine: Key, other: Key | None) -> Spread | None:
        """How many times faster ``mine`` is."""
        times = results.times[data_set]
        return None if other is None or mine not in times or other not in times else quotient(times[other], times[mine])

    for data_set, encode_limit, decode_limit in ("a", 1.0, 1.1), ("b", 1.0, 1.5):
        for stage, limit in ("encode", encode_limit), ("decode", decode_limit):
            other = fastest(results.times[data_set], "Huff0", stage)
            for more in "", ", no checksums":
                what = f"{data_set}: symbol stage, {stage}, to Huff0's fastest{more}"
                value = ratio(data_set, (f"symbol stage {version}{more}", stage), other)
                yield Goal(what, value, ">=", limit, "x", True, " ".join(other or ()))
    qcomm = f"qcomm {version}"
    for data_set in "a", "c":
        for stage, limit in ("encode", 4.0), ("decode", 2.0):
            value = ratio(data_set, (qcomm, stage), ("zstd -1", stage))
            yield Goal(f"{data_set}: {stage} to zstd -1", value, ">=", limit, "x", True)
    for stage, limit in ("encode", 0.25), ("decode", 0.5):
        yield Goal(f"a: {stage} to memcpy", ratio("a", (qcomm, stage), ("memcpy", "copy")), ">=", limit, "x", True)
    for data_set, grid in ("a", " k=1"), ("b", " k=1"), ("a", ""):
        times, codec = results.times[data_set], f"qcomm{grid} {version}"
        value = quotient(times[codec, "encode_ef"], times[codec, "encode"])
        what = f"{data_set},{grid or ' range grid'}: time of encode_ef to encode"
        yield Goal(what, value, "<=", 1.6, "x", True)


def size_goals(results: Results) -> Iterator[Goal]:
    for what, limit in SIZES.items():
        size = results.over_entropy[what]
        yield Goal(f"bits over entropy: {what}", Spread(size, size, size), "<=", limit, "x", True)


def speed_goals(results: Results, features: Sequence[str]) -> Iterator[Goal]:
    for data_set, codec, stage, limits in SPEEDS:
        for version, limit in limits.items():
            value = None
            if version in features:
                value = gb_per_s(4 * results.count, results.times[data_set][f"{codec} {version}", stage])
            grid = codec.removeprefix("qcomm").strip() or "range grid"
            yield Goal(f"{data_set}, {grid}: {stage}, {version}", value, ">=", limit, "GB/s", False)


def show_goals(console: Console, rows: Sequence[Goal]) -> None:
    table = Table(title="Goals: median (p10-p90) of the rounds")
    for heading in ("what", "figure", "goal", "verdict", "compared with"):
        table.add_column(heading, justify="right" if heading in ("figure", "goal") else "left")
    for i, row in enumerate(rows):
        if i > 0 and row.binding != rows[i - 1].binding:
            table.add_section()
        figure = "" if row.value is None else f"{row.value.median:.3f} ({row.value.low:.3f}-{row.value.high:.3f})"
        colour = {"reached": "green", "missed": "red" if row.binding else "yellow"}.get(row.verdict, "default")
        table.add_row(
            row.what, figure, f"{row.sense} {row.limit:g} {row.unit}", f"[{colour}]{row.verdict}[/]", row.note
        )
    console.print(table)
    for kind, some in ("binding", True), ("other", False):
        verdicts = Counter(row.verdict for row in rows if row.binding == some)
        console.print(f"{kind} goals: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
