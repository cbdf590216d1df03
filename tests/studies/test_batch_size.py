"""The study of batch sizes: a small one from the command line, and its estimates on curves with a known answer."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from qcomm.cli.main import app
from qcomm.studies import batch_size
from qcomm.studies.batch_size import ARMS, BATCHES, RATES, Arm, Found, fit_critical_batch
from qcomm.studies.networks import mlp
from qcomm.studies.settings import RunKey, StudySettings

TINY = ["--dataset", "digits", "--train-images", "100", "--steps", "4", "--batch-size", "8", "--runs", "1"]


def test_a_small_study(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = CliRunner().invoke(app, ["study", "batch-size", *TINY, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "batch-size.json").read_text())
    assert [run["arm"] for run in document["runs"]] == list(ARMS)
    for run in document["runs"]:
        # 4 steps of 2 workers with 8 images: 64 samples, in batches of the arm's size.
        assert run["steps"] == max(1, 64 // ARMS[run["arm"]].batch)
        assert [number for number, _ in run["history"]] == list(range(1, run["steps"] + 1))
    assert all(claim["quantity"] in done.output for claim in document["claims"])
    assert (tmp_path / "batch-size.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_diverges_ends_and_counts_as_zero():
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    settings = StudySettings("digits", train_images=100, steps=40, batch_size=8, learning_rate=1e30)
    arm = Arm("mlp", "exact", BATCHES[0], RATES[-1])
    run = batch_size.measure(settings, RunKey(arm.name, 0))
    assert run["accuracy"] is None and len(run["history"]) < run["steps"]
    assert Found([{**run, "arm": arm.name, "seed": 0}], 0).accuracy(*arm) == 0
    json.dumps(run, allow_nan=False)


@given(st.floats(5, 5000), st.floats(10, 1000))
def test_the_critical_batch_size_of_a_known_curve(critical, fewest):
    points = [(batch, fewest * (1 + critical / batch)) for batch in BATCHES]
    assert fit_critical_batch(points) == pytest.approx(critical, rel=1e-6)


def test_no_curve_has_no_critical_batch_size():
    assert fit_critical_batch([(16, 100), (64, 50)]) is None
    assert fit_critical_batch([(batch, 100 * batch) for batch in BATCHES]) is None


def test_the_loss_of_the_fit_is_one_that_every_batch_size_reaches():
    """Losses fall as e^(-step / tau), with tau = 1 + 100 / batch: the steps to any loss are as tau."""
    runs = []
    for arm in ARMS.values():
        if arm.network == "mlp" and arm.method == "exact":
            tau = (1 + 100 / arm.batch) * (1 if arm.rate == RATES[1] else 3)
            history = [(step, math.exp(-step / (1000 * tau))) for step in range(1, 3001)]
            runs.append({"arm": arm.name, "seed": 7, "history": history, "accuracy": 50.0})
    assert Found(runs, 7).critical_batch("mlp", "exact") == pytest.approx(100, rel=0.01)


def test_lars_gives_gradients_the_norm_of_their_weights():
    model = mlp(1)
    mean = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    scaled = batch_size._lars(model, mean)
    for name, parameter in model.named_parameters():
        assert float(scaled[name].norm()) == pytest.approx(float(parameter.detach().norm()), rel=1e-5)
        assert torch.nn.functional.cosine_similarity(scaled[name].flatten(), mean[name].flatten(), 0) > 0.9999
