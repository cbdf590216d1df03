"""An interrupted study of bench/, which goes on with the runs that it lacks."""

import subprocess
import sys
from pathlib import Path

from mpirun import environment

BENCH = Path(__file__).parents[2] / "bench"


def check_an_interrupted_study_goes_on(script, folder):
    """Runs ``script --quick``, of two runs, loses the second one, and runs it again; returns both outputs."""
    command = [sys.executable, str(BENCH / script), "--quick", "--json", "found.json"]
    lines, outputs = folder / "found.jsonl", []
    for _ in range(2):
        ended = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert ended.returncode == 0, ended.stderr
        outputs.append(ended.stdout)
        kept = lines.read_text().splitlines()
        assert len(kept) == 2
        lines.write_text(kept[0] + "\n")
    assert "2 runs, 2 missing" in outputs[0] and "2 runs, 1 missing" in outputs[1]
    return outputs
