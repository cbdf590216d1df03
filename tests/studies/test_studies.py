"""Studies: a small one from the command line, interruptions, stored runs that do not fit, the simulated exchange."""

import json

import pytest
import torch
from typer.testing import CliRunner

import qcomm
from qcomm.cli.main import app
from qcomm.recipes import RecipeError, Split
from qcomm.studies import noise_scale, partitions
from qcomm.studies.networks import NETWORKS
from qcomm.studies.records import Records
from qcomm.studies.settings import RunKey, StudySettings
from qcomm.studies.workers import Exchange, drawn, gradient

TINY = ["--dataset", "digits", "--train-images", "100", "--steps", "2", "--batch-size", "8", "--runs", "2"]
SMALL = ["--dataset", "digits", "--train-images", "200", "--steps", "17", "--batch-size", "8", "--runs", "1"]


def study(out, *options):
    return CliRunner().invoke(app, ["study", "noise-scale", *SMALL, "--out", str(out), *options])


def test_a_study_writes_its_results_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(noise_scale, "FROZEN_STEPS", 16)
    done = study(tmp_path / "whole")
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "whole" / "noise-scale.json").read_text())
    assert [run["arm"] for run in document["runs"]] == list(noise_scale.ARMS)
    for claim in document["claims"]:
        assert set(claim) == {"quantity", "source", "here", "verdict"} and claim["quantity"] in done.output
    assert (tmp_path / "whole" / "noise-scale.png").read_bytes().startswith(b"\x89PNG")
    for run in document["runs"]:
        assert [window["end"] for window in run["history"]] == noise_scale.windows(17)
        assert sum(window["total"]["steps"] for window in run["history"]) == 17
    # An interruption in the middle of a line.
    lines = (tmp_path / "whole" / "noise-scale.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "noise-scale.jsonl").write_text(lines[0] + lines[1][:50])
    again = study(tmp_path / "part")
    assert again.exit_code == 0 and "1 of 4 runs are stored" in again.output
    assert json.loads((tmp_path / "part" / "noise-scale.json").read_text()) == document
    other = study(tmp_path / "part", "--lr", "0.1")
    assert other.exit_code == 2 and "learning_rate is 0.1 here and 0.05 there" in other.output


def test_bits_by_both_rules(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = CliRunner().invoke(app, ["study", "bit-rule", *TINY, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "bit-rule.json").read_text())
    levels = {run["arm"]: run["levels"] for run in document["runs"]}
    assert levels["exact"] == [] and [levels[f"rms, c={c}"] for c in (2, 3, 4)] == [[2], [3], [4]]
    assert all(levels[f"entropy, c={c}"][0] > c for c in (0, 1, 2)) and len(document["claims"]) == 6
    assert (tmp_path / "bit-rule.png").read_bytes().startswith(b"\x89PNG")


def test_partitions_against_backprop(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = CliRunner().invoke(
        app, ["study", "partitions", *TINY, "--runs", "1", "--steps", "20", "--out", str(tmp_path)]
    )
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "partitions.json").read_text())
    assert [run["arm"] for run in document["runs"][: len(partitions.ARMS)]] == list(partitions.ARMS)
    found = {(run["arm"], run["seed"]): run for run in document["runs"]}
    # 20 batches: 3 epochs of 7 batches, the last one smaller and not whole. Layer 2 has 16 channels of 16x16.
    samples = 2 * 100 + 6 * 16
    assert found["p=2, raw", 0]["uncompressed_bytes"] == samples * (4 * 16 * 16 * 16 + 8)
    assert found["backprop", 0]["sent_bytes"] == 0 and 0 <= found["backprop", 0]["accuracy"] <= 100
    sent = [found[f"p=2, {bits}", 0]["sent_bytes"] for bits in ("raw", "8 bits", "6 bits", "4 bits")]
    assert sent == sorted(sent, reverse=True) and sent[0] > 4 * sent[1]
    assert found["p=2, 6 bits, loss filter", 0]["forwarded"] < 1 == found["p=2, 6 bits", 0]["forwarded"]
    assert len(document["claims"]) == 13 and (tmp_path / "partitions.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--dataset", "imagenet"], "--dataset is 'imagenet'; it must be one of digits"),
        (["--workers", "1"], "--workers is 1; it must be at least 2"),
        (["--train-images", "100000"], "--train-images is 100000; digits has 1352"),
        (["--lr", "0"], "--lr is 0.0; it must be positive"),
    ],
)
def test_wrong_options(tmp_path, options, error):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    done = study(tmp_path, *options)
    assert done.exit_code == 2 and error in done.output


@pytest.mark.parametrize("line", ["{", "[]", '{"arm": "mlp"}', '{"arm": "mlp", "seed": 0, "settings": 3}', "\udcff"])
def test_a_line_that_is_no_run_is_named(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_bytes(line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(RecipeError, match=r"x\.jsonl.*(is not a stored run|cannot be read)"):
        Records(path, StudySettings()).read()


def test_records_keep_the_last_of_equal_runs(tmp_path):
    records = Records(tmp_path / "new" / "x.jsonl", StudySettings())
    assert records.read() == {}
    for value in (1, 2):
        records.append(RunKey("a", 0), {"value": value})
    records.append(RunKey("a", 1), {"value": 3})
    assert {key.seed: run["value"] for key, run in records.read().items()} == {0: 2, 1: 3}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_mean_of_workers_is_the_gradient_of_all(name):
    torch.manual_seed(0)
    model = NETWORKS[name](1)
    split = Split(torch.randn(64, 1, 32, 32), torch.randint(0, 10, (64,)))
    images, labels = drawn(split, 16, torch.Generator().manual_seed(0))
    parts = [gradient(model, images[half : half + 8], labels[half : half + 8]) for half in (0, 8)]
    mean, exact = Exchange(None, 2).mean(parts), gradient(model, images, labels)
    assert all(torch.allclose(mean[key], exact[key], atol=1e-6) for key in exact)


def test_a_quantized_exchange_loses_nothing_over_time():
    exchange, total = Exchange(qcomm.SigmaGrid(3.2), 2), torch.zeros(4096, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        values = [{"w": torch.randn(4096, generator=generator), "b": torch.randn(8)} for _ in range(2)]
        mean = exchange.mean(values)
        total += mean["w"].double() - (values[0]["w"].double() + values[1]["w"]) / 2
        assert torch.allclose(mean["b"], (values[0]["b"] + values[1]["b"]) / 2)
    kept = sum(each["w"].double() for each in exchange._residuals[:2]) / 2 + exchange._residuals[2]["w"]
    assert float(total.abs().max()) > 0.1 and torch.allclose(-total, kept, atol=1e-4)


def test_every_sample_gives_the_covariance():
    """Trace and squared norm of a set are those of its samples' gradients, one at a time."""
    torch.manual_seed(0)
    model, split = NETWORKS["cnn"](1), Split(torch.randn(150, 1, 32, 32), torch.randint(0, 10, (150,)))
    each = [gradient(model, split.images[i : i + 1], split.labels[i : i + 1]) for i in range(150)]
    flat = torch.stack([torch.cat([values.flatten() for values in one.values()]) for one in each]).double()
    found = noise_scale._direct(model, split)
    assert found["trace"] == pytest.approx(float(flat.var(0, unbiased=False).sum()), rel=1e-4)
    assert found["squared_norm"] == pytest.approx(float(flat.mean(0).square().sum()), rel=1e-4)
