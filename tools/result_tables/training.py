"""Tables of training on whole gradients: accuracy, losses, memory, and what measuring noise costs."""

import statistics

from result_tables.cells import markdown, measured_on, read


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
