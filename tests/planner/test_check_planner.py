"""The bench that holds the planner against measured all-reduces: it runs, and says how far off the planner is."""

import json
from pathlib import Path

import pytest

BENCH = str(Path(__file__).parents[2] / "bench")


@pytest.mark.world
def test_points_are_predicted_from_what_the_ranks_measure(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    monkeypatch.syspath_prepend(BENCH)
    import check_planner
    import gradient_data

    monkeypatch.setattr(gradient_data, "STEPS", 1)  # any gradients do
    row = {"rate": "100mbit", "world_size": 2, "mib": 0.5, "p10": 0.04, "p90": 0.06, "seconds": 0.05}
    rows = [
        {**row, "method": "fp32", "bytes_sent": 2**19},
        {**row, "method": "qcomm k=1", "bytes_sent": 2**15},
        {**row, "method": "int8", "bytes_sent": 2**17},  # not the planner's
    ]
    source, result = tmp_path / "allreduce.json", tmp_path / "planner_check.json"
    source.write_text(json.dumps({"load": [0.0, 0.0, 0.0], "rows": rows}))
    arguments = ["--allreduce", str(source), "--rounds", "2", "--json", str(result)]
    monkeypatch.setattr("sys.argv", ["check_planner.py", *arguments])
    assert check_planner.main() in (0, 1)
    found = json.loads(result.read_text())
    assert [point["method"] for point in found["points"]] == ["fp32", "qcomm k=1"]
    # Half a MiB each way at 12.5 MB/s, and at least the bytes' own time with compression.
    fp32, compressed = (point["predicted"] for point in found["points"])
    assert 0.039 < fp32 < 0.2 and compressed > 2**15 / 12.5e6
    assert "worst:" in capsys.readouterr().out


def test_processors_are_those_of_steps_without_links(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    from check_planner_wan import Scene, fitted, step_seconds

    from qcomm.planner import Codec

    here = Codec(0.8, 1.3, on_gpu=False, assumed=False, ratio=14.0, collective_seconds=4e-3)
    scenes = [Scene(4, "none", 0.0, 5, 520), Scene(4, "none", 0.0, 3, 1150)]
    taken = {scene: step_seconds(scene, here) for scene in scenes}
    found = fitted(Codec(2.0, 3.25, on_gpu=False, assumed=False, ratio=14.0), taken)
    assert {scene: step_seconds(scene, found) for scene in scenes} == pytest.approx(taken, rel=0.02)
    assert found.encode_gb_per_s == pytest.approx(0.8, rel=0.1)
    alone = fitted(here, {scenes[0]: 2 * taken[scenes[0]]})
    assert step_seconds(scenes[0], alone) == pytest.approx(2 * taken[scenes[0]], rel=0.02)
    assert alone.collective_seconds == here.collective_seconds


def test_figures_of_an_earlier_run_are_predicted_anew(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    import check_planner_wan

    codec = {"encode_gb_per_s": 0.8, "decode_gb_per_s": 1.3, "on_gpu": False, "assumed": False}
    scene = {"hosts": 2, "rate": "1gbit", "delay_ms": 50.0, "layers": 2, "width": 300}
    point = {**scene, "method": "fp32", "seconds": 0.2, "p10": 0.1, "p90": 0.3, "predicted": 9.0, "error": 44.0}
    earlier = {"commit": "of the run", "load": [0.5, 0.5, 0.5], "codecs": {"2": codec}, "points": [point]}
    source, result = tmp_path / "earlier.json", tmp_path / "anew.json"
    source.write_text(json.dumps(earlier))
    monkeypatch.setattr("sys.argv", ["check_planner_wan.py", "--measured", str(source), "--json", str(result)])
    check_planner_wan.main()
    found = json.loads(result.read_text())
    assert {name: found[name] for name in ("commit", "load")} == {name: earlier[name] for name in ("commit", "load")}
    # Two rings one beside the other, each of two phases with two latencies.
    assert found["points"][0]["predicted"] == pytest.approx(0.2, rel=0.1) and found["points"][0]["seconds"] == 0.2
