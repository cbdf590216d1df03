"""The tool that counts a collective's way through the package, and the bounds that the package keeps to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "trace_path.py"
MOST_FILES = {"bucket": 23, "bypass": 9, "compress": 5}
MOST_MOVES = {"bucket": 250, "bypass": 18, "compress": 19}

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="code objects have no qualified name")


def trace(*arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize(
    "case",
    [pytest.param("bucket", marks=pytest.mark.world), pytest.param("bypass", marks=pytest.mark.world), "compress"],
)
def test_a_path_stays_within_its_files_and_moves(case, tmp_path):
    run = trace(case, "--json", tmp_path / "counts.json")
    assert run.returncode == 0, run.stderr
    counts = json.loads((tmp_path / "counts.json").read_text())[case]
    assert 0 < counts["files"] <= MOST_FILES[case] and counts["files"] <= counts["moves"] <= MOST_MOVES[case], counts


def test_the_list_has_a_line_for_each_move():
    run = trace("compress", "--list")
    summary, _, thread, *moves = run.stdout.splitlines()
    assert thread.strip() == "MainThread" and moves[0].endswith(": compress")
    assert summary.endswith(f"{len(moves)} moves")


def test_an_unknown_case_is_refused():
    run = trace("packet")
    assert run.returncode == 2 and "case must be one of bucket, bypass, compress, got packet" in run.stderr
