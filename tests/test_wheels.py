"""The check of a wheel's content, which `make wheels` runs: a complete one passes, and each kind of fault is named."""

import re
import runpy
import struct
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from check_wheel import MACHINES, main, package_files, wheel_faults  # noqa: E402

CORE = "qcomm/_C.cpython-311-aarch64-linux-gnu.so"
WHEEL = "qcomm-0.1.0-cp311-cp311-manylinux2014_aarch64.manylinux_2_17_aarch64.whl"
INFO = "qcomm-0.1.0.dist-info/"


def test_an_editable_install_keeps_every_module_that_cmake_builds() -> None:
    """setuptools copies the modules that it knows; a build with nvcc would lose its kernels otherwise."""
    built = re.findall(r"^\s*pybind11_add_module\((\w+) ", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")
    with mock.patch.object(setuptools, "setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    known = setup.call_args.kwargs["ext_modules"]
    assert sorted(f"qcomm.{name}" for name in built) == sorted(extension.name for extension in known)
    assert [extension.name for extension in known if not extension.optional] == ["qcomm._C"]


def elf(machine: str, content: bytes = b"") -> bytes:
    """The first bytes of a 64-bit ELF file, in little-endian order."""
    number = {name: number for number, name in MACHINES.items()}[machine]
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, number) + content


def good_wheel() -> dict[str, bytes]:
    files = {name: (ROOT / name).read_bytes() for name in package_files(ROOT)}
    return files | {
        CORE: elf("aarch64"),
        **{INFO + name: b"" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")},
    }


def write(folder: Path, files: dict[str, bytes], name: str = WHEEL) -> Path:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return folder / name


def test_a_complete_wheel_has_no_faults(tmp_path, capsys):
    assert main([str(write(tmp_path, good_wheel()))]) == 0
    assert capsys.readouterr().out == "1 wheels are complete\n"


def test_no_wheel_is_a_failure(capsys):
    assert main([]) == 1


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        ({"qcomm/py.typed": None}, "qcomm/py.typed is missing"),
        ({"qcomm/transport/gloo.py": None}, "qcomm/transport/gloo.py is missing"),
        ({"tests/test_wheels.py": b""}, "tests/test_wheels.py does not belong there"),
        ({"qcomm/notes.txt": b""}, "qcomm/notes.txt does not belong there"),
        ({CORE: None}, "there must be one compiled core, found []"),
        ({CORE.replace("311", "310"): elf("aarch64")}, "there must be one compiled core, found ["),
        ({CORE: None, CORE.replace("311", "310"): elf("aarch64")}, "is for another Python than the wheel's tag, cp311"),
        ({CORE: elf("x86_64")}, f"{CORE} is code for x86_64, the wheel for manylinux2014_aarch64."),
        ({CORE: b"MZ"}, f"{CORE} is no 64-bit ELF file"),
        ({CORE: elf("aarch64", b"\0/home/somebody/csrc/cpu/kernels.cpp\0")}, f"{CORE} holds the path /home/somebody"),
        ({INFO + "RECORD": b"/tmp/build-env/x.py,,"}, f"{INFO}RECORD holds the path /tmp/build-env"),
        ({INFO + "licenses/LICENSE": None}, "its dist-info has no licenses/LICENSE"),
    ],
)
def test_a_fault_is_named(damage, fault, tmp_path):
    files = {name: content for name, content in (good_wheel() | damage).items() if content is not None}
    faults = wheel_faults(write(tmp_path, files))
    assert len(faults) <= 2 and any(fault in found for found in faults), faults


@pytest.mark.parametrize("name", ["qcomm-0.1.0-py3-none-any.whl", "qcomm-0.1.0.tar.gz", "other-1-cp311-cp311-any.whl"])
def test_a_wheel_with_another_name_is_refused(name, tmp_path):
    assert wheel_faults(write(tmp_path, good_wheel(), name)) == [f"{name} is no name of a wheel of qcomm for CPython"]
