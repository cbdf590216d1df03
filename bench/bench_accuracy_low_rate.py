"""The accuracy of steps of 3.2 and 3.4 in both phases, 0.3 to 0.5 bit a value, beside fp32 and other compressors.

    python bench/bench_accuracy_low_rate.py [--seeds 8] [--world 4 2] [--methods fp32 "qcomm k=3.2"] [--quick]

**The rule of success** was written down before the first run. "No loss" at k = 3.2 means: the paired differences of
test accuracy from fp32, over at least 8 seeds, have a 95 % interval (paired t test) that contains 0, and their mean is
within 0.3 points of 0. The other methods are held to the same rule. The training loss of the last epoch, which scatters
less, is reported beside it with an interval of its own.

The first scene is the setting of bench_accuracy: ResNet-20 on 20,000 images of Fashion-MNIST, 5 epochs, SGD, bfloat16.
Further scenes have other images (``blob_data``), a constant learning rate in place of the falling one, and 2 in place
of 4 ranks. Ranks are simulated in one process (``simulated_training``); ``check_simulation.py`` compares that with a
run over real sockets. One seed gives all methods the same weights and order of images.

Every run is one line of ``--runs``. Runs that it holds already are skipped, so that an interrupted study goes on.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from blob_data import load_blobs
from simulated_exchange import build_exchange
from simulated_training import SCHEDULES, Setting, simulate
from study_runs import append, commit, in_turn, not_done, paired, parse_study, read

from qcomm.recipes.datasets import Dataset, load_dataset

RESULTS = Path(__file__).parent / "results"
TASKS = ("fashion-mnist", "blobs")
FEW_BLOBS, QUICK_IMAGES = "few blobs", 256
# The comparisons that decide come first, of all seeds and scenes.
FIRST = ("fp32", "qcomm k=3.2", "qcomm k=3.4", "qcomm k=2", "powersgd r=2")
REST = ("qcomm k=1", "powersgd r=1", "powersgd r=4", "top-k 1%", "sign")
# (task, ranks, schedule), in the order in which they run.
SCENES = (
    ("fashion-mnist", 4, "falling"),
    ("blobs", 4, "falling"),
    ("fashion-mnist", 4, "constant"),
    ("fashion-mnist", 2, "falling"),
)
SEEDS = 8
PHASES = ("bits_per_element_phase1", "bits_per_element_phase2")
ALLOWED_MEAN = 0.3  # points of accuracy, of the rule of success
EXAMPLES = """examples:
  python bench/bench_accuracy_low_rate.py --quick
      two short runs: does it work?
  python bench/bench_accuracy_low_rate.py --world 4 --tasks fashion-mnist --schedules falling
      the first scene alone, all methods, 8 seeds
  python bench/bench_accuracy_low_rate.py --methods fp32 "qcomm k=3.3" --seeds 3
      another step, three seeds
  nice -n 19 python bench/bench_accuracy_low_rate.py --threads 1 > study.log
      the whole study; after an interruption the same command goes on
  python bench/bench_accuracy_low_rate.py --summary
      no runs, only the tables of those that there are
"""


@dataclass(frozen=True)
class Run:
    """A run of the study."""

    task: str
    setting: Setting
    method: str

    def title(self) -> str:
        """Returns a name for the log."""
        setting = self.setting
        return f"{self.task}, {setting.ranks} ranks, {setting.schedule}, {self.method}, seed {setting.seed}"

    def key(self, threads: int) -> dict[str, Any]:
        """Returns the fields by which a finished run is found again: all that its result depends on."""
        versions = {"torch": torch.__version__, "threads": threads}
        return {"task": self.task, "method": self.method, **versions, **asdict(self.setting)}


def ordered(scenes: Sequence[tuple[str, int, str]], methods: Sequence[str], seeds: int, base: Setting) -> list[Run]:
    """Returns the runs, the most important comparisons first, and seed by seed."""
    first = [method for method in methods if method in FIRST]
    rest = [method for method in methods if method not in FIRST]
    return [
        Run(task, replace(base, ranks=ranks, schedule=schedule, seed=seed), method)
        for group in (first, rest)
        for task, ranks, schedule in scenes
        for seed in range(seeds)
        for method in group
    ]


def load(task: str, data_dir: Path | None) -> Dataset:
    if task == FEW_BLOBS:
        return load_blobs(QUICK_IMAGES, QUICK_IMAGES)
    return load_blobs() if task == "blobs" else load_dataset(task, data_dir)


def verdict(accuracy: dict[str, Any], seeds: int) -> str:
    """Returns the answer of the rule of success."""
    if seeds < SEEDS:
        return f"open: {seeds} of {SEEDS} seeds"
    low, high = accuracy["interval"]
    return "no loss" if low <= 0 <= high and abs(accuracy["difference"]) <= ALLOWED_MEAN else "not met"


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each scene and method."""
    grouped: dict[tuple[Any, ...], dict[str, dict[int, dict[str, Any]]]] = {}
    for record in records:
        scene = tuple(record[name] for name in ("task", "ranks", "schedule", "images", "epochs"))
        grouped.setdefault(scene, {}).setdefault(record["method"], {})[record["seed"]] = record
    rows = []
    for scene, methods in grouped.items():
        reference = methods.get("fp32", {})
        for method, of_seed in methods.items():
            accuracies = {seed: 100 * record["test_accuracy"] for seed, record in sorted(of_seed.items())}
            losses = {seed: record["train_losses"][-1] for seed, record in sorted(of_seed.items())}
            row = dict(zip(("task", "ranks", "schedule", "images", "epochs"), scene, strict=True))
            row |= {
                "method": method,
                "seeds": len(of_seed),
                "accuracy_by_seed": accuracies,
                "mean_accuracy": statistics.fmean(accuracies.values()),
                "train_loss_by_seed": losses,
                "mean_train_loss": statistics.fmean(losses.values()),
            }
            for name in next(iter(of_seed.values()))["stats"]:
                row[name] = statistics.fmean(record["stats"][name] for record in of_seed.values())
            both = [seed for seed in accuracies if seed in reference]
            if both:
                sent = statistics.fmean(reference[seed]["stats"]["bytes_sent"] for seed in both)
                row["bits_of_fp32"] = 32 * row["bytes_sent"] / sent
            if method != "fp32" and both:
                row["accuracy"] = paired([accuracies[seed] - 100 * reference[seed]["test_accuracy"] for seed in both])
                row["train_loss"] = paired([losses[seed] - reference[seed]["train_losses"][-1] for seed in both])
                row["verdict"] = verdict(row["accuracy"], len(both))
            rows.append(row)
    return rows


def write(path: Path, records: Sequence[dict[str, Any]], command: str) -> None:
    document = {
        "command": command,
        "rule": f"95 % interval contains 0 and |mean| <= {ALLOWED_MEAN} points, at least {SEEDS} paired seeds",
        "machine": platform.processor() or platform.machine(),
        "simulated": "all ranks in one process, see bench/check_simulation.py",
        "summary": summarise(records),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    def difference(found: dict[str, Any] | None, digits: int) -> str:
        if found is None:
            return ""
        text = f"{found['difference']:+.{digits}f}"
        if found["interval"] is None:
            return text
        return f"{text} ({found['interval'][0]:+.{digits}f} .. {found['interval'][1]:+.{digits}f})"

    scene = None
    for row in rows:
        if scene != (scene := tuple(row[name] for name in ("task", "ranks", "schedule", "images", "epochs"))):
            print(f"# {scene[0]}, {scene[1]} ranks, {scene[2]} rate, {scene[3]} images, {scene[4]} epochs")
            print(
                f"{'method':<14}{'seeds':>6}{'accuracy':>10}  {'minus fp32':<26}{'loss':>8}  {'minus fp32':<32}", end=""
            )
            print(f"{'phase 1':>8}{'phase 2':>8}{'all bits':>9}{'MB sent':>9}  verdict")
        phases = [f"{row[name]:.3f}" if name in row else "" for name in PHASES]
        bits = f"{row['bits_of_fp32']:.3f}" if "bits_of_fp32" in row else ""
        accuracy, loss = difference(row.get("accuracy"), 2), difference(row.get("train_loss"), 4)
        print(
            f"{row['method']:<14}{row['seeds']:>6}{row['mean_accuracy']:>9.2f}%  {accuracy:<26}"
            f"{row['mean_train_loss']:>8.4f}  {loss:<32}{phases[0]:>8}{phases[1]:>8}{bits:>9}"
            f"{row['bytes_sent'] / 1e6:>9.1f}  {row.get('verdict', '')}"
        )


def run_missing(missing: Sequence[Run], arguments: argparse.Namespace) -> None:
    """Runs what is missing; the line of a run and the summary are written when it ends."""
    for run in in_turn(missing, Run.title):
        setting = run.setting
        result = simulate(
            setting,
            load(run.task, arguments.data_dir),
            build_exchange(run.method, setting.ranks),
            lambda epoch, loss: print(f"  epoch {epoch}: training loss {loss:.4f}", flush=True),
        )
        record = run.key(arguments.threads) | {
            "commit": commit(),
            "train_losses": result.train_losses,
            "test_loss": result.test_loss,
            "test_accuracy": result.test_accuracy,
            "stats": result.stats,
            "seconds": result.seconds,
        }
        append(arguments.runs, record)
        write(arguments.json, read(arguments.runs), arguments.command)
        print(f"  accuracy {100 * result.test_accuracy:.2f} %, {result.seconds:.0f} s", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=[*FIRST, *REST], help="also any qcomm k=K and powersgd r=R")
    parser.add_argument("--world", type=int, nargs="+", default=[4, 2], help="numbers of ranks (default 4 2)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--images", type=int, default=20_000, help="training images (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; results depend on it (default %(default)s)")
    parser.add_argument("--data-dir", type=Path, default=None, help="of Fashion-MNIST, where it is not installed")
    summary = RESULTS / "accuracy_low_rate.json"
    arguments = parse_study(
        parser,
        SEEDS,
        summary,
        f"fp32 and k = 3.2 once, {QUICK_IMAGES} blobs, one epoch",
        lambda method: build_exchange(method, 2),
    )
    if arguments.images < 64 * max(arguments.world):
        parser.error(f"--images is {arguments.images}; it must fill one step, {64 * max(arguments.world)}")
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    base = Setting(images=arguments.images, epochs=arguments.epochs)
    scenes = [
        scene
        for scene in SCENES
        if scene[0] in arguments.tasks and scene[1] in arguments.world and scene[2] in arguments.schedules
    ]
    runs = ordered(scenes, arguments.methods, arguments.seeds, base)
    if arguments.quick:
        quick = Setting(ranks=2, images=QUICK_IMAGES, epochs=1)
        runs = [Run(FEW_BLOBS, quick, method) for method in ("fp32", "qcomm k=3.2")]
    missing = not_done(runs, lambda run: run.key(arguments.threads), arguments.runs)
    if missing and not arguments.summary:
        run_missing(missing, arguments)
    records = read(arguments.runs)
    write(arguments.json, records, arguments.command)
    print_table(summarise(records))


if __name__ == "__main__":
    main()
