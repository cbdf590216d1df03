"""The loss of a small transformer under AdamW, by grid, learning rate and rule of the optimizer.

    python bench/bench_transformer.py [--seeds 3] [--rates 0.001 0.002 0.004] [--methods "fp32 adamw" ...] [--quick]

Adam divides by the root of a second moment, in which the rounding noise of a coarse grid adds up, so it takes smaller
steps than it should. The study shows by how much that hurts, over learning rates, and if a first absolute moment in its
place (``abs``, :class:`transformer_training.AbsAdamW`) helps.

**The rule of success** was written down before the first run. A method "holds" if at every rate whose fp32 loss is
within 0.01 nats of the best rate's, its held-out loss is on average over the seeds at most 0.01 nats above that of fp32
with AdamW at the best rate, and it sends at most 2.1 bits a value, all headers counted, mean of both phases.

Ranks are simulated in one process with the steps of the library (:mod:`simulated_exchange`). One seed gives all methods
the same weights and sequences. Every run is one line of ``--runs``; runs that it holds already are skipped.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from simulated_exchange import build_exchange
from study_runs import append, commit, in_turn, not_done, paired, parse_study, read, shown
from transformer_training import OPTIMIZERS, Setting, Text, simulate, standard_library

RESULTS = Path(__file__).parent / "results"
REFERENCE = "fp32 adamw"
METHODS = (
    *(REFERENCE, "qcomm k=1 adamw", "qcomm k=2 adamw", "qcomm k=3.2 adamw", "qcomm k=0.5 adamw"),
    *("fp32 abs", "qcomm k=1 abs", "qcomm k=2 abs", "qcomm k=3.2 abs"),
)
RATES = (0.002, 0.001, 0.004)
SEEDS = 3
ALLOWED_NATS, ALLOWED_BITS = 0.01, 2.1
EXAMPLES = """examples:
  python bench/bench_transformer.py --quick
      two short runs of a tiny model: does it work?
  nice -n 19 python bench/bench_transformer.py > study.log
      the whole study; after an interruption the same command goes on
  python bench/bench_transformer.py --summary
      no runs, only the table of those that there are
"""


def split(method: str) -> tuple[str, str]:
    """Returns exchange and optimizer of a method such as "qcomm k=1 abs"; raises ValueError if there is no such one."""
    exchange, _, optimizer = method.rpartition(" ")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"method is {method!r}; it must end with one of {', '.join(OPTIMIZERS)}")
    build_exchange(exchange, 2)
    return exchange, optimizer


def key_of(method: str, setting: Setting, text: Text) -> dict[str, Any]:
    """Returns the fields by which a finished run is found again: all that its result depends on."""
    return {"method": method, "torch": torch.__version__, "text": text.digest, **asdict(setting)}


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns one row for each model, number of steps, rate and method; differences are from fp32 at the same rate."""
    grouped: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for record in records:
        key = record["parameters"], record["steps"], record["rate"], record["method"]
        grouped.setdefault(key, {})[record["seed"]] = record
    rows = []
    for (parameters, steps, rate, method), of_seed in sorted(grouped.items()):
        reference = grouped.get((parameters, steps, rate, REFERENCE), {})
        losses = {seed: record["held_out_loss"] for seed, record in sorted(of_seed.items())}
        both = [seed for seed in losses if seed in reference]
        row = {
            "parameters": parameters,
            "steps": steps,
            "rate": rate,
            "method": method,
            "seeds": len(losses),
            "loss_by_seed": losses,
            "mean_loss": statistics.fmean(losses.values()),
        }
        if both:
            sent = statistics.fmean(reference[seed]["stats"]["bytes_sent"] for seed in both)
            row["bits"] = 32 * statistics.fmean(of_seed[seed]["stats"]["bytes_sent"] for seed in both) / sent
        if both and method != REFERENCE:
            row["loss"] = paired([losses[seed] - reference[seed]["held_out_loss"] for seed in both])
        rows.append(row)
    return rows


def verdicts(rows: Sequence[dict[str, Any]], seeds: int) -> list[dict[str, Any]]:
    """Returns the answer of the rule of success for each model, number of steps and method."""
    found = []
    for parameters, steps in sorted({(row["parameters"], row["steps"]) for row in rows}):
        scene = [row for row in rows if (row["parameters"], row["steps"]) == (parameters, steps)]
        fp32 = {row["rate"]: row for row in scene if row["method"] == REFERENCE}
        if not fp32:
            continue
        best = min(row["mean_loss"] for row in fp32.values())
        near = [rate for rate, row in fp32.items() if row["mean_loss"] <= best + ALLOWED_NATS]
        for method in sorted({row["method"] for row in scene} - {REFERENCE}):
            of_rate = {row["rate"]: row for row in scene if row["method"] == method}
            verdict = _verdict(of_rate, near, best, seeds)
            found.append({"parameters": parameters, "steps": steps, "method": method, "verdict": verdict})
    return found


def _verdict(of_rate: Mapping[float, dict[str, Any]], near: Sequence[float], best: float, seeds: int) -> str:
    """Returns the answer for one method: its rows by rate, and the rates that count."""
    missing = [rate for rate in near if rate not in of_rate or of_rate[rate]["seeds"] < seeds]
    if missing:
        return f"open: {seeds} seeds are missing at rates {missing}"
    worst = max(of_rate[rate]["mean_loss"] - best for rate in near)
    bits = max(of_rate[rate]["bits"] for rate in near)
    holds = worst <= ALLOWED_NATS and bits <= ALLOWED_BITS
    return f"{'holds' if holds else 'does not hold'}: {worst:+.4f} nats at worst, {bits:.2f} bits"


def write(path: Path, records: Sequence[dict[str, Any]], command: str) -> None:
    rows = summarise(records)
    document = {
        "command": command,
        "rule": f"at most {ALLOWED_NATS} nats above fp32 at its best rate, over all rates within {ALLOWED_NATS} of it, "
        f"at most {ALLOWED_BITS} bits, {SEEDS} seeds",
        "machine": platform.processor() or platform.machine(),
        "simulated": "all ranks in one process",
        "verdicts": verdicts(rows, SEEDS),
        "summary": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def print_table(records: Sequence[dict[str, Any]]) -> None:
    rows = summarise(records)
    print(
        f"{'weights':>9}{'steps':>6}{'rate':>8}  {'method':<26}{'seeds':>6}{'nats':>9}  {'minus fp32':<28}{'bits':>7}"
    )
    for row in rows:
        difference = shown(row["loss"]) if "loss" in row else ""
        bits = f"{row['bits']:.2f}" if "bits" in row else ""
        print(
            f"{row['parameters']:>9}{row['steps']:>6}{row['rate']:>8g}  {row['method']:<26}{row['seeds']:>6}"
            f"{row['mean_loss']:>9.4f}  {difference:<28}{bits:>7}"
        )
    for found in verdicts(rows, SEEDS):
        print("{parameters} parameters, {steps} steps, {method}: {verdict}".format(**found))


def run_missing(missing: Sequence[tuple[str, Setting]], text: Text, arguments: argparse.Namespace) -> None:
    """Runs what is missing; the line of a run and the summary are written when it ends."""
    for method, setting in in_turn(missing, lambda run: f"{run[0]}, rate {run[1].rate:g}, seed {run[1].seed}"):
        exchange, optimizer = split(method)
        result = simulate(setting, text, build_exchange(exchange, setting.ranks), optimizer)
        append(arguments.runs, key_of(method, setting, text) | {"commit": commit(), **asdict(result)})
        write(arguments.json, read(arguments.runs), arguments.command)
        print(f"  {result.held_out_loss:.4f} nats, {result.seconds:.0f} s", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="largest learning rates")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="also any qcomm k=K, with adamw or abs")
    parser.add_argument("--steps", type=int, default=Setting.steps, help="(default %(default)s)")
    parser.add_argument("--width", type=int, default=Setting.width, help="of the model (default %(default)s)")
    parser.add_argument("--depth", type=int, default=Setting.depth, help="of the model (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default %(default)s)")
    summary = RESULTS / "transformer.json"
    return parse_study(parser, SEEDS, summary, "fp32 and k = 1, 20 steps of a tiny model", split)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    text = standard_library(3 if arguments.quick else 120)
    # Comparisons at one rate first, and seed by seed.
    runs = [
        (method, Setting(steps=arguments.steps, rate=rate, seed=seed, width=arguments.width, depth=arguments.depth))
        for seed in range(arguments.seeds)
        for rate in arguments.rates
        for method in arguments.methods
    ]
    if arguments.quick:
        tiny = Setting(ranks=2, steps=20, batch=2, context=16, width=32, depth=1, heads=2)
        runs = [(method, tiny) for method in (REFERENCE, "qcomm k=1 abs")]
    missing = not_done(runs, lambda run: key_of(*run, text), arguments.runs)
    if missing and not arguments.summary:
        run_missing(missing, text, arguments)
    records = read(arguments.runs)
    write(arguments.json, records, arguments.command)
    print_table(records)


if __name__ == "__main__":
    main()
