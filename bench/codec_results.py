"""The figures of a run of bench_codec.py, and their table."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from codec_data import SymbolStatistics
from codec_timing import Spread, Times, gb_per_s
from rich.console import Console
from rich.table import Table


@dataclass
class Results:
    """What was measured, by data set and codec."""

    count: int  # float32 values in a data set
    times: dict[str, Times] = field(default_factory=dict)
    statistics: dict[str, SymbolStatistics] = field(default_factory=dict)
    bits: dict[str, dict[str, float]] = field(default_factory=dict)  # of a value, all headers counted
    counts: dict[str, int] = field(default_factory=dict)  # values that a codec works on, where they are not all
    over_entropy: dict[str, float] = field(default_factory=dict)  # packets' bits over their symbols' entropy


@dataclass(frozen=True)
class Figure:
    """A codec on a data set."""

    data_set: str
    codec: str
    bits: float | None  # of a value, all headers counted
    entropy: float  # of the range grid's symbols
    gb_per_s: dict[str, Spread]  # stage -> speed in bytes of float32 input


def figures(results: Results) -> list[Figure]:
    rows = []
    for name, times in results.times.items():
        for codec in dict.fromkeys(codec for codec, _ in times):
            nbytes = 4 * results.counts.get(codec, results.count)
            speeds = {stage: gb_per_s(nbytes, seconds) for (of, stage), seconds in times.items() if of == codec}
            bits, entropy = results.bits[name].get(codec), results.statistics[name].entropy
            rows.append(Figure(name, codec, bits, entropy, speeds))
    return rows


def show_figures(console: Console, rows: Sequence[Figure]) -> None:
    table = Table(title="GB/s of float32 input, one core: median (p10-p90)")
    columns = ("encode", "encode_ef", "decode", "accumulate")
    for heading in ("data", "codec", "bits", *columns):
        table.add_column(heading, justify="left" if heading in ("data", "codec") else "right")
    previous = ""
    for row in rows:
        if row.data_set != previous:
            table.add_section()
            previous = row.data_set
        cells = []
        for stage in columns:
            found = {key: speed for key, speed in row.gb_per_s.items() if key.split(" ")[0] == stage}
            if row.codec == "memcpy":  # to compare with both
                found = {stage: row.gb_per_s["copy"]} if stage in ("encode", "decode") else {}
            cells.append(", ".join(f"{key[len(stage) :]} {cell(speed)}".strip() for key, speed in found.items()))
        table.add_row(row.data_set, row.codec, "" if row.bits is None else f"{row.bits:.4f}", *cells)
    console.print(table)


def cell(speed: Spread) -> str:
    return f"{speed.median:.2f} ({speed.low:.2f}-{speed.high:.2f})"
