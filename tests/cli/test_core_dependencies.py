"""The command line works with what ``pip install qcomm`` brings, and names the extra where a plot or data needs more.

A process of its own cannot import any installed package but the dependencies in pyproject.toml, and theirs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qcomm

ROOT = Path(__file__).parents[2]
PROGRAM = '''
import importlib.metadata as metadata
import json, re, sys

def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()

def bare(requirement):
    return canonical(re.match(r"[\\w.-]+", requirement)[0])

def with_dependencies(names):
    found, new = set(), set(names)
    while new:
        found |= new
        needed = set()
        for name in new:
            try:
                lines = metadata.requires(name) or []
            except metadata.PackageNotFoundError:  # of another platform
                continue
            needed |= {bare(line) for line in lines if "extra ==" not in line}
        new = needed - found
    return found

section = re.search(r"^dependencies = (\\[.*\\])$", open(sys.argv[1]).read(), re.MULTILINE)[1]
allowed = with_dependencies(bare(line) for line in json.loads(section))
owners = metadata.packages_distributions()

class Refusal:
    """Refuses what is installed but neither allowed nor the package itself."""

    def find_spec(self, name, path=None, target=None):
        packages = {canonical(package) for package in owners.get(name.partition(".")[0], [])}
        if packages and not packages & (allowed | {"qcomm", "setuptools"}):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refusal())
from typer.testing import CliRunner
from qcomm.cli import app

results = []
for command in json.loads(sys.argv[2]):
    result = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    error = "" if isinstance(result.exception, (SystemExit, type(None))) else repr(result.exception)
    results.append([result.exit_code, result.stdout, result.stderr, error])
print(json.dumps(results))
'''

HELP = [[], ["bench"], ["train"], ["plan"], ["inspect"], ["paper"], ["paper", "entropy"]]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By command line: exit code, stdout, stderr and exception."""
    folder = tmp_path_factory.mktemp("core")
    packet = folder / "packet"
    packet.write_bytes(qcomm.compress(torch.randn(100, 50)).numpy().tobytes())
    commands = {
        **{" ".join([*command, "--help"]): [*command, "--help"] for command in HELP},
        "bench": ["bench", "--mib", "0.1", "--repeats", "1"],
        "plan": ["plan", "--network", "10Gbps"],
        "inspect": ["inspect", str(packet)],
        "plan with plots": ["plan", "--network", "10Gbps", "--out", str(folder / "plan")],
        "train": ["train", "--ranks", "1", "--out", str(folder / "train")],
        "paper": ["paper", "entropy", "--out", str(folder / "paper")],
    }
    paths = [str(Path(qcomm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(ROOT / "pyproject.toml"), json.dumps([*commands.values()])],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(commands, answers, strict=True)), folder


@pytest.mark.parametrize("command", [" ".join([*words, "--help"]) for words in HELP])
def test_every_command_shows_its_help(results, command):
    code, text, _, error = results[0][command]
    assert (code, error) == (0, "")
    assert "Usage: " in text


@pytest.mark.parametrize(
    ("command", "shown"),
    [("bench", "codec, encode"), ("plan", "Verdict: "), ("inspect", "total_bytes")],
)
def test_commands_that_need_no_extra_run(results, command, shown):
    code, text, stderr, error = results[0][command]
    assert (code, error) == (0, ""), stderr
    assert shown in text


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plan with plots", "plots need matplotlib: pip install 'qcomm[train]', or leave out --out"),
        ("train", "the digits data set ships inside scikit-learn, which is not installed: pip install 'qcomm[train]'"),
        ("paper", "plots and intervals need matplotlib, which is not installed: pip install 'qcomm[train]'"),
    ],
)
def test_what_needs_an_extra_names_it_before_it_begins(results, command, message):
    answers, folder = results
    code, text, stderr, error = answers[command]
    assert (code, text, error) == (2, "", "")
    assert stderr == f"error: {message}\n"
    assert [path.name for path in folder.iterdir()] == ["packet"]
