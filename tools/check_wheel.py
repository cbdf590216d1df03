"""Checks what is in a wheel: python3 tools/check_wheel.py WHEEL...

Every module of the source tree must be there and nothing else of it, one compiled core for the processor that the
wheel's name says, the license, and no path of the machine that built it. Only the standard library is used.
"""

import re
import struct
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# e_machine of the ELF format.
MACHINES = {62: "x86_64", 183: "aarch64"}
NAME = re.compile(r"qcomm-[^-]+-(?P<python>cp3\d+)-(?P<abi>cp3\d+)-(?P<platforms>[\w.]+)\.whl")
CORE = re.compile(r"qcomm/_C\.cpython-(?P<version>\d+)-(?P<machine>\w+)-linux-gnu\.so")
# Folders of people and of builds. A few bytes of compiled code can look like a short word, so names are whole.
MACHINE_PATH = re.compile(rb"/(?:home|root|Users|tmp|work|build)/[\w.-]+")


def package_files(root: Path) -> "set[str]":
    """The files of the package that belong into a wheel, relative to ``root``."""
    files = (
        path
        for path in (root / "qcomm").rglob("*")
        if path.suffix in {".py", ".pyi", ".html"} or path.name == "py.typed"
    )
    return {path.relative_to(root).as_posix() for path in files}


def core_faults(name: str, core: bytes, tags: "re.Match[str]") -> "list[str]":
    """What is wrong with the compiled core, for a wheel with these tags."""
    found = CORE.fullmatch(name)
    if found is None:
        return [f"{name} is no name of a core for Linux"]
    faults = []
    if f"cp{found['version']}" != tags["python"]:
        faults.append(f"{name} is for another Python than the wheel's tag, {tags['python']}")
    if core[:5] != b"\x7fELF\x02":
        return [*faults, f"{name} is no 64-bit ELF file"]
    (number,) = struct.unpack_from("<H", core, 18)
    machine = MACHINES.get(number, f"e_machine {number}")
    if machine != found["machine"] or not tags["platforms"].endswith(f"_{machine}"):
        faults.append(f"{name} is code for {machine}, the wheel for {tags['platforms']}")
    return faults


def wheel_faults(wheel: Path, root: Path = ROOT) -> "list[str]":
    """What is wrong with a wheel of the source tree ``root``; an empty list for a good one."""
    tags = NAME.fullmatch(wheel.name)
    if tags is None:
        return [f"{wheel.name} is no name of a wheel of qcomm for CPython"]
    faults = []
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        info = {name for name in names if ".dist-info/" in name}
        wanted = package_files(root)
        cores = sorted(name for name in names - wanted - info if name.startswith("qcomm/_C."))
        faults += [f"{name} is missing" for name in sorted(wanted - names)]
        faults += [f"{name} does not belong there" for name in sorted(names - wanted - info - set(cores))]
        if len(cores) != 1:
            faults.append(f"there must be one compiled core, found {cores}")
        for name in cores:
            faults += core_faults(name, archive.read(name), tags)
        for kind in ("METADATA", "RECORD", "entry_points.txt", "licenses/LICENSE"):
            if not any(name.endswith(f".dist-info/{kind}") for name in info):
                faults.append(f"its dist-info has no {kind}")
        for name in sorted(set(cores) | info):
            leaks = set(MACHINE_PATH.findall(archive.read(name)))
            faults += [f"{name} holds the path {leak.decode()}" for leak in sorted(leaks)]
    return faults


def main(wheels: "list[str]") -> int:
    """Prints the faults of each; 1 if there are any, or no wheel."""
    faults = [f"{Path(wheel).name}: {fault}" for wheel in wheels for fault in wheel_faults(Path(wheel))]
    print("\n".join(faults) or f"{len(wheels)} wheels are complete")
    return 1 if faults or not wheels else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
