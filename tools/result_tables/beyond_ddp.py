"""Rows of the comparison "Beyond DDP" of docs/measurements.md: DiLoCo and sharded models, each with command and file.

A row whose runs are not in bench/results says "unmeasured", so that the table has the same rows before and after them.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Read = Callable[[str], Any]
UNMEASURED = "unmeasured"
HEADINGS = ["method", "compared with", "result", "bits", "command", "file"]

# (method, period) of bench_diloco, at 600 steps.
DILOCO = (
    *(("fp32", 30), ("k=1", 30), ("k=1 streamed", 30), ("k=2", 30), ("sparse=1", 30)),
    *(("fp32", 100), ("k=1", 100), ("k=2", 100), ("k=2/2", 100), ("sparse=1", 100)),
)
DILOCO_STEPS = 600
SHARDED = {"resnet20": ("k=1", "k=1 weights", "k=3.2"), "gpt": ("k=0.5", "k=1", "k=1 weights", "k=3.2")}
TASKS = {"resnet20": "ResNet-20", "gpt": "transformer"}
UNITS = {"resnet20": ("points", 2), "gpt": ("nats", 4)}
WORLDS = (2, 4)
RATES = {"1gbit": "1 Gb/s", "100mbit": "100 Mb/s"}
TIMED = ("gradients k=1", "gradients k=1, weights")


def rows(read: Read) -> list[list[str]]:
    """Returns the cells of all rows; ``read`` returns a document of bench/results by its name."""
    return [*_diloco(read), *_hidden(read), *_sharded(read), *_step_times(read), *_others()]


def _load(read: Read, name: str) -> Any:
    """Returns a document, or one without rows if there is none."""
    try:
        return read(name)
    except FileNotFoundError:
        return {"summary": [], "rows": []}


def _row(method: str, beside: str, result: str | None, bits: str, command: str, file: str) -> list[str]:
    link = f"[{file}](../bench/results/{file})" if result is not None and file else ""
    return [
        method,
        beside,
        UNMEASURED if result is None else result,
        bits,
        f"`python bench/{command}`" if command else "",
        link,
    ]


def _difference(found: Mapping[str, Any], unit: str, digits: int) -> str:
    text = f"{found['difference']:+.{digits}f} {unit}"
    if found["interval"] is None:
        return text
    low, high = found["interval"]
    return f"{text} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _diloco(read: Read) -> Iterator[list[str]]:
    summary = {
        (row["method"], row["period"]): row
        for row in _load(read, "diloco.json")["summary"]
        if row["steps"] == DILOCO_STEPS
    }
    for method, period in DILOCO:
        name = f"sparse DiLoCo ({method})" if method.startswith("sparse") else f"DiLoCo {method}"
        command = f"bench_diloco.py --periods {period} --methods {repr(method) if ' ' in method else method}"
        of_fp32 = method == "fp32"
        mode = " streamed" if method.endswith(" streamed") else ""
        beside = "fp32 in every step" if of_fp32 else f"fp32 DiLoCo{mode}"
        row = summary.get((method, period))
        key = "minus_ddp" if of_fp32 else "minus_fp32"
        result, bits = None, ""
        if row is not None and key in row:
            verdict = "" if of_fp32 else f", {row['verdict']}"
            result = f"{_difference(row[key], 'nats', 3)}, {row['seeds']} seeds{verdict}"
            ways = [row.get(f"bits_of_{way}") for way in ("values", "means", "headers")]
            bits = f"{row['bits_sent']:.3g} sent in all"
            if method.startswith("sparse"):
                bits = f"sent {row['bits_sent']:.3g}, received {row['bits_received']:.3g}"
            elif None not in ways:
                bits = "values {:.3g}, means {:.3g}, headers {:.2g}".format(*ways)
        yield _row(f"{name}, H={period}", beside, result, bits, command, "diloco.json")


def _hidden(read: Read) -> Iterator[list[str]]:
    found = {
        row["method"]: row for row in _load(read, "diloco_wan.json")["rows"] if "hidden" in row and row["delay"] > 0
    }
    for method in ("k=1", "k=2"):
        result, bits, row = None, "", found.get(method)
        if row is not None:
            result, bits = f"{100 * row['hidden']:.1f} % of the wait is hidden", f"{row['bits_sent']:.3g} sent in all"
        command = "bench_diloco_wan.py"
        yield _row(f"DiLoCo {method} with a delay, 4 hosts, 10 Mb/s", "no delay", result, bits, command,
                   "diloco_wan.json")  # fmt: skip


def _sharded(read: Read) -> Iterator[list[str]]:
    summary = {(row["task"], row["ranks"], row["method"]): row for row in _load(read, "fsdp_accuracy.json")["summary"]}
    for task, methods in SHARDED.items():
        for ranks in WORLDS:
            for method in methods:
                result, bits, row = None, "", summary.get((task, ranks, method))
                if row is not None and "minus_fp32" in row:
                    difference = _difference(row["minus_fp32"], *UNITS[task])
                    result = f"{difference}, {row['seeds']} seeds of {row['steps']} steps, {row['verdict']}"
                    bits = f"gradients {row['bits_of_gradients']:.2f}, weights {row['bits_of_weights'] or 32:.3g}"
                name = f"FSDP2 {method.replace(' weights', ', weights of 8 bits')}, {TASKS[task]}, {ranks} ranks"
                steps = "" if row is None else f" --steps {row['steps']}"
                command = f"bench_fsdp_accuracy.py --tasks {task} --worlds {ranks}{steps}"
                yield _row(name, "fp32 FSDP2", result, bits, command, "fsdp_accuracy.json")


def _step_times(read: Read) -> Iterator[list[str]]:
    found = {(row["rate"], row["ranks"], row["method"]): row for row in _load(read, "fsdp.json")["rows"]}
    for ranks, (rate, shown), method in itertools.product(WORLDS, RATES.items(), TIMED):
        result, bits, row = None, "", found.get((rate, ranks, method))
        if row is not None:
            result = f"{1 / row['seconds_to_bf16']:.2f} times as fast a step"
            bits = f"{100 * row['bytes_to_bf16']:.0f} % of the bytes"
        # Short sequences: in longer ones this machine's processor hides the links.
        command = f"bench_fsdp.py --rates {rate} --worlds {ranks} --context 4"
        yield _row(f"FSDP2 {method}, {ranks} hosts, {shown}", "bf16 FSDP2", result, bits, command, "fsdp.json")


def _others() -> Iterator[list[str]]:
    """Rows of what only tests have run: there is no bench of it."""
    for name, beside in (
        ("HSDP 2 x 2, compressed across replicas", "bf16 HSDP"),
        ("DiLoCo of torchft over qcomm", "torchft in 8 bits"),
        ("ZeRO-1 and post-local SGD on the hook", "fp32"),
    ):
        yield _row(name, beside, None, "", "", "")
