"""Prose of the tree in numbers: openings of docstrings, the word "what", comments in the core, length of lines.

    python tools/prose_count.py                      the figures
    python tools/prose_count.py --worst              and the ten worst files of each
    python tools/prose_count.py --check              exits 1 where a figure is outside its bounds
    python tools/prose_count.py --json prose.json    the figures in a file

The definitions:

- Docstrings are those of modules, classes and functions of qcomm/**/*.py, examples included. A module "opens with a
  question word" if its first word is What, How, Which, Whether, Who, Where or When.
- A word is a run of letters, digits, underscores and inner apostrophes. "what" counts alone, in either case.
- A comment line of csrc holds nothing but a comment. Its share is of all lines, blank ones included. Headers are
  the files of csrc/include. Sources are all other .cpp, .cu, .cuh, .inl and .h files.
- Pages are README.md and docs/**/*.md without their fenced code. A prose line is neither blank nor a table's.

Bounds of --check: no module opens with a question word; "what" fewer than 2 times in 1000 words of docstrings; comments
13 to 20 % of the sources and 25 to 35 % of the headers; README.md at most 8192 bytes.
"""

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
QUESTION_WORDS = frozenset({"what", "how", "which", "whether", "who", "where", "when"})
WORD = re.compile(r"\w+(?:'\w+)*")
CORE_SUFFIXES = frozenset({".cpp", ".cu", ".cuh", ".inl", ".h"})
COLUMNS = 100
WORST = 10
MOST_WHAT = 2.0  # fewer, in a thousand words
SOURCE_COMMENTS = 13.0, 20.0  # percent
HEADER_COMMENTS = 25.0, 35.0
MOST_README_BYTES = 8192


class Part(NamedTuple):
    """``count`` of ``total`` in a file: comment lines of lines, or "what" of words."""

    path: str
    count: int
    total: int


def rate(parts: Iterable[Part], of: int) -> float:
    """Returns the count of all parts in ``of`` of their total; 0 where there is nothing."""
    parts = list(parts)
    total = sum(part.total for part in parts)
    return of * sum(part.count for part in parts) / total if total else 0.0


def what(path: str, text: str) -> Part:
    """Counts "what" among the words of a text."""
    words = WORD.findall(text.lower())
    return Part(path, words.count("what"), len(words))


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Yields the docstrings of a module, its classes and its functions."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def opens_with_question(tree: ast.Module) -> bool:
    """Returns True if the module's docstring opens with a question word."""
    first = WORD.search(ast.get_docstring(tree) or "")
    return first is not None and first.group().lower() in QUESTION_WORDS


def comment_lines(text: str) -> int:
    """Counts the lines of a C++ text that hold nothing but a comment."""
    count, inside = 0, False
    for line in map(str.strip, text.splitlines()):
        if inside:
            before, end, after = line.partition("*/")
            inside = not end
            count += bool(before or end) and not after.strip()
        elif line.startswith("//"):
            count += 1
        elif line.startswith("/*"):
            _, end, after = line[2:].partition("*/")
            inside = not end
            count += not after.strip()
    return count


def without_code(text: str) -> list[str]:
    """Returns the lines of a page outside its fenced code."""
    lines, fenced = [], False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines.append(line)
    return lines


def long_lines(path: str, lines: Sequence[str]) -> Part:
    """Counts the prose lines over COLUMNS."""
    prose = [line for line in lines if line.strip() and not line.lstrip().startswith("|")]
    return Part(path, sum(len(line) > COLUMNS for line in prose), len(prose))


class Prose:
    """The parts of a tree.

    Args:
        root: holds qcomm, csrc, docs and README.md.
    """

    def __init__(self, root: Path) -> None:
        self.modules: list[Part] = []
        self.docstrings: list[Part] = []
        for path in sorted(root.glob("qcomm/**/*.py")):
            tree, name = ast.parse(path.read_text()), str(path.relative_to(root))
            self.docstrings.append(what(name, "\n".join(docstrings(tree))))
            if ast.get_docstring(tree):
                self.modules.append(Part(name, opens_with_question(tree), 1))
        self.sources: list[Part] = []
        self.headers: list[Part] = []
        for path in sorted(root.glob("csrc/**/*")):
            if path.suffix in CORE_SUFFIXES:
                text, public = path.read_text(), path.is_relative_to(root / "csrc" / "include")
                part = Part(str(path.relative_to(root)), comment_lines(text), len(text.splitlines()))
                (self.headers if public else self.sources).append(part)
        self.pages: list[Part] = []
        self.lines: list[Part] = []
        for path in [root / "README.md", *sorted(root.glob("docs/**/*.md"))]:
            name, lines = str(path.relative_to(root)), without_code(path.read_text())
            self.pages.append(what(name, "\n".join(lines)))
            self.lines.append(long_lines(name, lines))
        self.readme_bytes = (root / "README.md").stat().st_size

    def figures(self) -> dict[str, float]:
        """Returns the figures by name, with their units in it."""
        return {
            "modules_opening_with_question_percent": rate(self.modules, 100),
            "docstring_what_per_1000_words": rate(self.docstrings, 1000),
            "source_comment_percent": rate(self.sources, 100),
            "header_comment_percent": rate(self.headers, 100),
            "page_what_per_1000_words": rate(self.pages, 1000),
            "page_lines_over_100_columns": sum(part.count for part in self.lines),
            "readme_bytes": self.readme_bytes,
        }

    def worst(self) -> dict[str, list[Part]]:
        """Returns, for each figure of several files, those that are to be mended first."""

        def most(parts: Sequence[Part]) -> list[Part]:
            return sorted((part for part in parts if part.count), key=lambda part: -part.count)[:WORST]

        def farthest(parts: Sequence[Part], bounds: tuple[float, float]) -> list[Part]:
            outside = [part for part in parts if lines_outside(part, bounds) > 0]
            return sorted(outside, key=lambda part: -lines_outside(part, bounds))[:WORST]

        return {
            "modules_opening_with_question_percent": most(self.modules),
            "docstring_what_per_1000_words": most(self.docstrings),
            "source_comment_percent": farthest(self.sources, SOURCE_COMMENTS),
            "header_comment_percent": farthest(self.headers, HEADER_COMMENTS),
            "page_what_per_1000_words": most(self.pages),
            "page_lines_over_100_columns": most(self.lines),
        }


def lines_outside(part: Part, bounds: tuple[float, float]) -> float:
    """Returns how many comment lines a file has too few or too many."""
    low, high = (part.total * bound / 100 for bound in bounds)
    return max(low - part.count, part.count - high)


def violations(figures: dict[str, float]) -> list[str]:
    """Returns a line for each figure outside its bounds."""
    bounds = {
        "modules_opening_with_question_percent": (figures["modules_opening_with_question_percent"] == 0, "0"),
        "docstring_what_per_1000_words": (figures["docstring_what_per_1000_words"] < MOST_WHAT, f"below {MOST_WHAT:g}"),
        "readme_bytes": (figures["readme_bytes"] <= MOST_README_BYTES, f"at most {MOST_README_BYTES}"),
    }
    for name, (low, high) in (("source", SOURCE_COMMENTS), ("header", HEADER_COMMENTS)):
        key = f"{name}_comment_percent"
        bounds[key] = low <= figures[key] <= high, f"{low:g} to {high:g}"
    return [
        f"{name} is {round(figures[name], 2)}, must be {wanted}" for name, (well, wanted) in bounds.items() if not well
    ]


def main() -> int:
    summary, examples = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="tree to read (default: this one)")
    parser.add_argument("--worst", action="store_true", help=f"print the {WORST} worst files of each figure")
    parser.add_argument("--check", action="store_true", help="exit 1 where a figure is outside its bounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    arguments = parser.parse_args()
    prose = Prose(arguments.root)
    figures, worst = prose.figures(), prose.worst() if arguments.worst else {}
    for name, value in figures.items():
        print(f"{name:40} {value:10.2f}" if isinstance(value, float) else f"{name:40} {value:10d}")
        for part in worst.get(name, ()):
            print(f"    {part.count:5d} of {part.total:5d}  {part.path}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    found = violations(figures) if arguments.check else []
    for line in found:
        print(f"prose_count: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
