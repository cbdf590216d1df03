"""Puts figures of bench/results into the Markdown files, so that no number is copied by hand.

    python tools/make_tables.py            rewrite the tables
    python tools/make_tables.py --check    only say whether they are up to date; exits 1 if not

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is one of TABLES. What makes them is in
tools/result_tables.
"""

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from result_tables import beyond_gradients, kernels, network, planning, studies, training

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "csrc/cuda/README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

TABLES: dict[str, Callable[[], str]] = {
    "partitions": studies.partitions,
    "summary": network.summary,
    "train": training.train,
    "accuracy": training.accuracy,
    "accuracy_low_rate": training.accuracy_low_rate,
    "transformer": training.transformer,
    "memory": training.memory,
    "allreduce": network.allreduce,
    "allreduce_low_rate": partial(network.allreduce, "allreduce_low_rate.json", network.LOW_RATE_METHODS),
    "allreduce_low_rate_4": partial(network.allreduce, "allreduce_low_rate_4.json", network.LOW_RATE_METHODS),
    "wan": network.wan,
    "wan_check": network.wan_check,
    "wan_lossy": network.wan_lossy,
    "wan_auto": network.wan_auto,
    "several_under_way": network.several_under_way,
    "averaging": beyond_gradients.averaging,
    "diloco": beyond_gradients.diloco,
    "fsdp_accuracy": beyond_gradients.fsdp_accuracy,
    "beyond_ddp": beyond_gradients.beyond,
    "planner_check": planning.planner_check,
    "published": planning.published,
    "published_halves": planning.published_halves,
    "published_check": planning.published_check,
    "pairs": network.pairs,
    "step": network.step,
    "time_to_accuracy": training.time_to_accuracy,
    "noise_overhead": training.noise_overhead,
    "cuda_cures": kernels.cuda_cures,
    "cuda_model": kernels.cuda_model,
    **{f"study_{name.replace('-', '_')}": partial(studies.study, name) for name in studies.STUDIES},
    **{f"paper_{name.replace('-', '_')}": partial(studies.paper, name) for name in studies.PAPER},
}


def table(name: str) -> str:
    """A table, or that there is none yet."""
    try:
        return TABLES[name]()
    except FileNotFoundError as error:
        return f"Not measured yet: there is no {Path(error.filename).name}.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text()
        filled = MARKED.sub(lambda match: f"{match[1]}{table(match[2])}{match[3]}", text)
        if filled != text:
            stale.append(page.name)
            if not check:
                page.write_text(filled)
    if check and stale:
        print(f"tables are not those of bench/results in {', '.join(stale)}: run python tools/make_tables.py")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
