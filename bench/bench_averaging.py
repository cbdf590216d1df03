"""The accuracy that compressed averaging costs: local SGD on Fashion-MNIST, weights averaged every 8 steps on 4 ranks.

    python bench/bench_averaging.py [--json FILE] [--seeds 3] [--epochs 5] [--quick]

The network is small: 784-256-128-10 with BatchNorm before each ReLU, 235,530 parameters. One seed
gives torch's PeriodicModelAverager and all of qcomm's the same weights, images and order, so that differences are
paired. Bytes are those that a rank sends; of torch's all-reduce what a ring sends, 2 (W - 1) / W times the parameters.
Exits non-zero if differences at k = 1 lose more than half a point or send more than an eighth of the bytes.

Runs that FILE already holds (same settings) are not repeated, so that an interrupted bench continues.
"""

import argparse
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scipy import stats
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn import functional

import qcomm
from qcomm.recipes.datasets import Dataset, load_dataset
from qcomm.recipes.launch import launch

RANKS = 4
ALLOWED_LOSS = 0.5  # points of accuracy
ALLOWED_BYTES = 1 / 8
METHODS: dict[str, Callable[[nn.Module, int], Any]] = {
    "fp32": lambda _, period: PeriodicModelAverager(period),
    "difference k=1": lambda _, period: averager(period),
    "difference k=2": lambda _, period: averager(period, grid=qcomm.SigmaGrid(step=2.0)),
    "difference k=1, buffers": lambda model, period: averager(period, buffers_of=model),
    "weights, paper": lambda _, period: averager(period, exchange="weights", grid=qcomm.RangeGrid("paper")),
}


def averager(period: int, **options: Any) -> qcomm.CompressedModelAverager:
    """One that compresses also where the network is faster than the codec, as it is here."""
    return qcomm.CompressedModelAverager(period, strategy="two_phase", **options)


@dataclass(frozen=True)
class Case:
    """What a run depends on."""

    method: str
    seed: int
    epochs: int
    train_images: int
    period: int = 8
    batch_size: int = 32  # of one rank
    learning_rate: float = 0.05
    momentum: float = 0.9
    network: str = "784-256-128-10"


def network() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(28 * 28, 256, bias=False),
        nn.BatchNorm1d(256),
        nn.ReLU(),
        nn.Linear(256, 128, bias=False),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def inputs(data: Dataset, images: torch.Tensor) -> torch.Tensor:
    """Without the border that the data set adds to 28 x 28 pixels."""
    return data.normalise(images[:, :, 2:30, 2:30])


def train(case: Case, data: Dataset) -> dict[str, Any]:
    """One run: rank 0's model is tested, with rank 0's BatchNorm statistics unless they are averaged too."""
    torch.manual_seed(case.seed)
    model = network()
    average = METHODS[case.method](model, case.period)
    optimizer = torch.optim.SGD(model.parameters(), lr=case.learning_rate, momentum=case.momentum)
    rank, per_epoch = dist.get_rank(), case.train_images // (RANKS * case.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, case.learning_rate, total_steps=case.epochs * per_epoch)
    averagings, begin = 0, time.perf_counter()
    for epoch in range(case.epochs):
        order = torch.randperm(case.train_images, generator=torch.Generator().manual_seed(1000 * case.seed + epoch))
        for mine in order[rank::RANKS].split(case.batch_size)[:per_epoch]:
            optimizer.zero_grad()
            output = model(inputs(data, data.train.images[mine]))
            functional.cross_entropy(output, data.train.labels[mine]).backward()
            optimizer.step()
            averagings += average.step % case.period == 0
            average.average_parameters(model.parameters())
            schedule.step()
    seconds = time.perf_counter() - begin
    correct = 0
    if rank == 0:
        model.eval()
        with torch.no_grad():
            output = model(inputs(data, data.test.images))
        correct = int((output.argmax(1) == data.test.labels).sum())
    parameters = sum(p.nbytes for p in model.parameters())
    ring = averagings * 2 * (RANKS - 1) * parameters // RANKS
    counted = average.stats() if case.method != "fp32" else {}
    return {
        **asdict(case),
        "test_accuracy": correct / len(data.test),
        "averagings": averagings,
        "parameters": parameters // 4,
        "bytes_sent": counted.get("bytes_sent", ring),
        "bits_per_element_compressed": counted.get("bits_per_element_compressed", 32.0),
        "seconds": seconds,
    }


def run_missing(cases: list[Case], path: Path, data_dir: Path | None) -> None:
    """On every rank; rank 0 writes the file after each run."""
    data = load_dataset("fashion-mnist", data_dir)
    for number, case in enumerate(cases, 1):
        result = train(case, data)
        if dist.get_rank() == 0:
            accuracy, seconds = 100 * result["test_accuracy"], result["seconds"]
            print(
                f"# {number}/{len(cases)}: {case.method}, seed {case.seed}: {accuracy:.2f} %, {seconds:.0f} s",
                flush=True,
            )
            write(path, [*read(path), result])


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["runs"] if path.is_file() else []


def write(path: Path, runs: list[dict[str, Any]]) -> None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    document = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "commit": commit,
        "ranks": RANKS,
        "summary": summarise(runs),
        "runs": runs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method: mean accuracy, paired difference from fp32 with its 95 % interval, in points, and bytes."""
    rows = []
    reference = {run["seed"]: run for run in runs if run["method"] == "fp32"}
    for method in dict.fromkeys(run["method"] for run in runs):
        of_seed = {run["seed"]: run for run in runs if run["method"] == method}
        row: dict[str, Any] = {"method": method, "seeds": len(of_seed)}
        for name in ("test_accuracy", "bytes_sent", "bits_per_element_compressed"):
            row[name] = sum(run[name] for run in of_seed.values()) / len(of_seed)
        paired = [seed for seed in of_seed if seed in reference]
        if method != "fp32" and paired:
            row["bytes_ratio"] = sum(reference[seed]["bytes_sent"] for seed in paired) / sum(
                of_seed[seed]["bytes_sent"] for seed in paired
            )
            differences = torch.tensor(
                [100 * (of_seed[seed]["test_accuracy"] - reference[seed]["test_accuracy"]) for seed in paired]
            )
            row["difference"] = differences.mean().item()
            if len(paired) > 1:
                half = stats.t.ppf(0.975, len(paired) - 1) * differences.std().item() / math.sqrt(len(paired))
                row["interval"] = [row["difference"] - half, row["difference"] + half]
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'method':<30}{'accuracy':>10}{'minus fp32':>12}{'95 % interval':>18}{'bits':>8}{'MB':>8}{'x fewer':>9}")
    for row in rows:
        difference = f"{row['difference']:+.2f}" if "difference" in row else ""
        interval = f"{row['interval'][0]:+.2f} .. {row['interval'][1]:+.2f}" if "interval" in row else ""
        ratio = f"{row['bytes_ratio']:.1f}" if "bytes_ratio" in row else ""
        bits, megabytes = f"{row['bits_per_element_compressed']:.2f}", f"{row['bytes_sent'] / 1e6:.1f}"
        accuracy = f"{100 * row['test_accuracy']:.2f}%"
        print(f"{row['method']:<30}{accuracy:>10}{difference:>12}{interval:>18}{bits:>8}{megabytes:>8}{ratio:>9}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "averaging.json")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train-images", type=int, default=20_000)
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, 4,000 images: does it run?")
    arguments = parser.parse_args()
    load_dataset("fashion-mnist", arguments.data_dir)  # a missing file is told before any process starts
    epochs, images = (1, 4000) if arguments.quick else (arguments.epochs, arguments.train_images)
    seeds = range(1 if arguments.quick else arguments.seeds)
    cases = [Case(method, seed, epochs, images) for seed in seeds for method in METHODS]
    wanted = [asdict(case) for case in cases]
    done = [run for run in read(arguments.json) if {name: run.get(name) for name in wanted[0]} in wanted]
    known = [{name: run.get(name) for name in wanted[0]} for run in done]
    missing = [case for case, fields in zip(cases, wanted, strict=True) if fields not in known]
    write(arguments.json, done)  # runs of other settings are not mixed in
    if missing:
        launch(run_missing, RANKS, 1, missing, arguments.json, arguments.data_dir)
    rows = summarise(read(arguments.json))
    print_table(rows)
    row = next(row for row in rows if row["method"] == "difference k=1")
    loss, share = max(0.0, -row["difference"]), 1 / row["bytes_ratio"]
    print(
        f"difference k=1 loses {loss:.2f} points (allowed: {ALLOWED_LOSS}) at {share:.3f} of the bytes (allowed: 1/8)"
    )
    # A quick run has few averagings, and its first, uncompressed one counts.
    raise SystemExit(1 if not arguments.quick and (loss > ALLOWED_LOSS or share > ALLOWED_BYTES) else 0)


if __name__ == "__main__":
    main()
