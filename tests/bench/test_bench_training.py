"""The benches that train, and the plots: they run, and their figures are what they say."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from mpirun import environment

BENCH = Path(__file__).parents[2] / "bench"
PNG = b"\x89PNG\r\n\x1a\n"


def bench(script, *options, folder):
    """Runs a bench; its figures."""
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    command = [sys.executable, str(BENCH / script), *options, "--small", "--json", "found.json"]
    ended = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.mark.world
def test_bits_by_layer_are_those_that_are_sent(tmp_path):
    (run,) = bench("bench_bitrate.py", "--methods", "qcomm k=1", folder=tmp_path)["runs"]
    assert run["steps"] == [0, 2, 4]
    elements = [layer["elements"] for layer in run["layers"]]
    assert len(elements) == 18 and min(elements) >= 1024 and len({layer["name"] for layer in run["layers"]}) == 18
    for bits, (phase1, phase2) in zip(run["bits_per_element"], run["bits_per_element_phases"], strict=True):
        assert all(1.5 < value < 4 for value in bits) and 1.5 < phase2 < 4
        # Layer by layer and chunk by chunk: other headers, and a half of the values stays with its owner.
        assert math.fsum(map(math.prod, zip(bits, elements, strict=True))) / sum(elements) == pytest.approx(
            phase1, rel=0.1
        )


@pytest.mark.world
def test_time_to_accuracy(tmp_path):
    methods = ["fp32", "powersgd r=2", "qcomm k=1"]
    options = ["--rate", "none", "--methods", *methods, "--most-steps", "6", "--test-every", "2", "--target", "1"]
    found = bench("bench_time_to_accuracy.py", *options, folder=tmp_path)
    assert [run["method"] for run in found["runs"]] == methods
    for run in found["runs"]:
        steps, seconds, accuracy = zip(*run["points"], strict=True)
        assert steps == (2, 4, 6) and run["steps"] == 6 and not run["reached"]
        assert 0 < seconds[0] < seconds[1] < seconds[2] == run["seconds"]
        assert all(0 <= value < 1 for value in accuracy) and accuracy[-1] == run["test_accuracy"]


def draw(*options):
    return subprocess.run(
        [sys.executable, str(BENCH / "plots.py"), *options], capture_output=True, text=True, timeout=100, check=False
    )


def test_plots_of_the_results(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawn = draw("--out", str(tmp_path))
    assert drawn.returncode == 0, drawn.stderr
    names = {path.stem for path in tmp_path.iterdir()}
    assert "allreduce_speedup" in names
    assert all(path.read_bytes().startswith(PNG) for path in tmp_path.iterdir())
    for name in {"allreduce_sizes", "allreduce_speedup", "bitrate", "scaling", "time_to_accuracy"} - names:
        assert f"{name} is left out, there is no" in drawn.stderr


def test_every_method_has_a_colour(monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.syspath_prepend(str(BENCH))
    import allreduce_methods
    import plots
    import training

    methods = {*training.METHODS, *allreduce_methods.GRIDS, *allreduce_methods.COARSE_GRIDS}
    assert methods - {training.LOCAL} <= plots.COLOURS.keys()
    colours = plots.COLOURS.values()
    assert len(set(colours)) == len(colours)


def test_an_unknown_plot_is_named(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawn = draw("--out", str(tmp_path), "nonsense")
    assert drawn.returncode == 2 and "got nonsense" in drawn.stderr
