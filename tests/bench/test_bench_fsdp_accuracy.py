"""The accuracy study of sharded models: its rule, its rows, its training, and that it would go on where it stopped."""

import argparse
import json
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import world
from mpirun import environment
from studies import BENCH


@pytest.fixture
def study(monkeypatch):
    """bench/bench_fsdp_accuracy.py."""
    pytest.importorskip("scipy", reason="scipy, which has the t distribution, is not installed")
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_fsdp_accuracy

    return bench_fsdp_accuracy


@pytest.mark.parametrize(
    ("task", "differences", "answer"),
    [
        ("resnet20", [0.2, -0.3, 0.1], "parity"),
        ("resnet20", [0.3, 0.31, 0.32], "parity"),  # the interval lacks 0, and lies within the bounds
        ("resnet20", [-0.9, -0.9, 0.1], "not met: worse"),  # the interval contains 0, but the mean is too far off
        ("resnet20", [0.6, 0.9, 0.8], "not met: better"),
        ("gpt", [0.02, 0.021, 0.022], "not met: worse"),
        ("gpt", [-0.02, -0.021, -0.022], "not met: better"),
        ("gpt", [0.001, 0.002], "open: 2 of 3 seeds"),
    ],
)
def test_the_rule_of_parity(study, task, differences, answer):
    def record(method, seed, result):
        key = {"task": task, "ranks": 2, "steps": 9, "method": method, "seed": seed}
        return {**key, "parameters": 10, "result": result, "train_loss": 1.0, "stats": {}}

    records = [record("fp32", seed, 80.0) for seed in range(3)]
    records += [record("k=1", seed, 80.0 + difference) for seed, difference in enumerate(differences)]
    reference, row = study.summarise(records)
    assert reference["method"] == "fp32" and "verdict" not in reference
    assert row["verdict"] == answer and row["seeds"] == len(differences)


def test_methods_have_names(study):
    with pytest.raises(ValueError, match="method is 'fp16'; it must be"):
        study.options_of("fp16")
    assert [study.allows("resnet20", method) for method in ("k=1 weights", "k=0.5")] == [True, False]


@world(2)
def test_sharded_models_train_as_whole_ones(rank, world_size):
    """The mean of the ranks' losses is that of one model with all samples: with torch's collectives, and fine grids."""
    with mock.patch.object(sys, "path", [str(BENCH), *sys.path]):
        import sharded_training as training
        import transformer_training as plain
    setting = training.Setting("gpt", steps=3, batch=4, context=16, width=32, depth=1)
    text = plain.Text("qcomm trains sharded models as whole ones. " * 40)
    of_whole = plain.Setting(1, setting.steps, training.RATES["gpt"], setting.seed, 4, 16, 32, 1)
    torch.manual_seed(setting.seed)
    model = plain.Transformer(of_whole, text.vocabulary)
    optimizer = plain.make_optimizer("adamw", model, of_whole.rate)
    sequences = torch.Generator().manual_seed(setting.seed + 7)
    for step in range(setting.steps):
        for group in optimizer.param_groups:
            group["lr"] = plain.rate_at(of_whole, step)
        optimizer.zero_grad()
        loss = plain.loss_of(model, *plain.batch_of(text.train, setting.batch, setting.context, sequences))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plain.CLIP)
        optimizer.step()
    for method, within in (("fp32", 1e-5), ("k=0.01", 1e-3), ("k=1 weights", 0.1)):
        found = training.train(setting, method, text)
        mean = torch.tensor(found["train_loss"])
        dist.all_reduce(mean)
        assert float(mean) / world_size == pytest.approx(loss.item(), abs=within), method
        if rank == 0:
            assert found["result"] == pytest.approx(plain.evaluate(model, text, of_whole), abs=10 * within), method
    assert 0 < found["stats"]["bits_of_gradients"] < 4 and 8 <= found["stats"]["bits_of_weights"] < 10


@pytest.mark.world
def test_it_runs_and_would_go_on(study, tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, BENCH / "bench_fsdp_accuracy.py", "--quick", "--json", out]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 runs, 2 missing" in done.stdout and "open: 1 of 3 seeds" in done.stdout
    assert [row["method"] for row in json.loads(out.read_text())["summary"]] == ["fp32", "k=1 weights"]
    lines = out.with_suffix(".jsonl")
    runs = study.runs_of(argparse.Namespace(quick=True))
    assert study.not_done(runs, study.Run.key, lines) == []
    lines.write_text(lines.read_text().splitlines()[0] + "\n")
    assert study.not_done(runs, study.Run.key, lines) == runs[1:]
