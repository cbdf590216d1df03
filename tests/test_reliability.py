"""docs/reliability.md: every row of its tables names a test that exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
NONE = "none: it is torch's own error"


def rows() -> list[tuple[str, str]]:
    """(fault, test) of every row in a table whose last column is the test."""
    found, has_tests = [], False
    for line in PAGE.read_text().splitlines():
        if not line.startswith("|"):
            has_tests = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[-1] == "test":
            has_tests = True
        elif has_tests and not set(cells[0]) <= {"-"}:
            found.append((cells[0], cells[-1]))
    return found


def test_there_are_rows() -> None:
    assert len(rows()) > 25 and all(fault for fault, _ in rows())


@pytest.mark.parametrize(("fault", "test"), rows(), ids=[fault[:40] for fault, _ in rows()])
def test_a_row_names_a_test_that_exists(fault: str, test: str) -> None:
    if test == NONE:
        return
    named = re.fullmatch(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", test)
    assert named is not None, test
    tree = ast.parse((ROOT / named[1]).read_text())
    tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test")}
    assert named[2] in tests if named[2] else tests
