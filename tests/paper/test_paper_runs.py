"""The paper's experiments from the command line: documents, plots, resuming, and what is told about errors."""

import json
from dataclasses import replace

import distributed
import pytest
import torch
from typer.testing import CliRunner

import qcomm
from qcomm.cli.main import app
from qcomm.cli.paper import EXPERIMENTS
from qcomm.paper import runs as runs_module
from qcomm.paper.exchange import gather, send
from qcomm.paper.experiment import redraw
from qcomm.paper.network import initial
from qcomm.paper.results import DOCUMENT_FIELDS, Cells, write_atomically
from qcomm.paper.runs import run_missing
from qcomm.paper.settings import Exchange, Settings
from qcomm.paper.training import run, train
from qcomm.recipes.errors import RecipeError

TINY = Settings(dataset="digits", epochs=2, train_images=80)
OPTIONS = ["--epochs", "1", "--train-images", "80", "--jobs", "1"]
SEEDS = {name: "2" if name == "bit-rate" else "1" for name in EXPERIMENTS}
KINDS = [Exchange(), Exchange("grid", c=6), Exchange("noise", c=2)]


pytestmark = pytest.mark.usefixtures("one_thread")


def invoke(*arguments):
    return CliRunner().invoke(app, ["paper", *arguments], catch_exceptions=False, env={"COLUMNS": "160"})


def train_on_rank(rank, world_size, settings):
    trained = train(settings, in_processes=True)
    return [tensor.numpy() for layer in trained.network for tensor in layer], trained.history


@pytest.mark.world
@pytest.mark.parametrize("exchange", KINDS, ids=lambda exchange: exchange.kind)
def test_workers_in_processes_end_with_the_weights_of_workers_in_one(exchange):
    settings = replace(TINY, exchange=exchange)
    alone = train(settings)
    expected = [tensor for layer in alone.network for tensor in layer]
    for weights, history in distributed.run(2, train_on_rank, settings):
        assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(weights, expected, strict=True))
        for name in ("test_accuracy", "raw_bits", "huffman_bits", "packet_bits", "train_loss"):
            assert history[name] == alone.history[name]


def gather_from_a_liar(rank, world_size, size):
    parcel = send(initial("small", torch.Generator()), Exchange(), torch.Generator())
    if rank == 1:
        parcel[2] = torch.empty(size, dtype=torch.uint8)
    with pytest.raises(RecipeError, match="rank 1 announces parts of"):
        gather(parcel)


@pytest.mark.world
def test_sizes_that_no_parcel_has_are_refused_on_all_ranks():
    distributed.run(2, gather_from_a_liar, 4_000_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all experiments were run once, with runs of one epoch."""
    out = tmp_path_factory.mktemp("paper")
    for name in EXPERIMENTS:
        result = invoke(name, *OPTIONS, "--runs", SEEDS[name], "--out", str(out))
        assert result.exit_code == 0, result.output
        assert "paper says" in result.stdout and " / here " in result.stdout
    return out / "digits"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_document_and_plot(folder, name):
    document = json.loads((folder / f"{name}.json").read_text())
    assert tuple(document) == DOCUMENT_FIELDS
    assert document["experiment"] == name
    assert document["command"][:5] == ["qcomm", "paper", name, "--dataset", "digits"]
    assert document["versions"] == {"qcomm": qcomm.__version__, "torch": torch.__version__}
    assert document["settings"]["train_images"] == 80
    assert document["claims"] and all(set(claim) == {"quantity", "paper", "here"} for claim in document["claims"])
    assert document["summary"] and all(isinstance(row, dict) for row in document["summary"])
    experiment = EXPERIMENTS[name]
    assert len(document["runs"]) == int(SEEDS[name]) * len(experiment.arms)
    for entry in document["runs"]:
        assert entry["seed"] in (0, 1)
        assert Exchange(**entry["exchange"]) in [exchange for _, exchange in experiment.arms]
        assert set(entry["history"]) <= set(experiment.quantities)
        assert all(len(values) == 1 for values in entry["history"].values())
    image = (folder / f"{name}.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 10_000


def test_a_plot_is_drawn_from_the_document_alone(folder, tmp_path):
    (tmp_path / "bit-rate.json").write_bytes((folder / "bit-rate.json").read_bytes())
    redraw(EXPERIMENTS["bit-rate"], tmp_path)
    assert (tmp_path / "bit-rate.png").stat().st_size == (folder / "bit-rate.png").stat().st_size


def test_experiments_share_their_runs(folder):
    arms = {arm for experiment in EXPERIMENTS.values() if experiment.kind == "train" for arm in experiment.arms}
    assert len(list((folder / "cells").glob("train-*-seed0.json"))) == len(arms)
    assert sum(len(e.arms) for e in EXPERIMENTS.values() if e.kind == "train") > len(arms)


def test_stored_runs_are_not_run_again(folder, monkeypatch):
    monkeypatch.setattr(runs_module, "_run", lambda *_: pytest.fail("was run again"))
    before = (folder / "bit-rate.json").read_text()
    result = invoke("bit-rate", *OPTIONS, "--runs", "2", "--out", str(folder.parent))
    assert result.exit_code == 0
    assert "train: 12 of 12 runs are stored" in result.stdout
    assert (folder / "bit-rate.json").read_text() == before


def test_stored_runs_of_other_settings_are_refused(folder):
    result = invoke("bit-rate", "--epochs", "2", *OPTIONS[2:], "--runs", "2", "--out", str(folder.parent))
    assert result.exit_code == 2
    assert "epochs is 2 here and 1 there" in result.stderr
    assert "another --out" in result.stderr


def stop_at_seed_1(settings, in_processes):
    if settings.seed == 1:
        raise RecipeError("no power")
    return run(settings, in_processes)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_experiment_goes_on_where_it_stopped(tmp_path, monkeypatch, jobs):
    wanted = [replace(TINY, epochs=1, seed=seed) for seed in range(3)]
    with pytest.raises(RecipeError, match="no power"):
        run_missing("train", stop_at_seed_1, wanted, tmp_path, jobs, False)
    done = [path.name for path in sorted(tmp_path.iterdir())]
    assert "train-float-uniform-seed0.json" in done and "train-float-uniform-seed1.json" not in done
    stamp = (tmp_path / done[0]).stat().st_mtime_ns
    results = run_missing("train", run, wanted, tmp_path, 1, False)
    assert [result["settings"]["seed"] for result in results] == [0, 1, 2]
    assert (tmp_path / done[0]).stat().st_mtime_ns == stamp
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # no temporary files


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"settings": 3}', b"\xff"])
def test_a_damaged_stored_run_is_named(tmp_path, content):
    cells = Cells(tmp_path)
    path = cells.path("train", TINY)
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=f"{path.name} is not a stored run"):
        cells.find("train", TINY)


def test_writing_replaces_in_one_step(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            ["--dataset", "mnist"],
            ["train-images-idx3-ubyte", "looked in nowhere", "name the directory with --data-dir"],
        ),
        (["--dataset", "mnist", "--data-dir", "absent"], ["looked in absent", "Download them from"]),
        (
            ["--dataset", "fashion-mnist", "--data-dir", "absent"],
            ["looked in absent", "apt install dataset-fashion-mnist"],
        ),
        (["--dataset", "imagenet"], ["--dataset is 'imagenet'"]),
        (["--epochs", "0"], ["--epochs is 0"]),
        (["--runs", "0"], ["--runs is 0"]),
        (["--jobs", "0"], ["--jobs is 0"]),
        (["--train-images", "5000"], ["--train-images is 5000", "has 1127"]),
        (["--batch-size", "1000"], ["--batch-size is 1000 on 2 workers; 1127 training images"]),
        (
            ["--lr", "3e38", "--batch-size", "1", "--train-images", "20", "--epochs", "1", "--runs", "1"],
            ["uniform-seed0, epoch 1", "are NaN or infinite"],
        ),
    ],
)
def test_user_errors_are_one_line_and_exit_with_2(arguments, messages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("quantization-levels", "--jobs", "1", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    for message in messages:
        assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help_lists_the_experiments():
    text = invoke("--help").stdout
    for name, experiment in EXPERIMENTS.items():
        assert name in text
        assert experiment.help.split(":")[0] in text


@pytest.mark.world
def test_runs_in_processes_are_stored_like_others(tmp_path):
    settings = replace(TINY, epochs=1, exchange=Exchange("grid", c=5))
    [alone] = run_missing("train", run, [settings], tmp_path / "alone", 1, False)
    [apart] = run_missing("train", run, [settings], tmp_path / "apart", 1, True)
    assert apart == alone
