"""The study of AdamW on a small transformer: its rule of success, its warm-up, and how an interrupted one goes on."""

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
    run = {"parameters": 99, "steps": 10, "rate": rate, "method": method, "seed": seed}
    return {**run, "held_out_loss": loss, "stats": stats}


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
    (verdict,) = study.verdicts(rows, 3)
    assert verdict["method"] == "qcomm k=1 abs" and verdict["verdict"].startswith(answer)
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


def test_a_warm_up_begins_at_step_1_and_ends(bench):
    """The first mean is that of a grid of step 1, and from the fifth step on as few bytes are sent as without it."""
    from simulated_exchange import Bucket, build_exchange

    torch.manual_seed(0)
    gradients = torch.randn(8, 2, 20_000)
    bucket = Bucket(0, ("weight",), (torch.Size([20_000]),))
    exchanges = {name: build_exchange(f"qcomm k={name}", 2) for name in ("1", "3.2", "3.2 after 4")}
    first, sent = {}, {}
    for name, exchange in exchanges.items():
        totals = []
        for step in gradients:
            buffers = [*step.clone()]
            exchange.average(bucket, buffers)
            first.setdefault(name, buffers[0])
            totals.append(exchange.stats()["bytes_sent"])
        sent[name] = totals
    assert torch.equal(first["3.2 after 4"], first["1"]) and not torch.equal(first["3.2"], first["1"])
    last = {name: totals[-1] - totals[-4] for name, totals in sent.items()}
    assert last["3.2 after 4"] == pytest.approx(last["3.2"], rel=0.1) and last["1"] > 2 * last["3.2"]


@pytest.mark.parametrize("method", ["qcomm k=1", "qcomm k=1 sgd", "zip adamw"])
def test_an_unknown_method_is_refused(bench, method):
    with pytest.raises(ValueError, match="method is"):
        bench[0].split(method)


def test_an_interrupted_study_goes_on(tmp_path):
    check_an_interrupted_study_goes_on("bench_transformer.py", tmp_path)
