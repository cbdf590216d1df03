"""Puts figures of bench/results into the Markdown files, so that no number is copied by hand.

    python tools/make_tables.py            rewrite the tables
    python tools/make_tables.py --check    only say whether they are up to date; exits 1 if not

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a function below.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "paper.md")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def train() -> str:
    """``make train``: accuracy, bits, bytes and seconds of each method."""
    rows = []
    for run in read("train_digits.json")["runs"]:
        stats = run["stats"]
        accuracy = f"{100 * run['test_accuracy']:.2f} ± {100 * run['standard_error']:.2f} %"
        bits = [f"{stats[f'bits_per_element{part}']:.2f}" for part in ("_phase1", "_phase2", "_compressed", "")]
        sent, seconds = f"{stats['bytes_sent'] / 1e6:.1f}", f"{stats['communication_seconds']:.1f}"
        rows.append([run["label"], accuracy, *bits, sent, seconds, f"{run['images_per_second']:.0f}"])
    return markdown(
        ["method", "test accuracy", "bits, phase 1", "phase 2", "both", "with small tensors", "MB sent a rank",
         "s communicating", "images/s"],
        rows,
    )  # fmt: skip


def accuracy() -> str:
    """``bench/bench_accuracy.py``: mean over seeds and the paired difference from fp32."""
    document = read("accuracy.json")
    rows = []
    for row in document["summary"]:
        difference = interval = ""
        if "difference" in row:
            difference = f"{row['difference']:+.2f}"
            interval = f"{row['interval'][0]:+.2f} … {row['interval'][1]:+.2f}"
        bits = f"{row['bits_per_element_phase1']:.2f}", f"{row['bits_per_element_phase2']:.2f}"
        rows.append(
            [
                row["label"],
                f"{row['mean_accuracy']:.2f} %",
                difference,
                interval,
                *bits,
                f"{row['bytes_sent'] / 1e6:.0f}",
            ]
        )
    return markdown(
        ["method", "mean accuracy", "minus fp32", "95 % interval", "bits, phase 1", "phase 2", "MB sent a rank"],
        rows,
    )


def allreduce() -> str:
    """``bench/bench_allreduce.py``: milliseconds of one bucket, and how many times faster than fp32 and bf16."""
    rows = []
    for row in read("allreduce.json")["rows"]:
        if row["method"] not in ("fp32", "bf16", "qcomm k=1", "qcomm k=2"):
            continue
        rate = {"100mbit": "100 Mb/s", "1gbit": "1 Gb/s"}.get(row["rate"], row["rate"])
        spread = f"{1e3 * row['p10']:.0f} … {1e3 * row['p90']:.0f}"
        ratios = f"{row['ratio_to_fp32']:.1f}", f"{row['ratio_to_bf16']:.1f}"
        place = f"{rate}, {row['world_size']} ranks"
        rows.append(
            [place, row["method"], f"{1e3 * row['seconds']:.0f}", spread, *ratios, f"{row['bytes_sent'] / 1e6:.2f}"]
        )
    return markdown(["link", "method", "ms", "p10 … p90", "x fp32", "x bf16", "MB sent a rank"], rows)


def paper(experiment: str) -> str:
    """``qcomm paper``: what the paper says about a quantity, and what was found."""
    document = read(f"paper/{experiment}.json")
    seeds = len({run["seed"] for run in document["runs"]})
    rows = [[claim["quantity"], claim["paper"], claim["here"]] for claim in document["claims"]]
    return markdown([f"{document['settings']['dataset']}, {seeds} seeds", "paper", "here"], rows)


PAPER = ("quantization-levels", "gradient-rms", "entropy", "bit-allocation", "bit-rate", "lossless", "ablation")
TABLES: dict[str, Callable[[], str]] = {
    "train": train,
    "accuracy": accuracy,
    "allreduce": allreduce,
    **{f"paper_{name.replace('-', '_')}": partial(paper, name) for name in PAPER},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text()
        filled = MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}{match[3]}", text)
        if filled != text:
            stale.append(page.name)
            if not check:
                page.write_text(filled)
    if check and stale:
        print(f"tables are not those of bench/results in {', '.join(stale)}: run python tools/make_tables.py")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
