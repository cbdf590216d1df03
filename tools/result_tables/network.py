"""Tables of exchanges and steps over networks, and the README's, which puts some of them side by side."""

from collections.abc import Sequence

from result_tables.cells import RATES, markdown, measured_on, read

ALLREDUCE_METHODS = ("fp32", "bf16", "powersgd r=2", "int8", "qcomm k=1", "qcomm k=2")


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
