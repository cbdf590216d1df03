"""bench_async runs, finds the same bits in both ways, and has figures of every link and method."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.world
def test_it_runs(tmp_path):
    out = tmp_path / "async.json"
    options = ["--rates", "none", "--delays-ms", "0", "--mib", "0.1", "--tensors", "5", "--turns", "2", "--json", out]
    command = [sys.executable, ROOT / "bench" / "bench_async.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert [(row["rate"], row["method"]) for row in rows] == [("none", "qcomm k=1"), ("none", "fp32")]
    assert all(row["ratio"]["median"] > 0 and len(row["all_seconds"]) == 2 for row in rows)
