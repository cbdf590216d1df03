"""Tables of the model of the CUDA kernels."""

from result_tables.cells import markdown, read


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
