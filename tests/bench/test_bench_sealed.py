"""bench_sealed runs, and has figures of every method."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.world
def test_it_runs(tmp_path):
    pytest.importorskip("cryptography", reason="cryptography is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    out = tmp_path / "sealed.json"
    options = ["--rates", "none", "--mib", "1", "--pairs", "2", "--json", out]
    command = [sys.executable, ROOT / "bench" / "bench_sealed.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    assert [(row["rate"], row["method"]) for row in rows] == [("none", name) for name in ("k=1", "k=3.4", "none")]
    assert all(row["ratio"] > 0 and row["sealing_seconds"] > 0 for row in rows)
