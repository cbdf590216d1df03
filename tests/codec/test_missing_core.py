"""The package without its compiled core, as Python finds it in the source folder after ``pip install .``."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qcomm


@pytest.mark.parametrize(
    ("beside", "advice"),
    [
        (["csrc"], ["this is the source folder", "start it in another folder", "`make build`"]),
        ([], ["install qcomm again"]),
    ],
    ids=["source_folder", "damaged_installation"],
)
def test_a_package_without_its_core_says_what_to_do(beside, advice, tmp_path):
    shutil.copytree(Path(qcomm.__file__).parent, tmp_path / "qcomm", ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    for name in beside:
        (tmp_path / name).mkdir()
    # -S leaves out the finder of a development install, which has a core for every folder.
    folders = [str(tmp_path), str(Path(torch.__file__).parents[1])]
    ended = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {folders}; import qcomm"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: {tmp_path / 'qcomm'} has no compiled core (_C) for Python 3."), ended.stderr
    assert all(words in last for words in advice)
    assert "circular import" not in ended.stderr
