"""The accuracy of sharded models (FSDP2): compressed gradients and weights beside torch's own collectives.

    python bench/bench_fsdp_accuracy.py [--seeds 3] [--tasks resnet20 gpt] [--worlds 2 4] [--methods ...] [--quick]

ResNet-20 (stem of stride 2) learns 10,000 images of Fashion-MNIST with SGD and momentum, and a transformer of
characters the source of Python's standard library with AdamW, see :mod:`sharded_training`. Ranks are processes over
gloo. ``fp32`` and ``bf16`` are ``fully_shard`` as torch has it (of ResNet-20, bf16 for gradients alone). ``k=K``
attaches qcomm with gradients on SigmaGrid(K) and error feedback, and ``k=K weights`` gathers weights on a RangeGrid of
8 bits as well; both compute in fp32.

**The rule of parity** was written down before the first run. Over at least 3 seeds, the paired differences from fp32 of
the same task and number of ranks are on average within 0.5 points of accuracy, or 0.01 nats, of zero. Their 95 %
interval (paired t test) contains zero or lies within the same bounds. With 3 seeds intervals are wide: an answer of
"parity" says that no larger loss was seen, and not that there is none.

One seed gives all methods the same weights and samples. Every run is one line of ``--runs``; those that it holds
already are skipped, so that an interrupted study goes on.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sharded_training import BF16, FP32, TASKS, Setting, options_of, train
from study_runs import append, commit, in_turn, not_done, paired, parse_study, read, shown
from transformer_training import Text, standard_library

from qcomm.recipes.datasets import Dataset, load_dataset
from qcomm.recipes.launch import launch

RESULTS = Path(__file__).parent / "results"
METHODS = (FP32, "k=1", "k=1 weights", "k=3.2", "k=3.2 weights")
# Adam suffers from coarse grids: the guide advises a step of 0.5 to begin with.
OF_GPT = ("k=0.5",)
WORLDS = (2, 4)
SEEDS, ENOUGH_SEEDS = 3, 3
ALLOWED = {"resnet20": 0.5, "gpt": 0.01}
UNITS = {"resnet20": "points", "gpt": "nats"}
BETTER = {"resnet20": 1, "gpt": -1}  # the sign of a difference that is no loss
STEPS = 300
SETTINGS = {
    "resnet20": Setting("resnet20", batch=32),
    "gpt": Setting("gpt", batch=16),
}
TINY = Setting("resnet20", steps=3, batch=8, images=64)
QUICK_IMAGES = "digits"  # which every installation has
EXAMPLES = """examples:
  python bench/bench_fsdp_accuracy.py --quick
      three steps of ResNet-20: does it work?
  nice -n 19 python bench/bench_fsdp_accuracy.py > study.log
      the whole study; after an interruption the same command goes on
  python bench/bench_fsdp_accuracy.py --summary
      no runs, only the table of those that there are
"""


@dataclass(frozen=True)
class Run:
    """A method, its setting, and the digest or name of what it learns."""

    method: str
    setting: Setting
    data: str

    def key(self) -> dict[str, Any]:
        """Returns the fields by which a finished run is found again: all that its result depends on."""
        return {"method": self.method, "data": self.data, "torch": torch.__version__, **asdict(self.setting)}


def load(task: str, quick: bool) -> tuple[str, "Dataset | Text"]:
    """Returns what a task learns, with its name."""
    if task == "gpt":
        text = standard_library()
        return text.digest, text
    name = QUICK_IMAGES if quick else "fashion-mnist"
    return name, load_dataset(name)


def runs_of(arguments: argparse.Namespace) -> list[Run]:
    """Returns the runs, seed by seed."""
    if arguments.quick:
        return [Run(method, TINY, QUICK_IMAGES) for method in (FP32, "k=1 weights")]
    names, found = {task: load(task, False)[0] for task in arguments.tasks}, []
    for seed in range(arguments.seeds):
        for ranks in arguments.worlds:
            for task in arguments.tasks:
                setting = replace(SETTINGS[task], ranks=ranks, seed=seed, steps=arguments.steps)
                methods = [method for method in arguments.methods if allows(task, method)]
                found += [Run(method, setting, names[task]) for method in methods]
    return found


def allows(task: str, method: str) -> bool:
    """Returns whether a task has a method: those of OF_GPT are the transformer's alone."""
    return task == "gpt" or method not in OF_GPT


def run_missing(missing: Sequence[Run], path: Path, quick: bool, command: str) -> None:
    """On every rank; rank 0 adds the line of each run when it ends. Bytes and losses are averaged over the ranks."""
    data = {task: load(task, quick)[1] for task in {run.setting.task for run in missing}}
    for run in in_turn(missing, name_of) if dist.get_rank() == 0 else iter(missing):
        result = train(run.setting, run.method, data[run.setting.task])
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, result)
        if dist.get_rank() == 0:
            result["train_loss"] = statistics.fmean(one["train_loss"] for one in ranks)
            result["stats"] = {name: statistics.fmean(r["stats"][name] for r in ranks) for name in result["stats"]}
            append(path, {**run.key(), "commit": commit(), "command": command, **result})
            print(f"  {result['result']:.4f} {UNITS[run.setting.task]}, {result['seconds']:.0f} s", flush=True)


def name_of(run: Run) -> str:
    """Returns the text of a run for the log."""
    return f"{run.setting.task}, {run.setting.ranks} ranks, {run.method}, seed {run.setting.seed}"


def verdict(task: str, difference: Mapping[str, Any], seeds: int) -> str:
    """Returns the answer of the rule.

    Example:
        >>> verdict("gpt", {"difference": 0.004, "interval": [-0.02, 0.03]}, 3)
        'parity'
        >>> verdict("gpt", {"difference": 0.02, "interval": [-0.02, 0.06]}, 3)
        'not met: worse'
    """
    if seeds < ENOUGH_SEEDS or difference["interval"] is None:
        return f"open: {seeds} of {ENOUGH_SEEDS} seeds"
    (low, high), bound = difference["interval"], ALLOWED[task]
    contained = low <= 0 <= high or (-bound <= low and high <= bound)
    if abs(difference["difference"]) <= bound and contained:
        return "parity"
    return "not met: better" if BETTER[task] * difference["difference"] > 0 else "not met: worse"


def summarise(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each task, number of ranks and method; differences are from fp32 of the same seeds."""
    grouped: dict[tuple[str, int, int, str], dict[int, Mapping[str, Any]]] = {}
    for record in records:
        key = record["task"], record["ranks"], record["steps"], record["method"]
        grouped.setdefault(key, {})[record["seed"]] = record
    rows = []
    for (task, ranks, steps, method), of_seed in sorted(grouped.items(), key=lambda item: _place(item[0])):
        results = {seed: record["result"] for seed, record in sorted(of_seed.items())}
        row: dict[str, Any] = {
            "task": task,
            "ranks": ranks,
            "steps": steps,
            "method": method,
            "parameters": next(iter(of_seed.values()))["parameters"],
            "seeds": len(results),
            "by_seed": results,
            "mean": statistics.fmean(results.values()),
        }
        for name in next(iter(of_seed.values()))["stats"]:
            row[name] = statistics.fmean(record["stats"][name] for record in of_seed.values())
        reference = grouped.get((task, ranks, steps, FP32), {})
        both = [seed for seed in results if seed in reference]
        if both and method != FP32:
            row["minus_fp32"] = paired([results[seed] - reference[seed]["result"] for seed in both])
            losses = [of_seed[seed]["train_loss"] - reference[seed]["train_loss"] for seed in both]
            row["train_loss_minus_fp32"] = paired(losses)
            row["verdict"] = verdict(task, row["minus_fp32"], len(both))
        rows.append(row)
    return rows


def _place(key: tuple[str, int, int, str]) -> tuple[int, int, int, int, str]:
    task, ranks, steps, method = key
    known = [FP32, BF16, *OF_GPT, *METHODS[1:]]
    return TASKS.index(task), ranks, steps, known.index(method) if method in known else len(known), method


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    document = {
        "commands": list(dict.fromkeys(record["command"] for record in records)),
        "rule": f"on average within {ALLOWED['resnet20']} points or {ALLOWED['gpt']} nats of fp32 FSDP2, the 95 % "
        f"interval contains 0 or lies within these bounds, at least {ENOUGH_SEEDS} paired seeds",
        "machine": platform.processor() or platform.machine(),
        "ranks": "processes of one machine, over gloo",
        "summary": summarise(records),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"{'task':<9}{'ranks':>6}{'steps':>6}  {'method':<15}{'seeds':>6}{'result':>9}  {'minus fp32':<30}"
          f"{'bits: gradients':>16}{'weights':>8}  verdict")  # fmt: skip
    for row in rows:
        difference = shown(row["minus_fp32"]) if "minus_fp32" in row else ""
        bits = [f"{row[name]:.2f}" if row.get(name) else "" for name in ("bits_of_gradients", "bits_of_weights")]
        print(f"{row['task']:<9}{row['ranks']:>6}{row['steps']:>6}  {row['method']:<15}{row['seeds']:>6}"
              f"{row['mean']:>9.4f}  {difference:<30}{bits[0]:>16}{bits[1]:>8}  {row.get('verdict', '')}")  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--worlds", type=int, nargs="+", choices=WORLDS, default=list(WORLDS), help="numbers of ranks")
    parser.add_argument("--steps", type=int, default=STEPS, help="(default %(default)s)")
    parser.add_argument("--methods", nargs="+", default=[*METHODS, *OF_GPT], help="also bf16, any k=K, k=K weights")
    summary = RESULTS / "fsdp_accuracy.json"
    return parse_study(parser, SEEDS, summary, "fp32 and k=1 with weights, three steps of ResNet-20", options_of)


def main() -> None:
    arguments = parse()
    runs = runs_of(arguments)
    missing = not_done(runs, Run.key, arguments.runs)
    for ranks in WORLDS if not arguments.summary else ():
        if of_world := [run for run in missing if run.setting.ranks == ranks]:
            launch(run_missing, ranks, 1, of_world, arguments.runs, arguments.quick, arguments.command)
    records = read(arguments.runs)
    write(arguments.json, records)
    print_table(summarise(records))


if __name__ == "__main__":
    main()
