"""The scaling bench from end to end, under mpirun and torchrun: every figure that it promises is there and possible."""

import json
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from mpirun import environment

BENCH = Path(__file__).parents[2] / "bench"
METHODS = ["fp32", "qcomm k=1"]


@pytest.fixture
def ranks(monkeypatch):
    """bench/ranks.py, whose neighbours it imports by name."""
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    monkeypatch.syspath_prepend(str(BENCH))
    import ranks

    return ranks


def check_rows(document, launcher, world_size):
    counts = [count for count in (1, 2, 4) if count <= world_size]
    rows = document["rows"]
    expected = {
        (mode, count, method)
        for mode in ("weak", "strong")
        for count in counts
        for method in (["no exchange", *METHODS] if count > 1 else ["no exchange"])
    }
    assert sorted((row["mode"], row["ranks"], row["method"]) for row in rows) == sorted(expected)
    speeds = {(row["mode"], row["ranks"], row["method"]): row["images_per_second"] for row in rows}
    for row in rows:
        mode, count = row["mode"], row["ranks"]
        assert row["launcher"].lower().startswith(launcher)
        assert row["batch"] == (4 if mode == "weak" else 4 * world_size // count)
        assert row["images_per_second"] == pytest.approx(count * row["batch"] / row["seconds"])
        assert row["efficiency"] == pytest.approx(row["images_per_second"] / (count * speeds[mode, 1, "no exchange"]))
        assert row["of_local"] == pytest.approx(row["images_per_second"] / speeds[mode, count, "no exchange"])
        assert 0 < row["p10"] <= row["seconds"] <= row["p90"]
        assert 0 <= row["exposed_seconds"] < row["p90"]
        assert (row["exposed_seconds"] > 0) == (row["method"] != "no exchange")


def check_trace(path, world_size):
    """Every rank has every kind of span, and spans of a row do not overlap."""
    events = json.loads(path.read_text())["traceEvents"]
    for rank in range(world_size):
        spans = [event for event in events if event["pid"] == rank and event["ph"] == "X"]
        names = {span["name"] for span in spans}
        assert {"forward", "backward", "exposed communication", "optimizer", "bucket 0"} < names
        assert {"encode", "reduce", "decode", "exchange_1", "exchange_2"} < names
        assert any(event["name"] == "bucket 0 ready" for event in events if event["pid"] == rank)
        for row in {span["tid"] for span in spans}:
            of_row = sorted((span["ts"], span["ts"] + span["dur"]) for span in spans if span["tid"] == row)
            for (begin, end), (after, _) in pairwise(of_row):
                assert 0 <= begin <= end <= after + 1e-3  # microseconds
        assert sum(span["name"] == "forward" for span in spans) == 3


@pytest.mark.world
@pytest.mark.parametrize(("launcher", "world_size"), [("mpirun", 4), ("torchrun", 2)])
def test_runs_under_the_launcher(ranks, tmp_path, launcher, world_size):
    if launcher == "mpirun":
        pytest.importorskip("mpi4py", reason="mpi4py is not installed")
        if ranks.find_mpirun() is None:
            pytest.skip("no mpirun: pip install mpich")
    options = ["--small", "--steps", "2", "--methods", *METHODS, "--json", "found/scaling.json"]
    options += ["--trace", "step.json"] if world_size == 2 else []
    ended = subprocess.run(
        [*ranks.launch_command(launcher, world_size), str(BENCH / "bench_scaling.py"), *options],
        cwd=tmp_path,
        env=environment(**ranks.QUIET),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "images/s" in ended.stdout
    check_rows(json.loads((tmp_path / "found" / "scaling.json").read_text()), launcher[:3], world_size)
    if world_size == 2:
        check_trace(tmp_path / "step.json", world_size)


def test_a_missing_launcher_is_named(ranks, monkeypatch):
    monkeypatch.setattr(ranks, "find_mpirun", lambda: None)
    with pytest.raises(ranks.RanksError, match="pip install mpich"):
        ranks.launch_command("mpirun", 2)
    with pytest.raises(ValueError, match="launcher must be torchrun or mpirun, got 'srun'"):
        ranks.launch_command("srun", 2)


def test_a_rank_that_fails_is_an_error_of_the_bench(ranks, tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(ranks.RanksError, match=r"fails.py on 1 ranks, rate none: ended with status 1"):
        ranks.run_ranks(script, [], 1)
