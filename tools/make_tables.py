"""Puts figures of bench/results into the Markdown files, so that no number is copied by hand.

    python tools/make_tables.py            rewrite the tables
    python tools/make_tables.py --check    only say whether they are up to date; exits 1 if not

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; NAME is a function below.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import beyond_ddp

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "csrc/cuda/README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def train() -> str:
    """``make train``: accuracy, bits, bytes and seconds of each method."""
    rows = []
    for run in read("train_digits.json")["runs"]:
        stats = run["stats"]
        accuracy = f"{100 * run['test_accuracy']:.2f} ± {100 * run['standard_error']:.2f} %"
        bits = [f"{stats[f'bits_per_element{part}']:.2f}" for part in ("_phase1", "_phase2", "_compressed", "")]
        sent, seconds = f"{stats['bytes_sent'] / 1e6:.1f}", f"{stats['communication_seconds']:.1f}"
        rows.append([run["label"], accuracy, *bits, sent, seconds, f"{run['images_per_second']:.0f}"])
    return markdown(
        ["method", "test accuracy", "bits, phase 1", "phase 2", "both", "with small tensors", "MB sent a rank",
         "s communicating", "images/s"],
        rows,
    )  # fmt: skip


def accuracy() -> str:
    """``bench/bench_accuracy.py``: mean over seeds and the paired difference from fp32."""
    document = read("accuracy.json")
    rows = []
    for row in document["summary"]:
        difference = interval = ""
        if "difference" in row:
            difference = f"{row['difference']:+.2f}"
            interval = f"{row['interval'][0]:+.2f} … {row['interval'][1]:+.2f}"
        bits = f"{row['bits_per_element_phase1']:.2f}", f"{row['bits_per_element_phase2']:.2f}"
        rows.append(
            [
                row["label"],
                f"{row['mean_accuracy']:.2f} %",
                difference,
                interval,
                *bits,
                f"{row['bytes_sent'] / 1e6:.0f}",
            ]
        )
    return markdown(
        ["method", "mean accuracy", "minus fp32", "95 % interval", "bits, phase 1", "phase 2", "MB sent a rank"],
        rows,
    )


SCHEDULES = {"falling": "falling rate", "constant": "constant rate"}


def accuracy_low_rate() -> str:
    """``bench/bench_accuracy_low_rate.py``: each scene's methods, and their paired differences from fp32."""
    rows = []
    for row in read("accuracy_low_rate.json")["summary"]:
        scene = f"{row['task']}, {row['ranks']} ranks, {SCHEDULES[row['schedule']]}"
        differences = []
        for name, digits in (("accuracy", 2), ("train_loss", 3)):
            found = row.get(name)
            if found is None or found["interval"] is None:
                differences += ["", ""]
                continue
            low, high = found["interval"]
            differences += [f"{found['difference']:+.{digits}f}", f"{low:+.{digits}f} … {high:+.{digits}f}"]
        bits = [f"{row[name]:.2f}" if name in row else "" for name in ("bits_per_element_compressed", "bits_of_fp32")]
        accuracy = f"{row['mean_accuracy']:.2f} %"
        rows.append([scene, row["method"], str(row["seeds"]), accuracy, *differences, *bits, row.get("verdict", "")])
    return markdown(
        ["scene", "method", "seeds", "accuracy", "minus fp32", "95 % interval", "loss minus fp32", "95 % interval",
         "bits, both phases", "all bytes, as bits", "by the rule"],
        rows,
    )  # fmt: skip


def memory() -> str:
    """``bench/bench_memory.py``: bytes a parameter beyond a plain all-reduce."""
    rows = []
    for row in read("memory.json")["rows"]:
        cells = [f"{row[name]['median']:+.1f}" for name in ("kept", "peak")]
        rows.append([row["method"], *cells, f"{row['tensors']:.1f}"])
    return markdown(["method", "kept between steps", "peak", "of these, residuals"], rows)


OPTIMIZERS = {"adamw": "AdamW", "abs": "AbsAdamW"}


def transformer() -> str:
    """``bench/bench_transformer.py``: held-out losses, and their paired differences from fp32 at the same rate."""
    rows = []
    for row in read("transformer.json")["summary"]:
        exchange, _, optimizer = row["method"].rpartition(" ")
        difference = interval = ""
        if "loss" in row:
            difference = f"{row['loss']['difference']:+.4f}"
            if row["loss"]["interval"] is not None:
                interval = "{:+.4f} … {:+.4f}".format(*row["loss"]["interval"])
        bits = f"{row['bits']:.2f}" if "bits" in row else ""
        model = f"{row['parameters']:,}, {row['steps']}"
        rows.append(
            [model, f"{row['rate']:g}", exchange, OPTIMIZERS[optimizer], str(row["seeds"]), f"{row['mean_loss']:.4f}",
             difference, interval, bits]
        )  # fmt: skip
    return markdown(
        ["parameters, steps", "rate", "exchange", "optimizer", "seeds", "nats", "minus fp32 AdamW", "95 % interval",
         "all bytes, as bits"],
        rows,
    )  # fmt: skip


RATES = {"100mbit": "100 Mb/s", "1gbit": "1 Gb/s", "none": "loopback"}
ALLREDUCE_METHODS = ("fp32", "bf16", "powersgd r=2", "int8", "qcomm k=1", "qcomm k=2")


def measured_on(document: Any) -> str:
    """How busy the machine was already, which the other columns cannot tell."""
    return f"\nLoad average before the run: {document['load'][0]:.1f} on {document['cores']} cores.\n"


def allreduce(name: str = "allreduce.json", methods: Sequence[str] = ALLREDUCE_METHODS) -> str:
    """``bench/bench_allreduce.py``: milliseconds of one bucket, and how many times faster than fp32 and bf16."""
    document, rows = read(name), []
    for row in document["rows"]:
        if row["method"] not in methods:
            continue
        spread = f"{1e3 * row['p10']:.0f} … {1e3 * row['p90']:.0f}"
        ratios = f"{row['ratio_to_fp32']:.1f}", f"{row['ratio_to_bf16']:.1f}"
        place = f"{RATES.get(row['rate'], row['rate'])}, {row['world_size']} ranks"
        sent, error = f"{row['bytes_sent'] / 1e6:.2f}", f"{100 * row['relative_error']:.2g} %"
        rows.append([place, row["method"], f"{1e3 * row['seconds']:.0f}", spread, *ratios, sent, error])
    headings = ["link", "method", "ms", "p10 … p90", "x fp32", "x bf16", "MB sent a rank", "error"]
    return markdown(headings, rows) + measured_on(document)


LOW_RATE_METHODS = ("fp32", "bf16", "powersgd r=1", "powersgd r=2", "powersgd r=4", "int8", "qcomm k=1", "qcomm k=2",
                    "qcomm k=3.2", "qcomm k=3.4")  # fmt: skip


def wan() -> str:
    """``bench/bench_wan.py``: how long a step waits for its exchange between distant hosts."""
    document, rows = read("wan.json"), []
    for row in document["rows"]:
        spread = f"{row['p10']:.2f} … {row['p90']:.2f}"
        rows.append([row["method"], f"{row['exposed_seconds']:.2f}", spread, f"{row['bytes_sent'] / 1e6:.2f}"])
    return markdown(["method", "s exposed", "p10 … p90", "MB sent a rank"], rows) + measured_on(document)


def wan_lossy() -> str:
    """``bench/bench_wan.py --loss``: what an exchange carries over a long path, for numbers of connections."""
    rows = []
    for document in (read("wan_lossy.json"), read("wan_lossy_fp32.json")):
        for row in document["rows"]:
            carried = 8 * row["bytes_sent"] / row["exposed_seconds"] / 1e6
            spread = f"{row['p10']:.1f} … {row['p90']:.1f}"
            sent = f"{row['bytes_sent'] / 1e6:.1f}"
            connections = str(row["connections"]) if row["strategy"] else ""
            rows.append([row["method"], connections, sent, f"{row['exposed_seconds']:.1f}", spread, f"{carried:.0f}"])
    headings = ["method", "connections", "MB sent a rank", "s exposed", "p10 … p90", "Mb/s"]
    return markdown(headings, rows) + measured_on(document)


AUTO_LINKS = {
    "wan_auto.json": "80 ms, 0.1 % lost, cubic",
    "wan_auto_clean.json": "80 ms, cubic",
    "wan_auto_short.json": "1 ms, cubic",
    "wan_auto_bbr.json": "80 ms, 0.1 % lost, BBR",
}


def wan_auto() -> str:
    """``bench/bench_wan.py --connections auto``: against fixed numbers, on links of several kinds."""
    rows, loads = [], []
    for name, link in AUTO_LINKS.items():
        document = read(name)
        loads.append(f"{document['load'][0]:.1f}")
        for row in document["rows"]:
            spread = f"{row['p10']:.2f} … {row['p90']:.2f}"
            asked, made = str(row["connections"]), str(row["connections_made"])
            rows.append([link, asked, made, f"{row['exposed_seconds']:.2f}", spread])
    table = markdown(["there and back", "connections=", "made", "s exposed", "p10 … p90"], rows)
    return table + f"\nLoad averages before the runs: {', '.join(loads)} on {document['cores']} cores.\n"


def several_under_way() -> str:
    """``bench/bench_async.py``: all-reduces under way at once against the same ones one after another."""
    document, rows = read("async.json"), []
    for row in document["rows"]:
        times = [f"{1e3 * row[way]['median']:.0f}" for way in ("one_after_another", "under_way")]
        ratio = row["ratio"]
        place = f"{RATES.get(row['rate'], row['rate'])}, {row['delay_ms']:g} ms one way"
        spread = f"{ratio['p10']:.2f} … {ratio['p90']:.2f}"
        rows.append([place, row["method"], *times, f"{ratio['median']:.2f}", spread])
    headings = ["link", "method", "ms one after another", "ms under way", "times", "p10 … p90"]
    return markdown(headings, rows) + measured_on(document)


def wan_check() -> str:
    """``bench/check_wan.py``: what links with delay and loss carry, in relation to what was asked for."""
    document, rows = read("wan_check.json"), []
    links = dict.fromkeys((row["hosts"], row["rate"], row["control"]) for row in document["rows"])
    for hosts, rate, control in links:
        chosen = [
            row for row in document["rows"] if (row["hosts"], row["rate"], row["control"]) == (hosts, rate, control)
        ]
        off = max(row["delay_median_ms"] - row["delay_ms"] for row in chosen)
        late = max(row["delay_p99_ms"] - row["delay_median_ms"] for row in chosen)
        lost, sent = (sum(row[name] for row in chosen if row["loss"]) for name in ("packets_lost", "packets"))
        asked = sum(row["packets"] * row["loss"] for row in chosen)
        shares = [row["stream_share"] for row in chosen]
        carried = f"{min(shares):.2f} … {max(shares):.2f}"
        place = f"{hosts} hosts, {RATES.get(rate, rate)}"
        rows.append([place, f"{off:+.2f} ms", f"{late:.2f} ms", f"{lost} of {sent}", f"{asked:.0f}", control, carried])
    headings = ["links", "median delay off, most", "p99 beyond the median, most", "packets lost", "asked for",
                "TCP", "share of the rate that a stream carried"]  # fmt: skip
    return markdown(headings, rows) + measured_on(document)


SUMMARY_METHODS = ("fp32", "bf16", "powersgd r=2", "qcomm k=1", "qcomm k=2")


def summary() -> str:
    """The README's table: each method's column of the other benches, empty where a bench does not have the method."""
    trained = {run["label"]: run for run in read("train_digits.json")["runs"]}
    accurate = {row["label"]: row for row in read("accuracy.json")["summary"]}
    steps = {row["method"]: row for row in read("step.json")["rows"] if row["ranks"] == 2}
    reduced = {(row["rate"], row["method"]): row for row in read("allreduce.json")["rows"] if row["world_size"] == 2}
    rows = []
    for method in SUMMARY_METHODS:
        bits = speed = difference = ""
        if method in trained:
            bits = f"{trained[method]['stats']['bits_per_element_compressed']:.2f}"
            speed = f"{trained[method]['images_per_second']:.0f}"
        if "difference" in accurate.get(method, ()):
            lower, upper = accurate[method]["interval"]
            difference = f"{accurate[method]['difference']:+.2f} [{lower:+.2f}, {upper:+.2f}]"
        seconds = (*(reduced[rate, method]["seconds"] for rate in ("100mbit", "1gbit")), steps[method]["seconds"])
        rows.append([method, bits, difference, *(f"{1e3 * figure:.0f} ms" for figure in seconds), speed])
    return markdown(
        ["method", "bits a value", "accuracy, points", "25 MiB, 100 Mb/s", "25 MiB, 1 Gb/s", "step, 100 Mb/s",
         "images/s, no limit"],
        rows,
    )  # fmt: skip


def averaging() -> str:
    """``bench/bench_averaging.py``: mean over seeds, the paired difference from fp32, and bytes."""
    rows = []
    for row in read("averaging.json")["summary"]:
        difference = interval = fewer = ""
        if "difference" in row:
            difference, fewer = f"{row['difference']:+.2f}", f"{row['bytes_ratio']:.1f}"
            interval = f"{row['interval'][0]:+.2f} … {row['interval'][1]:+.2f}"
        accuracy, bits = f"{100 * row['test_accuracy']:.2f} %", f"{row['bits_per_element_compressed']:.2f}"
        rows.append(
            [
                row["method"],
                str(row["seeds"]),
                accuracy,
                difference,
                interval,
                bits,
                f"{row['bytes_sent'] / 1e6:.1f}",
                fewer,
            ]
        )
    return markdown(
        ["method", "seeds", "mean accuracy", "minus fp32", "95 % interval", "bits", "MB sent a rank", "times fewer"],
        rows,
    )


def diloco() -> str:
    """``bench/bench_diloco.py``: held-out losses, and their paired differences from fp32 DiLoCo of the same period."""
    rows = []
    for row in read("diloco.json")["summary"]:
        difference = interval = beside = ""
        if "minus_fp32" in row:
            difference = f"{row['minus_fp32']['difference']:+.3f}"
            if row["minus_fp32"]["interval"] is not None:
                interval = "{:+.3f} … {:+.3f}".format(*row["minus_fp32"]["interval"])
        if "minus_ddp" in row:
            beside = f"{row['minus_ddp']['difference']:+.3f}"
        method = "fp32 in every step" if row["method"] == "ddp" else f"{row['method']}, H={row['period']}"
        ways = "bits_of_values", "bits_of_means", "bits_of_headers", "bits_sent", "bits_received"
        bits = [f"{row[name]:.3g}" if name in row else "" for name in ways]
        rows.append(
            [method, str(row["steps"]), str(row["seeds"]), f"{row['mean_loss']:.3f}", difference, interval,
             row.get("verdict", ""), beside, *bits]
        )  # fmt: skip
    return markdown(
        ["method", "steps", "seeds", "nats", "minus fp32 DiLoCo", "95 % interval", "by the rule", "minus every step",
         "bits of values", "of means", "of headers", "sent in all", "received"],
        rows,
    )  # fmt: skip


SHARDED_TASKS = {"resnet20": ("ResNet-20", "{:.2f} %", 2), "gpt": ("transformer", "{:.4f} nats", 4)}


def fsdp_accuracy() -> str:
    """``bench/bench_fsdp_accuracy.py``: results of sharded models, and their paired differences from fp32."""
    rows = []
    for row in read("fsdp_accuracy.json")["summary"]:
        task, result, digits = SHARDED_TASKS[row["task"]]
        differences = ["", ""]
        if "minus_fp32" in row:
            differences[0] = f"{row['minus_fp32']['difference']:+.{digits}f}"
            if row["minus_fp32"]["interval"] is not None:
                differences[1] = " … ".join(f"{end:+.{digits}f}" for end in row["minus_fp32"]["interval"])
        bits = [f"{row[name]:.2f}" if row.get(name) else "" for name in ("bits_of_gradients", "bits_of_weights")]
        scene = f"{task}, {row['ranks']} ranks, {row['steps']} steps"
        method = row["method"].replace(" weights", ", weights")
        rows.append(
            [scene, method, str(row["seeds"]), result.format(row["mean"]), *differences, *bits, row.get("verdict", "")]
        )
    return markdown(
        ["scene", "method", "seeds", "result", "minus fp32 FSDP2", "95 % interval", "bits of gradients", "of weights",
         "by the rule"],
        rows,
    )  # fmt: skip


def beyond() -> str:
    """DiLoCo and sharded models side by side, see :mod:`beyond_ddp`."""
    return markdown(beyond_ddp.HEADINGS, beyond_ddp.rows(read))


def planner_check() -> str:
    """``bench/check_planner.py``: what the planner says of the all-reduces that were measured."""
    rows = []
    for point in read("planner_check.json")["points"]:
        times = f"{1e3 * point['seconds']:.0f}", f"{1e3 * point['p10']:.0f} … {1e3 * point['p90']:.0f}"
        place = f"{RATES.get(point['rate'], point['rate'])}, {point['world_size']} ranks"
        rows.append(
            [place, point["method"], *times, f"{1e3 * point['predicted']:.0f}", f"{100 * point['error']:+.1f} %"]
        )
    return markdown(["link", "method", "measured ms", "p10 … p90", "predicted ms", "off"], rows)


def published() -> str:
    """``bench/check_planner.py``: what the planner says of what others measured."""
    rows = []
    for point in read("planner_check.json")["published"]:
        figures = point["published"], point["predicted"]
        if point["measure"] == "efficiency":
            shown = [f"{100 * figure:.0f} %" for figure in figures]
        else:
            shown = [f"{figure:.0f}/s" for figure in figures]
        rows.append([point["name"], str(point["gpus"]), *shown, f"{100 * point['error']:+.1f} %", point["source"]])
    return markdown(["experiment", "GPUs", "published", "predicted", "off", "source"], rows)


def published_halves() -> str:
    """``bench/check_planner.py``: the half that the planner was calibrated on, and the half that it was not."""
    found, rows = read("planner_check.json"), []
    for name, half in found["of_halves"].items():
        shares = [f"{100 * half[key]:.0f} %" for key in ("within_15_percent", "likely_holds")]
        sources = len({point["source"] for point in found["halves"][name]})
        rows.append([name, str(sources), str(half["points"]), *shares])
    return markdown(["half", "sources", "points", "within 15 %", 'measured value inside "likely"'], rows)


def published_check() -> str:
    """``bench/check_planner.py``: the half of the published points that nothing was calibrated on."""
    rows = []
    for point in read("planner_check.json")["halves"]["check"]:
        figures = [f"{point[key]:.0f}/s" for key in ("published", "predicted")]
        source = point["source"].split(", ", 1)
        rows.append([source[1], point["name"], str(point["gpus"]), *figures, f"{100 * point['error']:+.1f} %"])
    return markdown(["source", "column", "GPUs", "published", "predicted", "off"], rows)


def pairs() -> str:
    """``bench/bench_allreduce.py --pairs``: is ``auto`` slower than doing nothing where nothing limits the network?"""
    document, rows = read("allreduce_pairs.json"), []
    for row in document["rows"]:
        interval = f"{row['lower']:.2f} … {row['upper']:.2f}"
        place = f"{row['world_size']} ranks, {row['mib']:g} MiB"
        place += ", all_reduce" if row.get("way") == "all_reduce" else ""
        times = f"{1e3 * row['seconds']:.1f}", f"{1e3 * row['seconds_base']:.1f}"
        rows.append([place, row["base"], row["chosen"], *times, f"{row['geometric_mean']:.2f}", interval])
    headings = ["loopback", "against", "auto chose", "ms", "ms against", "times as fast", "95 % interval"]
    return markdown(headings, rows) + measured_on(document)


def step() -> str:
    """``bench/bench_scaling.py --rates 100mbit``: a training step over a slow link."""
    document, rows = read("step.json"), []
    for row in document["rows"]:
        if row["ranks"] == 1:
            continue
        spread = f"{1e3 * row['p10']:.0f} … {1e3 * row['p90']:.0f}"
        compared = f"{row['ratio_to_fp32']:.1f}", f"{row['efficiency']:.2f}"
        exposed = f"{1e3 * row['exposed_seconds']:.0f}"
        speed = f"{row['images_per_second']:.1f}"
        rows.append([row["method"], f"{1e3 * row['seconds']:.0f}", spread, exposed, speed, *compared])
    headings = ["exchange", "ms a step", "p10 … p90", "exposed ms", "images/s", "x fp32", "E(2)"]
    return markdown(headings, rows) + measured_on(document)


def time_to_accuracy() -> str:
    """``bench/bench_time_to_accuracy.py``: seconds of training to the target, the median over seeds."""
    document = read("time_to_accuracy.json")
    runs, rows = document["runs"], []
    for method in dict.fromkeys(run["method"] for run in runs):
        of_method = [run for run in runs if run["method"] == method]
        reached = sum(run["reached"] for run in of_method)
        middle = statistics.median(run["seconds"] for run in of_method)
        seconds = f"{middle:.0f}" if reached == len(of_method) else f"> {middle:.0f}"
        a_step = statistics.median(1e3 * run["seconds"] / run["steps"] for run in of_method)
        steps = f"{statistics.median(run['steps'] for run in of_method):.0f}"
        rows.append([method, seconds, steps, f"{a_step:.0f}", f"{reached} of {len(of_method)}"])
    headings = ["exchange", f"s to {document['target']:.0%}", "steps", "ms a step", "seeds that reached it"]
    return markdown(headings, rows) + measured_on(document)


def paper(experiment: str) -> str:
    """``qcomm paper``: what the paper says about a quantity, and what was found."""
    document = read(f"paper/{experiment}.json")
    seeds = len({run["seed"] for run in document["runs"]})
    rows = [[claim["quantity"], claim["paper"], claim["here"]] for claim in document["claims"]]
    return markdown([f"{document['settings']['dataset']}, {seeds} seeds", "paper", "here"], rows)


def noise_overhead() -> str:
    """``bench/bench_noise.py``: the measurement's share of a step, and the ratio of steps with and without it."""
    document, rows = read("noise.json"), []
    for row in document["rows"]:
        share, ratio = row["share_of_step"], row["ratio"]
        shares = f"{100 * share['median']:.2f} %", f"{100 * share['p10']:.2f} … {100 * share['p90']:.2f} %"
        ratios = f"{ratio['median']:.3f}", f"{ratio['p10']:.2f} … {ratio['p90']:.2f}"
        rows.append([f"{row['model']}, {row['parameters']:,}, {row['batch']}", *shares, *ratios])
    headings = ["model, parameters, batch", "share of the step's processor time", "p10 … p90", "ratio of steps",
                "p10 … p90"]  # fmt: skip
    return markdown(headings, rows) + measured_on(document)


def study(name: str) -> str:
    """``qcomm study``: what sources say about a quantity, what was found, and the verdict."""
    document = read(f"studies/{name}.json")
    seeds = len({run["seed"] for run in document["runs"]})
    rows = [[claim[field] for field in ("quantity", "source", "here", "verdict")] for claim in document["claims"]]
    return markdown([f"{document['settings']['dataset']}, {seeds} seeds", "source", "here", "verdict"], rows)


def partitions() -> str:
    """bench_partitions.py: samples a second of each method, by rate of the link."""
    document = read("partitions.json")
    rows = [
        [
            row["rate"].replace("mbit", " Mb/s").replace("1gbit", "1 Gb/s"),
            row["method"],
            f"{row['samples_per_second']:,.0f} ({row['p10']:,.0f} … {row['p90']:,.0f})",
            f"{100 * row['busy']:.0f} %",
            f"{row['bytes_sent'] / 1e6:.1f}",
        ]
        for row in document["rows"]
        if row["method"] != "one process"
    ]
    headings = ["link", "method", "samples a second", "busy", "MB sent an epoch by the first host"]
    return markdown(headings, rows) + measured_on(document)


def cuda_cures() -> str:
    """The slowest kernels of an operation by the model, on an H100 for 25 MiB: formerly, and now."""
    before, now = (
        {
            row["operation"]: row
            for row in read(f"{name}.json")["rows"]
            if (row["gpu"], row["mebibytes"]) == ("H100", 25)
        }
        for name in ("cuda_model_before", "cuda_model")
    )
    lines = []
    for name, row in now.items():
        slowest = max(before[name]["by_kernel"].items(), key=lambda item: item[1])[0]
        pairs = [(before[name]["by_kernel"][slowest], row["by_kernel"][slowest])]
        pairs += [(before[name][key], row[key]) for key in ("between_kernels", "microseconds", "memory_floor")]
        cells = [f"{old:.0f}, {new:.0f}" for old, new in pairs[:3]]
        lines.append([name, f"`{slowest.split('<')[0]}`", *cells, f"{pairs[3][1]:.0f}"])
    return markdown(["operation", "slowest kernel", "of it", "between kernels", "together", "memory alone"], lines)


STUDIES = ("noise-scale", "batch-size", "bit-rule", "partitions", "data-filter")
PAPER = ("quantization-levels", "gradient-rms", "entropy", "bit-allocation", "bit-rate", "lossless", "ablation")


def cuda_model() -> str:
    """``make cuda-model``: microseconds by the model, and those that memory alone takes."""
    rows = read("cuda_model.json")["rows"]
    gpus, sizes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("gpu", "mebibytes"))
    cells = {
        (row["operation"], row["gpu"], row["mebibytes"]): f"{row['microseconds']:.0f} ({row['memory_floor']:.0f})"
        for row in rows
    }
    return markdown(
        ["operation", *(f"{gpu}, {size} MiB" for gpu in gpus for size in sizes)],
        [
            [name, *(cells[name, gpu, size] for gpu in gpus for size in sizes)]
            for name in dict.fromkeys(row["operation"] for row in rows)
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    "partitions": partitions,
    "summary": summary,
    "train": train,
    "accuracy": accuracy,
    "accuracy_low_rate": accuracy_low_rate,
    "transformer": transformer,
    "memory": memory,
    "allreduce": allreduce,
    "allreduce_low_rate": partial(allreduce, "allreduce_low_rate.json", LOW_RATE_METHODS),
    "allreduce_low_rate_4": partial(allreduce, "allreduce_low_rate_4.json", LOW_RATE_METHODS),
    "wan": wan,
    "wan_check": wan_check,
    "wan_lossy": wan_lossy,
    "wan_auto": wan_auto,
    "several_under_way": several_under_way,
    "averaging": averaging,
    "diloco": diloco,
    "fsdp_accuracy": fsdp_accuracy,
    "beyond_ddp": beyond,
    "planner_check": planner_check,
    "published": published,
    "published_halves": published_halves,
    "published_check": published_check,
    "pairs": pairs,
    "step": step,
    "time_to_accuracy": time_to_accuracy,
    "noise_overhead": noise_overhead,
    "cuda_cures": cuda_cures,
    "cuda_model": cuda_model,
    **{f"study_{name.replace('-', '_')}": partial(study, name) for name in STUDIES},
    **{f"paper_{name.replace('-', '_')}": partial(paper, name) for name in PAPER},
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
