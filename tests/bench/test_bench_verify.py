"""bench_verify runs, and its figures are those of every strategy and value of ``verify``."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.world
def test_it_runs(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    out = tmp_path / "verify.json"
    command = [sys.executable, ROOT / "bench" / "bench_verify.py", "--model", "resnet20", "--steps", "2", "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    rows = {(row["strategy"], row["verify"]) for row in found["rows"]}
    assert rows == {(strategy, verify) for strategy in ("none", "two_phase") for verify in ("interval", "step")}
    assert all(row["ratio"]["median"] > 0 for row in found["rows"]) and 0 < found["share_of_step"] < 1
