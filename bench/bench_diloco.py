"""The loss of a small transformer under DiLoCo: compressed, in fp32, and beside a gradient exchange in every step.

    python bench/bench_diloco.py [--seeds 5] [--periods 30 100] [--methods fp32 k=1 k=2 k=3.2 ddp] [--quick]

Four processes train :class:`transformer_training.Transformer` with AdamW on the source of Python's standard library.
``ddp`` averages gradients in fp32 in every step. All others are ``qcomm.DiLoCo`` with its default outer optimizer:
``fp32`` uncompressed, ``k=K`` on SigmaGrid(K) with error feedback in both directions, ``k=K/M`` with ``mean_step=M``.
A method may end with ``streamed``: three fragments, merged three steps after their exchange began, alpha 0.5.
``sparse=R`` is the rival of sparse_outer.py with an outer rate of R. The end is rank 0's anchor.

**The rule of "no loss"** was written down before the first run. Over at least three seeds the held-out loss is on
average at most 0.01 nats above that of fp32 DiLoCo of the same period, and the 95 % interval of the paired differences
is not wholly above zero.

One seed gives all methods the same weights and sequences. Bits are those of messages, by the parameters and steps, as
averages over the ranks. The two ways of an exchange are counted apart, by the library's counters: ``values`` are the
packets in which a rank sends its own movement, ``means`` the packets of means that it gets back, and ``headers`` all
else that it sends. ``sent`` and ``received`` are all bytes of a rank, which also sends the means of its own part and
gets the others' values. An uncompressed sum goes round a ring twice: once are the values, once the means. The sparse
rival has no means: a rank gets back the values of all others.

Runs are lines of ``--runs``; those that it holds already are skipped.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sparse_outer import SparseOuter
from study_runs import append, commit, in_turn, not_done, paired, parse_study, read
from torch import nn
from transformer_training import (
    CLIP,
    Setting,
    Text,
    Transformer,
    batch_of,
    evaluate,
    loss_of,
    make_optimizer,
    rate_at,
    standard_library,
)

import qcomm
from qcomm.recipes.launch import launch

RESULTS = Path(__file__).parent / "results"
REFERENCE = "fp32"
SPARSE = "sparse="
METHODS = (REFERENCE, "k=1", "k=2", "k=3.2", "ddp")
PERIODS = (30, 100)
SEEDS, ENOUGH_SEEDS = 5, 3
ALLOWED_NATS = 0.01
STREAMED = {"fragments": 3, "delay": 3}
SMALL = Setting(steps=600, rate=0.004, batch=4, width=64, depth=2)
COUNTERS = ("bytes_sent", "bytes_received", "bytes_of_values", "bytes_of_means", "bytes_of_headers")
TINY = Setting(steps=20, batch=2, context=16, width=32, depth=1, heads=2)
EXAMPLES = """examples:
  python bench/bench_diloco.py --quick
      short runs of a tiny model: does it work?
  nice -n 19 python bench/bench_diloco.py > study.log
      the whole study; after an interruption the same command goes on
  python bench/bench_diloco.py --summary
      no runs, only the table of those that there are
"""


@dataclass(frozen=True)
class Run:
    """A method of METHODS, its period (0 of ``ddp``), and the setting."""

    method: str
    period: int
    setting: Setting

    def key(self, text: Text) -> dict[str, Any]:
        """Returns the fields by which a finished run is found again: all that its result depends on."""
        fields = {"method": self.method, "period": self.period, "torch": torch.__version__, "text": text.digest}
        return {**fields, **asdict(self.setting)}


def options_of(method: str) -> dict[str, Any]:
    """Returns the options of DiLoCo; raises ValueError if there is no such method."""
    grid, _, mode = method.partition(" ")
    if mode not in ("", "streamed") or not (grid == REFERENCE or grid.startswith("k=")):
        raise ValueError(
            f"method is {method!r}; it must be ddp, sparse=R, fp32, k=K or k=K/M, the last three perhaps with streamed"
        )
    options: dict[str, Any] = dict(STREAMED) if mode else {}
    if grid == REFERENCE:
        return {**options, "strategy": "none"}
    step, _, mean_step = grid.removeprefix("k=").partition("/")
    if mean_step:
        options["mean_step"] = float(mean_step)
    return {**options, "strategy": "two_phase", "grid": qcomm.SigmaGrid(float(step))}


def make_outer(run: "Run", model: nn.Module) -> "qcomm.DiLoCo | SparseOuter | None":
    """Returns what averages the ranks' movements: None for ``ddp``, which averages gradients."""
    if run.method == "ddp":
        return None
    if run.method.startswith(SPARSE):
        return SparseOuter(model, run.period, float(run.method.removeprefix(SPARSE)))
    return qcomm.DiLoCo(model, period=run.period, **options_of(run.method))


def average_gradients(model: nn.Module) -> None:
    """Replaces the gradients by their mean over the ranks, in fp32."""
    parameters = list(model.parameters())
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def train(run: Run, text: Text) -> dict[str, Any]:
    """Trains on this rank; returns losses in nats a character, and the bytes of this rank."""
    begin, setting, rank = time.perf_counter(), run.setting, dist.get_rank()
    torch.manual_seed(setting.seed)
    model = Transformer(setting, text.vocabulary)
    inner = make_optimizer("adamw", model, setting.rate)
    diloco = make_outer(run, model)
    sequences, losses = torch.Generator().manual_seed(setting.seed + 7), []
    for step in range(setting.steps):
        for group in inner.param_groups:
            group["lr"] = rate_at(setting, step)
        batches = [batch_of(text.train, setting.batch, setting.context, sequences) for _ in range(setting.ranks)]
        inner.zero_grad()
        loss = loss_of(model, *batches[rank])
        loss.backward()
        losses.append(loss.item())
        if diloco is None:
            average_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        inner.step()
        if diloco is not None:
            diloco.step()
    if diloco is not None:
        diloco.finish()
    last = losses[-max(1, setting.steps // 10) :]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stats = count(diloco, parameters, setting)
    return {
        "parameters": parameters,
        "held_out_loss": evaluate(model, text, setting) if rank == 0 else None,
        "train_loss": sum(last) / len(last),
        "stats": stats,
        "seconds": time.perf_counter() - begin,
    }


def count(outer: "qcomm.DiLoCo | SparseOuter | None", parameters: int, setting: Setting) -> dict[str, float]:
    """Returns COUNTERS of this rank, and where the library has them the number of exchanges and their bits a value."""
    if outer is None:
        once = (setting.ranks - 1) / setting.ranks * 4 * parameters * setting.steps
        return dict(zip(COUNTERS, (2 * once, 2 * once, once, once, 0.0), strict=True))
    stats = outer.stats()
    if isinstance(outer, SparseOuter):
        sent, received = stats["bytes_sent"], stats["bytes_received"]
        return {**dict(zip(COUNTERS, (sent, received, sent, received, 0.0), strict=True)), "steps": stats["steps"]}
    ways = stats["bytes_sent_phase1"], stats["bytes_received_phase2"], stats["bytes_sent_overhead"]
    bytes_of = dict(zip(COUNTERS, (stats["bytes_sent"], stats["bytes_received"], *ways), strict=True))
    return {**bytes_of, **{name: stats[name] for name in ("bits_per_element_compressed", "steps")}}


def run_missing(missing: Sequence[Run], path: Path, files: int, command: str) -> None:
    """On every rank; rank 0 writes the file after each run. Bytes are averaged over the ranks."""
    text = standard_library(files)
    named = in_turn(missing, name_of) if dist.get_rank() == 0 else iter(missing)
    for run in named:
        result = train(run, text)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, result)
        if dist.get_rank() == 0:
            for name in COUNTERS:
                result["stats"][name] = statistics.fmean(one["stats"][name] for one in ranks)
            result["train_loss"] = statistics.fmean(one["train_loss"] for one in ranks)
            append(path, {**run.key(text), "commit": commit(), "command": command, **result})
            print(f"  {result['held_out_loss']:.4f} nats, {result['seconds']:.0f} s", flush=True)


def name_of(run: Run) -> str:
    """Returns the text of a run for the log."""
    return f"{run.method}, period {run.period}, seed {run.setting.seed}"


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each model, period and method; differences are from fp32 of the period, and from ddp."""
    grouped: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for record in records:
        key = record["parameters"], record["steps"], record["period"], record["method"]
        grouped.setdefault(key, {})[record["seed"]] = record
    rows = []
    for (parameters, steps, period, method), of_seed in sorted(grouped.items()):
        mode = " streamed" if method.endswith(" streamed") else ""
        losses = {seed: record["held_out_loss"] for seed, record in sorted(of_seed.items())}
        row: dict[str, Any] = {
            "parameters": parameters,
            "steps": steps,
            "period": period,
            "method": method,
            "seeds": len(losses),
            "loss_by_seed": losses,
            "mean_loss": statistics.fmean(losses.values()),
        }
        for name in COUNTERS:  # in older runs values and means were not counted apart
            if sizes := [record["stats"][name] for record in of_seed.values() if name in record["stats"]]:
                row[name.replace("bytes", "bits")] = 8 * statistics.fmean(sizes) / (parameters * steps)
                row["seeds_of_ways"] = len(sizes)
        for name, reference in (("fp32", (period, REFERENCE + mode)), ("ddp", (0, "ddp"))):
            others = grouped.get((parameters, steps, *reference), {})
            both = [seed for seed in losses if seed in others]
            if both and (period, method) != reference:
                row[f"minus_{name}"] = paired([losses[seed] - others[seed]["held_out_loss"] for seed in both])
        if "minus_fp32" in row and method != "ddp":
            row["verdict"] = verdict(row["minus_fp32"], row["seeds"])
        rows.append(row)
    return rows


def verdict(difference: Mapping[str, Any], seeds: int) -> str:
    """Returns the answer of the rule.

    Example:
        >>> verdict({"difference": 0.002, "interval": [-0.01, 0.014]}, 5)
        'no loss'
        >>> verdict({"difference": 0.02, "interval": [-0.01, 0.05]}, 5)
        'loss'
    """
    if seeds < ENOUGH_SEEDS or difference["interval"] is None:
        return f"open: fewer than {ENOUGH_SEEDS} seeds"
    holds = difference["difference"] <= ALLOWED_NATS and difference["interval"][0] <= 0
    return "no loss" if holds else "loss"


def write(path: Path, records: Sequence[dict[str, Any]], command: str) -> None:
    document = {
        "command": command,
        "rule": f"on average at most {ALLOWED_NATS} nats above fp32 DiLoCo of the period, the 95 % interval not wholly "
        f"above 0, at least {ENOUGH_SEEDS} seeds",
        "machine": platform.processor() or platform.machine(),
        "ranks": "processes of one machine, over gloo",
        "summary": summarise(records),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def print_table(records: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'parameters':>10}{'steps':>7}{'period':>7}  {'method':<16}{'seeds':>5}{'nats':>9}{'minus fp32':>12}"
        f"{'95 % interval':>20}{'minus ddp':>11}{'bits sent':>11}{'received':>10}{'values':>9}{'means':>9}"
        f"{'headers':>9}  verdict"
    )
    for row in summarise(records):
        cells = ["", "", ""]
        if "minus_fp32" in row:
            cells[0] = f"{row['minus_fp32']['difference']:+.4f}"
            if row["minus_fp32"]["interval"] is not None:
                cells[1] = "{:+.4f} .. {:+.4f}".format(*row["minus_fp32"]["interval"])
        if "minus_ddp" in row:
            cells[2] = f"{row['minus_ddp']['difference']:+.4f}"
        found = [row.get(f"bits_of_{name}") for name in ("values", "means", "headers")]
        ways = "".join(f"{'' if bits is None else format(bits, '.4f'):>9}" for bits in found)
        print(
            f"{row['parameters']:>10}{row['steps']:>7}{row['period']:>7}  {row['method']:<16}{row['seeds']:>5}"
            f"{row['mean_loss']:>9.4f}{cells[0]:>12}{cells[1]:>20}{cells[2]:>11}{row['bits_sent']:>11.4f}"
            f"{row['bits_received']:>10.4f}{ways}  {row.get('verdict', '')}"
        )


def _check_method(method: str) -> None:
    if method.startswith(SPARSE):
        float(method.removeprefix(SPARSE))
    elif method != "ddp":
        options_of(method)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--periods", type=int, nargs="+", default=list(PERIODS), help="steps between exchanges")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="also k=K, k=K/M, sparse=R, with streamed")
    parser.add_argument("--steps", type=int, default=SMALL.steps, help="(default %(default)s)")
    parser.add_argument("--width", type=int, default=SMALL.width, help="of the model (default %(default)s)")
    parser.add_argument("--depth", type=int, default=SMALL.depth, help="of the model (default %(default)s)")
    parser.add_argument("--rate", type=float, default=SMALL.rate, help="largest learning rate (default %(default)s)")
    summary = RESULTS / "diloco.json"
    return parse_study(parser, SEEDS, summary, "ddp, fp32 and k = 1, 20 steps of a tiny model", _check_method)


def main() -> None:
    arguments = parse()
    files = 3 if arguments.quick else 120
    runs = []
    for seed in range(arguments.seeds):
        chosen = {"steps": arguments.steps, "width": arguments.width, "depth": arguments.depth, "rate": arguments.rate}
        setting = Setting(**{**asdict(SMALL), **chosen, "seed": seed})
        for method in arguments.methods:
            for period in [0] if method == "ddp" else arguments.periods:
                runs.append(Run(method, period, setting))
    if arguments.quick:
        runs = [
            Run("ddp", 0, TINY),
            Run(REFERENCE, 5, TINY),
            Run("k=1", 5, TINY),
            Run("k=1 streamed", 12, TINY),
            Run("sparse=1", 5, TINY),
        ]
    text = standard_library(files)
    missing = not_done(runs, lambda run: run.key(text), arguments.runs)
    if missing and not arguments.summary:
        launch(run_missing, SMALL.ranks, 1, missing, arguments.runs, files, arguments.command)
    records = read(arguments.runs)
    write(arguments.json, records, arguments.command)
    print_table(records)


if __name__ == "__main__":
    main()
