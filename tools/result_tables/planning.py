"""Tables that hold the planner against what was measured, here and by others."""

from result_tables.cells import RATES, markdown, read


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
