"""Tables of averaged weights, DiLoCo and sharded models."""

from result_tables import beyond_ddp
from result_tables.cells import markdown, read


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
