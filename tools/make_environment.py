"""Creates the virtual environment that `make` works in: python3 tools/make_environment.py DIRECTORY TOOL...

An interpreter that has torch >= 2.6 keeps it: its packages stay visible in the environment, and constraints.txt applies
only to what it lacks and to the tools. Any other gets an empty environment and everything as constraints.txt says. Only
the standard library is used, and what is missing on the machine is said before anything is installed.
"""

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import venv
from pathlib import Path

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 6)
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"


def complain(message: str) -> None:
    """Ends the program with a message that says what to do."""
    sys.exit(f"make: {message}")


def check_machine() -> None:
    """Python with pip and headers, and a C++ compiler: all that the build does not bring along."""
    python = f"{sys.executable} (Python {sys.version.split()[0]})"
    debian = f"on Debian or Ubuntu: apt install python{sys.version_info[0]}.{sys.version_info[1]}"
    if sys.version_info < OLDEST_PYTHON:
        complain(f"{python} is too old, qcomm needs 3.10 or newer. Name another one: make PYTHON=python3.12 ...")
    if importlib.util.find_spec("ensurepip") is None:
        complain(f"{python} cannot create an environment, ensurepip is missing; {debian}-venv")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        complain(f"{python} comes without its C headers (Python.h); {debian}-dev")
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        complain(f"no C++ compiler found ({', '.join(compilers)}); on Debian or Ubuntu: apt install g++, or set CXX")


def torch_home() -> "Path | None":
    """The directory that holds this interpreter's torch, if it is there, works and is new enough."""
    try:
        import torch
    except (ImportError, OSError):  # OSError: its libraries do not load
        return None
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    return Path(torch.__file__).resolve().parent.parent if version >= OLDEST_TORCH else None


def canonical(name: str) -> str:
    """A package's name in the one spelling that can be compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints(kept: "set[str]") -> str:
    """constraints.txt without the packages that the interpreter has."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if canonical(re.split(r"[=;\s]", line, maxsplit=1)[0]) not in kept)


def make_environment(directory: Path, tools: "set[str]") -> None:
    """Creates ``directory`` anew, with ``constraints.txt`` in it for pip."""
    from importlib import metadata  # not at the top: an old Python is to fail in check_machine

    home = torch_home()
    inside_another = sys.prefix != sys.base_prefix
    venv.create(directory, clear=True, with_pip=True, system_site_packages=home is not None and not inside_another)
    kept = set()
    if home is not None:
        names = [dist.metadata["Name"] for dist in metadata.distributions()]
        kept = {canonical(name) for name in names if name} - tools
        if inside_another:
            # system_site_packages would show the base interpreter's packages, not this environment's.
            places = [
                str(home),
                *(place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")),
            ]
            own = directory / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
            (own / "parent-environment.pth").write_text("\n".join(places) + "\n", encoding="utf-8")
        print(f"make: {directory} keeps the torch in {home}")
    (directory / "constraints.txt").write_text(constraints(kept), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    check_machine()
    make_environment(Path(sys.argv[1]), set(sys.argv[2:]))
