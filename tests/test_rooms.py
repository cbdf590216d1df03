"""The rooms of qcomm/: CONTRIBUTING.md has their list, and every import follows it."""

import ast
import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qcomm"
# Beside the rooms: the public names, and the command line's entry.
DOORS = {"qcomm", "qcomm.__main__"}
PUBLIC_FLOOR = 7.5


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
                found += [Import(importer, alias.name, "*") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{importer} has a relative import"
                found += [imported(importer, str(node.module), alias.name) for alias in node.names]
    return [item for item in found if item.module in PATHS and item.name != "_C"]


def imported(importer, module, name):
    """The import of ``name``, which may be a module, or a function that a door offers under a module's name."""
    inner = f"{module}.{name}"
    own_room = module.count(".") == 1 and room_of(importer) == room_of(module)
    return Import(importer, inner if inner in PATHS and (own_room or name not in offered(module)) else module, name)


def offered(door):
    """The names in ``__all__`` of a room's door."""
    for node in ast.parse(PATHS[door].read_text()).body if door in PATHS else ():
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    return []


def floor_of(module):
    """The floor of a module's room. The public names are above the rooms that they come from."""
    return ROOMS[room_of(module)][0] if room_of(module) else PUBLIC_FLOOR


IMPORTS = imports()


def test_every_module_is_in_a_room_of_the_list():
    modules = {name for name in PATHS if name not in DOORS}
    assert {room_of(name) for name in modules} == set(ROOMS)
    for room, (_, listed) in ROOMS.items():
        inside = {name.split(".")[2] for name in modules if name.startswith(f"qcomm.{room}.")}
        inside -= {"__init__"}
        assert inside == listed - {"all_reduce", "_C"}, f"CONTRIBUTING.md does not list the modules of {room}"


def test_imports_point_down():
    upward = [
        f"{item.importer} -> {item.module}"
        for item in IMPORTS
        if item.importer not in DOORS
        and room_of(item.importer) != room_of(item.module)
        and floor_of(item.importer) <= floor_of(item.module)
    ]
    assert not upward


def test_rooms_are_entered_by_their_doors():
    through_walls = [
        f"{item.importer} -> {item.module}"
        for item in IMPORTS
        if room_of(item.importer) != room_of(item.module) and item.module.count(".") > 1
    ]
    assert not through_walls


def test_doors_offer_every_name_that_is_taken():
    missing = [
        f"{item.importer} takes {item.name} of {item.module}"
        for item in IMPORTS
        if item.importer not in DOORS
        and room_of(item.importer) != room_of(item.module)
        and PATHS[item.module].name == "__init__.py"
        and item.name != "*"
        and item.name not in offered(item.module)
    ]
    assert not missing


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_door_offers_no_modules(room):
    """A module of the same name would hide a function, whichever of the two is imported last."""
    door = importlib.import_module(f"qcomm.{room}")
    assert [name for name in getattr(door, "__all__", []) if isinstance(getattr(door, name), ModuleType)] == []


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
def test_a_room_says_what_it_is(room):
    path = PACKAGE / room / "__init__.py"
    docstring = ast.get_docstring(ast.parse((path if path.exists() else PACKAGE / f"{room}.py").read_text()))
    assert docstring is not None
    assert not re.match(r"(What|How|Which|Whether|Who|Where|When)\b", docstring)
