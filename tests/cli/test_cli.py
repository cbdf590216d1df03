"""The command line: options, errors without tracebacks, and real runs in processes of their own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import qcomm
from qcomm import __main__
from qcomm.cli.main import app

TINY = ["--epochs", "1", "--train-images", "128", "--batch-size", "32"]


def invoke(*arguments: str):
    """The command line in this process, for what needs no ranks."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "160"})


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # The package is imported from where this test finds it, installed or not.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(qcomm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_help_names_every_command_and_shows_examples():
    assert "train" in invoke("--help").stdout
    text = invoke("train", "--help").stdout
    for word in ("--method", "--grid", "--resume", "torchrun", "digits: 15"):
        assert word in text


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"qcomm {qcomm.__version__} (torch {torch.__version__}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs is 0"),
        (["--model", "vgg"], "resnet20, resnet18"),
        (["--dataset", "imagenet"], "--dataset is 'imagenet'"),
        (["--dataset", "cifar10"], "looked in nowhere (no --data-dir was given)"),
        (["--method", "fp32", "--step", "1"], "belong to --method qcomm"),
        (["--method", "bf16", "--no-error-feedback"], "belong to --method qcomm"),
        (["--grid", "range", "--step", "1"], "--step and --mean-step belong to --grid sigma"),
        (["--c", "4", "--mean-step", "1"], "--step and --mean-step belong to --grid sigma"),
        (["--step", "5"], "--step is 5.0, --mean-step None, --c 6.0: step must be at most 3.4 with error feedback"),
        (["--mean-step", "17", "--no-error-feedback"], "mean_step must be a step of the grid: step must be in"),
        (["--grid", "sigma", "--c", "3"], "--c belongs to --grid range"),
        (["--grid", "cubic"], "--grid is 'cubic'"),
        (["--grid", "cubic", "--c", "3"], "--grid is 'cubic'"),
        (["--resume", "x"], "need --method"),
        (["--secret", "key"], "--secret belongs to --method qcomm"),
        (["--method", "fp32", "--secret", "key"], "--secret belongs to --method qcomm"),
        (["--step", "1", "--secret", "nowhere/key"], "nowhere/key"),
        (["--ranks", "0"], "--ranks is 0"),
        (["--ranks-per-node", "0"], "--ranks-per-node is 0"),
        (["--method", "qcomm", "--strategy", "hierarchical"], "ranks_per_node must be given"),
        (
            ["--method", "qcomm", "--strategy", "hierarchical", "--ranks-per-node", "3"],
            "ranks_per_node must divide the number of ranks, 2, got 3",
        ),
        (["--batch-size", "4096"], "1352 training images do not fill one step"),
        (["--method", "fp32", "--resume", "."], "holds no checkpoint"),
        (["--method", "fp32", "--resume", "auto"], "--resume auto needs --checkpoint-every"),
    ],
)
def test_user_errors_are_one_line_and_exit_with_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("train", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_option_of_the_wrong_type_exits_with_2():
    assert invoke("train", "--epochs", "many").exit_code == 2


class TestInspect:
    def test_prints_the_fields_of_a_packet(self, tmp_path):
        path = tmp_path / "packet"
        packet = qcomm.compress(torch.randn(100, 50), qcomm.SigmaGrid(step=1.0))
        path.write_bytes(packet.numpy().tobytes())
        result = invoke("inspect", str(path))
        assert result.exit_code == 0
        lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
        assert lines["shape"] == "(100, 50)"
        assert lines["grid"] == "sigma"
        assert lines["total_bytes"] == str(packet.numel())

    @pytest.mark.parametrize("content", [b"", b"QCMM", bytes(200)])
    def test_other_files_are_refused(self, tmp_path, content):
        path = tmp_path / "packet"
        path.write_bytes(content)
        result = invoke("inspect", str(path))
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {path} is not a packet")

    def test_missing_file(self, tmp_path):
        assert invoke("inspect", str(tmp_path / "absent")).exit_code == 2


def test_without_typer_one_line_says_what_to_install(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "typer" else find(name))
    with pytest.raises(SystemExit) as exit_:
        __main__.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "qcomm: typer came with qcomm and cannot be imported: pip install typer\n"


@pytest.mark.world
def test_trains_with_two_ranks_that_it_starts_itself(tmp_path):
    result = run("-m", "qcomm", "train", "--method", "fp32", "--out", "log", *TINY, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "fp32: epoch 1/1" in result.stdout
    assert result.stderr == ""  # no progress bars, no warnings
    record = json.loads((tmp_path / "log" / "fp32.jsonl").read_text())
    assert record["step"] == 2
    assert record["bits_per_element"] == 32


@pytest.mark.world
def test_trains_on_several_nodes(tmp_path):
    result = run(
        *("-m", "qcomm", "train", "--method", "qcomm", "--strategy", "hierarchical", "--ranks", "4"),
        *("--ranks-per-node", "2", "--out", "log", *TINY[:-2], "--batch-size", "16"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "log" / "qcomm-k1.jsonl").read_text())
    assert record["bits_per_element_phase1"] < 3


@pytest.mark.world
def test_trains_under_torchrun(tmp_path):
    result = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "qcomm", "train"),
        *("--grid", "sigma", "--step", "1", "--out", "log", *TINY),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "log" / "qcomm-k1.jsonl").read_text())
    assert record["bits_per_element_phase1"] < 2.5
