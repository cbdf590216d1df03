"""The study of AdamW on a small transformer: its rule of success, its optimizer, and how an interrupted one goes on."""

import math

import pytest
import torch
from studies import BENCH, check_an_interrupted_study_goes_on


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/."""
    pytest.importorskip("scipy", reason="scipy, which has the t distribution, is not installed")
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_transformer
    import transformer_training

    return bench_transformer, transformer_training


def record(method, rate, seed, loss, bits=2.0):
    stats = {"bytes_sent": 32.0 if method.startswith("fp32") else bits}
    return {"steps": 10, "rate": rate, "method": method, "seed": seed, "held_out_loss": loss, "stats": stats}


@pytest.mark.parametrize(
    ("losses", "bits", "answer"),
    [
        ({0.002: 1.505, 0.004: 1.509}, 2.0, "holds"),
        ({0.002: 1.505, 0.004: 1.511}, 2.0, "does not hold"),  # at a rate that is near enough
        ({0.002: 1.505, 0.004: 1.509}, 2.2, "does not hold"),  # too many bits
        ({0.002: 1.505}, 2.0, "open"),
    ],
)
def test_the_rule_of_success(bench, losses, bits, answer):
    study, _ = bench
    reference = {0.001: 1.6, 0.002: 1.5, 0.004: 1.508}  # the first is no good rate
    records = [record("fp32 adamw", rate, seed, loss) for rate, loss in reference.items() for seed in range(3)]
    records += [record("qcomm k=1 abs", rate, seed, loss, bits) for rate, loss in losses.items() for seed in range(3)]
    rows = study.summarise(records)
    assert study.verdicts(rows, 3)["qcomm k=1 abs"].startswith(answer)
    row = next(row for row in rows if row["method"] == "qcomm k=1 abs" and row["rate"] == 0.002)
    assert row["bits"] == bits and row["loss"]["difference"] == pytest.approx(0.005)


def test_absolute_moments_are_adams_for_gradients_of_one_size(bench):
    """Of gradients of +-c both denominators are c, but for the constant of a normal distribution."""
    _, training = bench
    ours, theirs = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    absolute = training.AbsAdamW([ours], lr=0.1 * math.sqrt(math.pi / 2))
    adam = torch.optim.AdamW([theirs], lr=0.1, betas=training.BETAS, weight_decay=training.WEIGHT_DECAY)
    decay = 1 - 0.1 * training.WEIGHT_DECAY, 1 - 0.1 * math.sqrt(math.pi / 2) * training.WEIGHT_DECAY
    for sign in (1, -1, -1, 1, 1):
        for parameter in (ours, theirs):
            parameter.grad = sign * torch.tensor([0.5, 2.0, 30.0])
        before = ours.detach().clone(), theirs.detach().clone()
        absolute.step()
        adam.step()
        moved = ours.detach() - decay[1] * before[0], theirs.detach() - decay[0] * before[1]
        assert torch.allclose(moved[0], moved[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["qcomm k=1", "qcomm k=1 sgd", "zip adamw"])
def test_an_unknown_method_is_refused(bench, method):
    with pytest.raises(ValueError, match="method is"):
        bench[0].split(method)


def test_an_interrupted_study_goes_on(tmp_path):
    check_an_interrupted_study_goes_on("bench_transformer.py", tmp_path)
