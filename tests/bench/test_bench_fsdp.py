"""bench_fsdp runs, and has figures of every method."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.world
def test_it_runs(tmp_path):
    out = tmp_path / "fsdp.json"
    options = ["--small", "--steps", "1", "--json", out]
    command = [sys.executable, ROOT / "bench" / "bench_fsdp.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["method"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["bf16", "gradients k=1", "gradients k=2", "gradients k=1, weights"]
    assert all(row["seconds"] > 0 and row["rate"] == "none" and row["ranks"] == 2 for row in rows.values())
    of_qcomm = [row["bytes_of_qcomm"] for row in rows.values()]
    assert of_qcomm[0] == 0 < of_qcomm[2] < of_qcomm[1] < of_qcomm[3]
    of_gradients = rows["gradients k=1"]["parameters"]  # of which each rank sends half, at 2 to 4 bits
    assert of_qcomm[1] < of_gradients / 2 * 4 / 8
