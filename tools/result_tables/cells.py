"""What all tables are made of: documents of bench/results, and rows as Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"

RATES = {"100mbit": "100 Mb/s", "1gbit": "1 Gb/s", "none": "loopback"}


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def measured_on(document: Any) -> str:
    """How busy the machine was already, which the other columns cannot tell."""
    return f"\nLoad average before the run: {document['load'][0]:.1f} on {document['cores']} cores.\n"
