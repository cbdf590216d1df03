"""The accuracy that compression costs: Fashion-MNIST, ResNet-20, two ranks, several seeds, the same for every method.

    python bench/bench_accuracy.py [--json FILE] [--seeds 3] [--epochs 5] [--quick]

Runs that FILE already holds (same settings, same torch) are not repeated, so that an interrupted bench continues. The
interval is that of a paired t test: one seed gives all methods the same weights, order and augmentation.
"""

import argparse
import json
import math
import platform
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from scipy import stats

from qcomm.recipes.config import TrainConfig
from qcomm.recipes.datasets import load_dataset
from qcomm.recipes.launch import launch
from qcomm.recipes.train import train

RANKS = 2
METHODS: tuple[dict[str, Any], ...] = (
    {"method": "fp32"},
    {"method": "qcomm", "grid": "sigma", "step": 1.0},
    {"method": "qcomm", "grid": "sigma", "step": 2.0},
    {"method": "qcomm", "grid": "range", "c": 2.0},
)
ALLOWED_LOSS = 0.5  # points of accuracy
# Of gradients with at least min_elements elements: both phases and their mean; then the mean with the small ones.
BITS = ("bits_per_element_phase1", "bits_per_element_phase2", "bits_per_element_compressed", "bits_per_element")


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["runs"] if path.is_file() else []


def same_run(run: dict[str, Any], config: TrainConfig) -> bool:
    return config.difference(run["config"]) is None and run["torch"] == torch.__version__


def run_missing(configs: list[TrainConfig], path: Path) -> None:
    """On every rank: train what is missing; rank 0 writes the file after each run."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    for number, config in enumerate(configs, 1):
        if dist.get_rank() == 0:
            print(f"# {number}/{len(configs)}: {config.label}, seed {config.seed}", flush=True)
        result = train(config)
        if dist.get_rank() == 0:
            write(path, [*read(path), {"torch": torch.__version__, "commit": commit, **result.to_json()}])


def write(path: Path, runs: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": platform.processor() or platform.machine(),
        "ranks": RANKS,
        "summary": summarise(runs),
        "runs": runs,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method: the mean accuracy and the paired difference to fp32 with its 95 % interval, in points."""
    by_method: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        by_method.setdefault(run["label"], {})[run["config"]["seed"]] = run
    rows = []
    for label, of_seed in by_method.items():
        accuracies = {seed: 100 * run["test_accuracy"] for seed, run in of_seed.items()}
        row: dict[str, Any] = {
            "label": label,
            "accuracy_by_seed": accuracies,
            "mean_accuracy": sum(accuracies.values()) / len(accuracies),
        }
        for name in (*BITS, "bytes_sent"):
            row[name] = sum(run["stats"][name] for run in of_seed.values()) / len(of_seed)
        paired = [seed for seed in of_seed if seed in by_method.get("fp32", {})]
        if label != "fp32" and len(paired) > 1:
            differences = torch.tensor(
                [accuracies[seed] - 100 * by_method["fp32"][seed]["test_accuracy"] for seed in paired]
            )
            half = stats.t.ppf(0.975, len(paired) - 1) * differences.std().item() / math.sqrt(len(paired))
            row["difference"] = differences.mean().item()
            row["interval"] = [row["difference"] - half, row["difference"] + half]
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    headings = ("method", "accuracy", "minus fp32", "95 % interval", "phase 1", "phase 2", "both", "all", "MB a rank")
    lines = [headings]
    for row in rows:
        difference, interval = "", ""
        if "difference" in row:
            difference = f"{row['difference']:+.2f}"
            interval = f"{row['interval'][0]:+.2f} .. {row['interval'][1]:+.2f}"
        bits = [f"{row[name]:.3f}" for name in BITS]
        accuracy, megabytes = f"{row['mean_accuracy']:.2f}%", f"{row['bytes_sent'] / 1e6:.1f}"
        lines.append((row["label"], accuracy, difference, interval, *bits, megabytes))
    for line in lines:
        print(f"{line[0]:<16}{line[1]:>10}{line[2]:>12}{line[3]:>18}" + "".join(f"{cell:>11}" for cell in line[4:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "accuracy.json")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train-images", type=int, default=20_000)
    parser.add_argument("--amp", default="bf16")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, 2,000 images: does it run?")
    arguments = parser.parse_args()
    base = TrainConfig(
        model="resnet20",
        dataset="fashion-mnist",
        data_dir=arguments.data_dir,
        epochs=1 if arguments.quick else arguments.epochs,
        batch_size=64,
        stem_stride=2,
        augment=False,  # with augmentation, so short a run ends early in its descent and scatters by half a point
        train_images=2_000 if arguments.quick else arguments.train_images,
        amp=arguments.amp,
    )
    load_dataset(base.dataset, base.data_dir)  # a missing file is told before any process starts
    configs = [
        replace(base, seed=seed, **method)
        for seed in range(1 if arguments.quick else arguments.seeds)
        for method in METHODS
    ]
    done = [run for run in read(arguments.json) if any(same_run(run, config) for config in configs)]
    missing = [config for config in configs if not any(same_run(run, config) for run in done)]
    write(arguments.json, done)  # runs of other settings are not mixed in
    if missing:
        launch(run_missing, RANKS, base.threads, missing, arguments.json)
    rows = summarise(read(arguments.json))
    print(f"# torch {torch.__version__}, {RANKS} ranks, {base.to_json()}")
    print_table(rows)
    differences = [row["difference"] for row in rows if "difference" in row]
    if differences:
        loss = max(0.0, -min(differences))
        print(f"Largest loss against fp32: {loss:.2f} points (allowed: {ALLOWED_LOSS}); results: {arguments.json}")
        raise SystemExit(1 if loss > ALLOWED_LOSS else 0)


if __name__ == "__main__":
    main()
