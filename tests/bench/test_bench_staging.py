"""bench_staging runs, and compares the means before it times them."""

import json
import subprocess
import sys
from pathlib import Path

import late_device
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.world
def test_it_runs(tmp_path):
    late_device.build()
    out = tmp_path / "staging.json"
    command = [
        sys.executable,
        ROOT / "bench" / "bench_staging.py",
        "--turns",
        "2",
        "--elements",
        "100000",
        "--json",
        out,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = json.loads(out.read_text())["ranks"]
    assert list(ranks) == ["1", "2"]
    for found in ranks.values():
        assert found["wrong"] == 0
        assert 1 <= found["buckets_of_host_memory"] <= 3
        assert all(found[kind][name]["least"] > 0 for kind in ("wall", "processor") for name in ("cpu", "staged"))
