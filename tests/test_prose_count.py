"""The tool that counts prose: each figure on a small tree with known numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "prose_count.py"
HEADER = "/* Doubles.\n * @param x a number */\n// Exact.\nint twice(int x);  // never fails\n\n\n\n\nint x;\nint y;\n"
SOURCE = "// Adds.\n\nint twice(int x) {\n  /* one */ return\n  x + x;\n}\n"
PAGE = "# Title\n\nWhat is this?\n```\nwhat = 1\n```\n| what | is |\n" + "word " * 20 + "x\n"


def count(root, *arguments):
    command = [sys.executable, str(TOOL), "--root", str(root), "--json", str(root / "prose.json"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return run, json.loads((root / "prose.json").read_text())


@pytest.fixture
def tree(tmp_path):
    files = {
        "qcomm/room/grids.py": '"""Grids."""\n\n\ndef f():\n    """Returns \'what\' it is, somewhat."""\n',
        "qcomm/steps.py": '"""What a step is."""\nwhat = 1  # what\n',
        "qcomm/bare.py": "x = 1\n",
        "csrc/include/qcomm/twice.h": HEADER,
        "csrc/cpu/twice.cpp": SOURCE,
        "csrc/cuda/README.md": "// not a source\n",
        "README.md": PAGE,
        "docs/room/guide.md": "A guide.\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_figures_of_a_known_tree(tree):
    _, figures = count(tree)
    assert figures == {
        "modules_opening_with_question_percent": pytest.approx(50.0),
        "docstring_what_per_1000_words": pytest.approx(2000 / 10),
        "source_comment_percent": pytest.approx(100 / 6),
        "header_comment_percent": pytest.approx(30.0),
        "page_what_per_1000_words": pytest.approx(2000 / 29),
        "page_lines_over_100_columns": 1,
        "readme_bytes": len(PAGE),
    }


def test_check_names_each_figure_outside_its_bounds(tree):
    run, _ = count(tree, "--check")
    assert run.returncode == 1
    assert [line.split()[1] for line in run.stderr.splitlines()] == [
        "modules_opening_with_question_percent",
        "docstring_what_per_1000_words",
    ]
    (tree / "qcomm/steps.py").write_text('"""Steps."""\n')
    (tree / "qcomm/room/grids.py").write_text('"""Grids."""\n')
    run, _ = count(tree, "--check")
    assert (run.returncode, run.stderr) == (0, "")


def test_the_worst_files_are_named(tree):
    run, _ = count(tree, "--worst")
    assert "1 of     1  qcomm/steps.py" in run.stdout and "qcomm/bare.py" not in run.stdout
