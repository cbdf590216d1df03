"""The data filter: planted points are found, seeds decide all, an interrupted study goes on, the page is one file."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from qcomm.cli.main import app
from qcomm.recipes import RecipeError
from qcomm.studies import class_filter, data_filter, features
from qcomm.studies.class_filter import drop_at_random, keep, median_distance, plant, scores
from qcomm.studies.data_filter import FilterSettings

TINY = ["--dataset", "digits", "--train-images", "150", "--steps", "3", "--batch-size", "16", "--runs", "1"]
TINY += ["--feature-steps", "12"]


@pytest.fixture(autouse=True)
def extras():
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def study(out, *options):
    return CliRunner().invoke(app, ["study", "data-filter", *TINY, "--out", str(out), *options])


def blobs(seed, scale=1.0):
    """Ten clusters of 60 points in the plane, far from each other, whose labels are their numbers."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(600) % 10
    angle = labels * (2 * torch.pi / 10)
    centres = 40 * torch.stack([angle.cos(), angle.sin()], 1)
    return scale * (centres + 3 * torch.randn(600, 2, generator=generator)), labels


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_planted_points_are_dropped_at_every_scale(scale):
    places, truth = blobs(0, scale)
    labels, planted = plant(truth, 0.1, 0)
    found = scores(keep(places, labels, 5, factor=2.0), planted)
    assert found.recall > 0.8 and found.precision > 0.6 and found.kept > 0.8
    assert (found.chance_precision, found.chance_recall) == (0.1, pytest.approx(1 - found.kept))


def test_the_default_eps_of_the_library_is_no_scale_of_a_map():
    places, labels = blobs(0)
    kept = [float(keep(places * scale, labels, 5, eps=0.5).float().mean()) for scale in (0.1, 1.0, 10.0)]
    assert kept[0] > 0.95 and kept[1] < 0.5 and kept[2] == 0.0


def test_a_random_drop_finds_the_planted_share():
    labels, planted = plant(torch.arange(20000) % 10, 0.1, 1)
    assert int(planted.sum()) == 2000 and bool((labels[planted] != (torch.arange(20000) % 10)[planted]).all())
    assert torch.equal(labels[~planted], (torch.arange(20000) % 10)[~planted])
    wrong = torch.bincount(labels[planted], minlength=10)
    assert wrong.min() > 140 and wrong.max() < 260  # every class gets some: 200 in the mean
    found = scores(drop_at_random(20000, 3000, 2), planted)
    assert found.kept == 0.85 and abs(found.precision - 0.1) < 0.02 and abs(found.recall - 0.15) < 0.03


def test_small_and_degenerate_classes_are_kept():
    few = torch.tensor([[0.0, 0.0], [9.0, 9.0], [50.0, 0.0]])
    assert keep(few, torch.zeros(3, dtype=torch.int64), 5, factor=1.0).all()
    same = torch.zeros(20, 2)
    assert median_distance(same, 5) == 0.0 and keep(same, torch.zeros(20, dtype=torch.int64), 5, factor=1.0).all()
    assert scores(torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)) == (1.0, 0.0, 0.0, 0.0, 0.0)


def test_seeds_decide_the_map():
    settings = FilterSettings(dataset="digits", train_images=150, feature_steps=10, batch_size=16)
    first = data_filter.image_map(settings, "planted", 3)
    data_filter.image_map.cache_clear()
    again = data_filter.image_map(settings, "planted", 3)
    other = data_filter.image_map(settings, "planted", 4)
    assert again is not first and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(other.labels, first.labels) and not torch.equal(other.places, first.places)
    clean = data_filter.image_map(settings, "clean", 3)
    assert not clean.planted.any() and torch.equal(clean.labels, clean.truth)


def test_features_of_digits_show_planted_labels():
    """The whole filter, on real images: far better than chance after two epochs."""
    settings = FilterSettings(dataset="digits", train_images=600, feature_steps=40, batch_size=16)
    found = data_filter.image_map(settings, "planted", 0)
    result = scores(found.kept(settings), found.planted)
    assert result.precision > 3 * result.chance_precision and result.recall > 3 * result.chance_recall


def test_an_interrupted_study_makes_the_same_files(tmp_path):
    done = study(tmp_path / "whole", "--html", str(tmp_path / "whole" / "map.html"))
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "whole" / "data-filter.json").read_text())
    assert [run["arm"] for run in document["runs"]] == list(data_filter.ARMS)
    assert (tmp_path / "whole" / "data-filter.png").read_bytes().startswith(b"\x89PNG")
    found = {run["arm"]: run for run in document["runs"]}
    for labels in ("clean", "planted"):
        images = [found[f"{labels}, {choice}"]["images"] for choice in ("full", "filtered", "random drop")]
        assert images[0] == 150 and images[1] == images[2] <= 150
    assert found["planted, full"]["wrong_labels"] == 15 and found["planted, wrong ones removed"]["images"] == 135
    assert {"filter", "sweep", "library"} <= set(found["planted, filtered"])
    for claim in document["claims"]:
        assert claim["quantity"] in done.output
    # An interruption in the middle of a line.
    lines = (tmp_path / "whole" / "data-filter.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "data-filter.jsonl").write_text("".join(lines[:4]) + lines[4][:50])
    data_filter.image_map.cache_clear()
    again = study(tmp_path / "part", "--html", str(tmp_path / "part" / "map.html"))
    assert again.exit_code == 0 and "4 of 7 runs are stored" in again.output
    for name in ("data-filter.json", "map.html"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    other = study(tmp_path / "part", "--noise", "0.2")
    assert other.exit_code == 2 and "noise is 0.2 here and 0.1 there" in other.output
    check_page((tmp_path / "whole" / "map.html").read_text())


def check_page(text):
    """The page loads nothing, and has every point and the settings of the filter."""
    assert "http" not in text and not re.search(r"""(src|href)\s*=|@import|url\((?!data:)""", text)
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    assert {len(data[name]) for name in ("x", "y", "label", "truth")} == {150}
    assert sum(a != b for a, b in zip(data["label"], data["truth"], strict=True)) == 15
    assert (data["factor"], data["minSamples"], data["size"], data["columns"]) == (2.0, 5, 32, 13)
    assert "data:image/png;base64,iVBORw0KGgo" in text and "@DATA@" not in text and "@SHEET@" not in text


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--noise", "1"], "--noise is 1.0; it must be between 0 and 1"),
        (["--min-samples", "1"], "--min-samples is 1; it must be at least 2"),
        (["--eps-factor", "0"], "--eps-factor is 0.0; it must be positive and finite"),
        (["--feature-steps", "0"], "--feature-steps is 0; it must be at least 1"),
        (["--train-images", "19"], "--train-images is 19; it must be at least 20"),
        (["--train-images", "2000"], "--train-images is 2000; digits has 1352"),
    ],
)
def test_wrong_options(tmp_path, options, error):
    done = study(tmp_path, *options)
    assert done.exit_code == 2 and error in done.output


def test_a_directory_is_no_page(tmp_path):
    done = study(tmp_path / "out", "--html", str(tmp_path))
    assert done.exit_code == 2 and "a directory; it must be a file" in done.output


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    def without(name):
        raise ImportError(name)

    monkeypatch.setattr(features.importlib, "import_module", without)
    with pytest.raises(RecipeError, match=r"needs scikit-learn, which is not installed: pip install 'qcomm\[train\]'"):
        features.check_sklearn()


def test_the_rule_is_the_medians_multiple():
    """A point beyond twice the median distance is noise, and one within it is not."""
    line = torch.stack([torch.arange(20.0), torch.zeros(20)], 1)
    assert median_distance(line, 3) == 1.0  # itself, and one on either side
    labels = torch.zeros(21, dtype=torch.int64)
    for away, kept in ((1.9, True), (2.1, False)):
        places = torch.cat([line, torch.tensor([[19.0 + away, 0.0]])])
        assert bool(class_filter.keep(places, labels, 3, factor=2.0)[-1]) is kept
