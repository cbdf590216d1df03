"""The rooms of qcomm/: CONTRIBUTING.md has their list, and every import follows it."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qcomm"
# Beside the rooms: the public names, and the command line's entry.
DOORS = {"qcomm", "qcomm.__main__"}


class Import(NamedTuple):
    """Module ``importer`` imports ``name`` of ``module``."""

    importer: str
    module: str
    name: str


def listed_rooms():
    """Room -> (floor, its modules), as the table in CONTRIBUTING.md has them."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {room: (int(floor), set(re.findall(r"`(\w+)`", text))) for floor, room, text in rows}


def module_paths():
    """Dotted name -> path of every module of the package; a folder's name is that of its ``__init__.py``."""
    paths = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


PATHS = module_paths()
ROOMS = listed_rooms()


def room_of(module):
    return module.split(".")[1] if "." in module else ""


def imports():
    """Every import of the package's own modules, also those inside functions."""
    found = []
    for importer, path in PATHS.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [Import(importer, alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{importer} has a relative import"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found.append(Import(importer, inner if inner in PATHS else str(node.module), alias.name))
    return [item for item in found if item.module in PATHS]


IMPORTS = imports()


@pytest.mark.xfail(reason="the rooms are being built")
def test_every_module_is_in_a_room_of_the_list():
    modules = {name for name in PATHS if name not in DOORS}
    assert {room_of(name) for name in modules} == set(ROOMS)
    for room, (_, listed) in ROOMS.items():
        inside = {name.split(".")[2] for name in modules if name.startswith(f"qcomm.{room}.")}
        words = listed - {"all_reduce", "_C"}  # which the table mentions, too
        assert inside == words, f"CONTRIBUTING.md does not list the modules of {room}"


@pytest.mark.xfail(reason="the rooms are being built")
def test_imports_point_down():
    upward = [
        f"{item.importer} -> {item.module}"
        for item in IMPORTS
        if item.importer not in DOORS
        and room_of(item.importer) != room_of(item.module)
        and ROOMS[room_of(item.importer)][0] <= ROOMS[room_of(item.module)][0]
    ]
    assert not upward


@pytest.mark.xfail(reason="the rooms are being built", strict=False)
def test_rooms_are_entered_by_their_doors():
    through_walls = [
        f"{item.importer} -> {item.module}"
        for item in IMPORTS
        if room_of(item.importer) != room_of(item.module) and item.module.count(".") > 1
    ]
    assert not through_walls


@pytest.mark.xfail(reason="the rooms are being built", strict=False)
def test_doors_offer_every_name_that_is_taken():
    for item in IMPORTS:
        if item.module not in DOORS and PATHS[item.module].name == "__init__.py":
            tree = ast.parse(PATHS[item.module].read_text())
            offered = next((ast.literal_eval(n.value) for n in tree.body if is_all(n)), [])
            assert item.name in offered, f"{item.importer} takes {item.name} of {item.module}, which does not offer it"


def is_all(node):
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"


@pytest.mark.xfail(reason="the rooms are being built", strict=False)
def test_modules_import_in_no_circle():
    below = {name: set() for name in PATHS}
    for item in IMPORTS:
        if item.importer not in DOORS and item.importer != item.module:
            below[item.importer].add(item.module)
    done = set()
    while ready := [name for name in below if name not in done and below[name] <= done | {name} | DOORS]:
        done.update(ready)
    assert not set(below) - done, "these import each other"


@pytest.mark.parametrize("room", sorted(ROOMS))
@pytest.mark.xfail(reason="the rooms are being built", strict=False)
def test_a_room_says_what_it_is(room):
    path = PACKAGE / room / "__init__.py"
    docstring = ast.get_docstring(ast.parse((path if path.exists() else PACKAGE / f"{room}.py").read_text()))
    assert docstring is not None
    assert not re.match(r"(What|How|Which|Whether|Who|Where|When)\b", docstring)
