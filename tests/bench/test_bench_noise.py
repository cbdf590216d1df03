"""bench_noise runs, and its figures are ratios and shares."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.world
def test_it_runs(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    out = tmp_path / "noise.json"
    command = [sys.executable, ROOT / "bench" / "bench_noise.py", "--steps", "2", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(out.read_text())["rows"]
    assert row["ratio"]["median"] > 0 and 0 < row["share_of_step"]["median"] < 1
