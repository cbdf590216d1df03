"""Programs that the frameworks' own launchers, and torchrun, start from nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qcomm

SCRIPT = Path(__file__).parents[1] / "support" / "framework_script.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
STEPS = 4

pytestmark = [pytest.mark.world, pytest.mark.slow]


@pytest.mark.parametrize(
    ("framework", "kind", "launcher"),
    [
        ("lightning", "ddp", []),
        ("lightning", "ddp_spawn", []),
        ("lightning", "ddp_fork", []),
        ("accelerate", "accelerate", TORCHRUN),
        ("transformers", "transformers", TORCHRUN),
    ],
)
def test_a_launched_program_compresses(tmp_path, framework, kind, launcher):
    pytest.importorskip(framework, reason=f"{framework} is not installed: make test-frameworks")
    paths = [str(Path(qcomm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(SCRIPT), kind, str(tmp_path)]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["steps"] == second["steps"] == STEPS
    assert first["weights"] == second["weights"]
    for rank in (first, second):
        assert 0 < rank["bytes_sent"] < rank["bytes_uncompressed"] / 5
