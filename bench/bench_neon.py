"""Instructions of the NEON loops and of the scalar ones, per value, on an emulated 64-bit Arm processor.

    cmake -G Ninja -B build/arm64 -DQCOMM_NATIVE_CHECK=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
          -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
    cmake --build build/arm64 --target count_instructions
    python bench/bench_neon.py build/arm64/count_instructions --json bench/results/neon_instructions.json

qemu names each instruction that it executes. Those inside the loops' functions count, for the stage of
tests/native/count_instructions.cpp that is under way; what is called from them (memcpy) and the rest of the codec do
not. Instructions are no time: no Arm processor has run this.
"""

import argparse
import collections
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

EMULATOR, COMPILER, NM = "qemu-aarch64", "aarch64-linux-gnu-g++", "aarch64-linux-gnu-nm"
VERSIONS = ("scalar", "neon")
VALUES = 8192
LOOP = re.compile(rb"5qcomm(?:6scalar|4neon)\d")
STAGE = re.compile(rb"stage_(\w+)$")


def address_ranges(program: Path) -> str:
    """The loops, the stages and main, as qemu's -dfilter has them: nothing else is reported."""
    text = subprocess.run([NM, "--print-size", str(program)], check=True, capture_output=True).stdout
    ranges = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) == 4 and (LOOP.search(fields[3]) or STAGE.match(fields[3]) or fields[3] == b"main"):
            ranges.append(f"0x{fields[0].decode()}+0x{fields[1].decode()}")
    return ",".join(ranges)


def count(program: Path, version: str) -> dict[str, int]:
    """Instructions of each stage inside the loops of a version."""
    command = [EMULATOR, "-singlestep", "-d", "exec,nochain", "-dfilter", address_ranges(program), "-D", "/dev/stdout"]
    counts: collections.Counter[str] = collections.Counter()
    stage = ""
    with subprocess.Popen([*command, str(program), version, str(VALUES)], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if not line.startswith(b"Trace "):
                continue
            symbol = line.rsplit(None, 1)[-1]
            if symbol == b"main":
                stage = ""
            elif found := STAGE.match(symbol):
                stage = found[1].decode()
            elif stage and LOOP.search(symbol):
                counts[stage] += 1
    if run.returncode != 0:
        sys.exit(f"bench_neon: {version} ended with status {run.returncode}")
    return dict(counts)


def first_line(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for tool in (EMULATOR, COMPILER, NM):
        if shutil.which(tool) is None:
            sys.exit(f"bench_neon: {tool} is not installed (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)")
    counts = {version: count(options.program, version) for version in VERSIONS}
    print(f"{'stage':16} {'scalar':>8} {'neon':>8}  instructions per value")
    per_value = {}
    for stage, scalar in counts["scalar"].items():
        per_value[stage] = {version: round(counts[version][stage] / VALUES, 2) for version in VERSIONS}
        print(f"{stage:16} {scalar / VALUES:8.2f} {counts['neon'][stage] / VALUES:8.2f}")
    if options.json:
        document = {
            "command": "python bench/bench_neon.py build/arm64/count_instructions",
            "compiler": first_line(COMPILER, "--version"),
            "emulator": first_line(EMULATOR, "--version"),
            "values": VALUES,
            "instructions_per_value": per_value,
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
