"""The accuracy study at low rates: its order, its rule of success, and that it goes on where it was interrupted."""

import pytest
from studies import BENCH, check_an_interrupted_study_goes_on


@pytest.fixture
def study(monkeypatch):
    """bench/bench_accuracy_low_rate.py."""
    pytest.importorskip("scipy", reason="scipy, which has the t distribution, is not installed")
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_accuracy_low_rate

    return bench_accuracy_low_rate


def record(method, seed, accuracy, loss):
    scene = {"task": "blobs", "ranks": 4, "schedule": "falling", "images": 512, "epochs": 1}
    stats = {"bytes_sent": 32.0 if method == "fp32" else 1.0}
    return {**scene, "method": method, "seed": seed, "test_accuracy": accuracy, "train_losses": [loss], "stats": stats}


def test_deciding_methods_come_first_and_seed_by_seed(study):
    runs = study.ordered(study.SCENES[:2], [*study.FIRST, *study.REST], 2, study.Setting())
    assert len(runs) == 2 * 2 * 10
    assert [run.method for run in runs[:10]] == [*study.FIRST, *study.FIRST]
    assert [run.setting.seed for run in runs[:10]] == [0] * 5 + [1] * 5
    assert {run.method for run in runs[:20]} == set(study.FIRST) and {run.method for run in runs[20:]} == set(
        study.REST
    )


@pytest.mark.parametrize(
    ("differences", "seeds", "answer"),
    [
        ([0.001, -0.002, 0.002, -0.001], 8, "no loss"),
        ([0.001, -0.002, 0.002, -0.001], 4, "open: 4 of 8 seeds"),
        ([-0.002, -0.0021], 8, "not met"),  # the interval lacks 0
        ([0.03, -0.04], 8, "not met"),  # the mean is too far off
    ],
)
def test_the_rule_of_success(study, differences, seeds, answer):
    records = [record("fp32", seed, 0.8, 0.5) for seed in range(seeds)]
    records += [record("sign", seed, 0.8 + differences[seed % len(differences)], 0.6) for seed in range(seeds)]
    _, row = study.summarise(records)
    assert row["verdict"] == answer
    assert row["bits_of_fp32"] == 1
    low, high = row["accuracy"]["interval"]
    assert low < row["accuracy"]["difference"] < high
    assert row["train_loss"]["difference"] == pytest.approx(0.1)


@pytest.mark.world
def test_an_interrupted_study_goes_on(tmp_path):
    outputs = check_an_interrupted_study_goes_on("bench_accuracy_low_rate.py", tmp_path)
    assert "open: 1 of 8 seeds" in outputs[1]
