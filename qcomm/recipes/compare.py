"""The comparison of gradient exchanges, which repeats one training with each of them and prints one table."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from qcomm.recipes.config import TrainConfig
from qcomm.recipes.train import TrainResult, train

_HEADINGS = (
    "method",
    "test accuracy",
    "bits/element, phase 1",
    "phase 2",
    "mean of both",
    "of all tensors",
    "MB sent per rank",
    "s communicating",
    "images/s",
)


def comparison_configs(base: TrainConfig) -> list[TrainConfig]:
    """Returns the runs of the comparison: fp32, bf16, and qcomm at one and two standard deviations a step.

    Example:
        >>> [config.label for config in comparison_configs(TrainConfig())]
        ['fp32', 'bf16', 'qcomm k=1', 'qcomm k=2']
    """
    plain = [replace(base, method=method) for method in ("fp32", "bf16")]
    return plain + [replace(base, method="qcomm", grid="sigma", step=step) for step in (1.0, 2.0)]


def run_all(configs: Sequence[TrainConfig]) -> None:
    """Trains every configuration in the present process group; rank 0 prints the table and writes the results."""
    results = [train(config) for config in configs]
    if dist.get_rank() != 0:
        return
    print_table(results)
    if len(results) > 1:
        print(verdict(results))
    out = configs[0].out
    if out is not None:
        path = Path(out, "comparison.json" if len(results) > 1 else f"{configs[0].slug}.json")
        document = {"torch": torch.__version__, "ranks": dist.get_world_size(), "runs": [r.to_json() for r in results]}
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"Results: {path}; one line per epoch: {', '.join(f'{config.slug}.jsonl' for config in configs)}")


def _row(result: TrainResult) -> tuple[str, ...]:
    stats = result.stats
    return (
        result.config.label,
        f"{result.test_accuracy:.2%} ± {result.standard_error:.2%}",
        f"{stats['bits_per_element_phase1']:.3f}",
        f"{stats['bits_per_element_phase2']:.3f}",
        f"{stats['bits_per_element_compressed']:.3f}",
        f"{stats['bits_per_element']:.3f}",
        f"{stats['bytes_sent'] / 1e6:.2f}",
        f"{stats['communication_seconds']:.2f}",
        f"{result.images_per_second:.0f}",
    )


def print_table(results: Sequence[TrainResult]) -> None:
    """Prints one row per run: a drawn table on a terminal, aligned text elsewhere."""
    rows = [_row(result) for result in results]
    if sys.stdout.isatty():
        table = Table()
        for index, heading in enumerate(_HEADINGS):
            table.add_column(heading, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    else:
        widths = [max(len(line[column]) for line in (_HEADINGS, *rows)) for column in range(len(_HEADINGS))]
        print()
        for line in (_HEADINGS, *rows):
            cells = [line[0].ljust(widths[0])] + [
                cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)
            ]
            print("  ".join(cells))
    print(
        "Bits: all headers counted; of the gradients that are compressed, in the last column of all gradients. "
        "MB: of qcomm every byte handed to the collectives; of fp32 and bf16 what a ring sends, 2 (W - 1) / W times "
        "the bytes handed to all_reduce. Seconds: the wait for the slower rank included."
    )


def verdict(results: Sequence[TrainResult]) -> str:
    """Says in one sentence whether each compressed run is within two standard errors of the first run.

    The standard error is that of the difference of two independent binomial shares.
    """
    base, parts = results[0], []
    for result in results[1:]:
        if result.config.method != "qcomm":
            continue
        difference = result.test_accuracy - base.test_accuracy
        error = math.hypot(result.standard_error, base.standard_error)
        place = "within" if abs(difference) <= 2 * error else "outside"
        parts.append(
            f"{result.config.label} is {100 * difference:+.2f} points from {base.config.label}, "
            f"{place} two standard errors ({200 * error:.2f})"
        )
    return "; ".join(parts) + "."
