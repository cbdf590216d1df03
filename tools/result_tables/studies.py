"""Tables of studies and of the repeated paper."""

from result_tables.cells import markdown, measured_on, read

STUDIES = ("noise-scale", "batch-size", "bit-rule", "partitions", "data-filter")

PAPER = ("quantization-levels", "gradient-rms", "entropy", "bit-allocation", "bit-rate", "lossless", "ablation")


def paper(experiment: str) -> str:
    """``qcomm paper``: what the paper says about a quantity, and what was found."""
    document = read(f"paper/{experiment}.json")
    seeds = len({run["seed"] for run in document["runs"]})
    rows = [[claim["quantity"], claim["paper"], claim["here"]] for claim in document["claims"]]
    return markdown([f"{document['settings']['dataset']}, {seeds} seeds", "paper", "here"], rows)


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
