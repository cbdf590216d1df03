"""``AbsAdamW``: its rule against a few lines of scalar arithmetic, its purpose, and its contract as an optimizer."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
from ddp_model import backward, wrap
from distributed import attach, world
from torch.distributed.optim import ZeroRedundancyOptimizer

import qcomm

OPTIONS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def expected(weight, gradients, lr, betas, eps, weight_decay):
    """The rule, one number at a time, in float64."""
    mean = size = 0.0
    for step, gradient in enumerate(gradients, start=1):
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        size = betas[1] * size + (1 - betas[1]) * abs(gradient)
        divisor = math.sqrt(math.pi / 2) * size / (1 - betas[1] ** step) + eps
        weight = weight * (1 - lr * weight_decay) - lr * mean / (1 - betas[0] ** step) / divisor
    return weight


def take(optimizer, weights, gradients):
    """One step with these gradients; None leaves one away."""
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = None if gradient is None else gradient.clone()
    optimizer.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_the_rule(dtype, tolerance):
    torch.manual_seed(0)
    weights = [torch.randn(7).to(dtype).requires_grad_(), torch.randn(2, 3).to(dtype).requires_grad_()]
    before = [weight.detach().double().clone() for weight in weights]
    gradients = [[torch.randn(weight.shape).to(dtype) for weight in weights] for _ in range(5)]
    optimizer = qcomm.AbsAdamW(weights, **OPTIONS)
    for step in gradients:
        take(optimizer, weights, step)
    for number, weight in enumerate(weights):
        series = torch.stack([step[number].double().flatten() for step in gradients], dim=1).tolist()
        values = [expected(w, g, **OPTIONS) for w, g in zip(before[number].flatten().tolist(), series, strict=True)]
        torch.testing.assert_close(weight.detach().double().flatten(), torch.tensor(values, dtype=torch.float64),
                                   rtol=tolerance, atol=tolerance)  # fmt: skip


def test_a_sparse_mean_does_not_shorten_its_steps():
    """Whole steps of 8 in place of a gradient of 0.5 +- 0.5: the divisor stays, where Adam's grows by sqrt(8 / 0.5)."""
    random = torch.Generator().manual_seed(1)
    drift = {}
    for name, kind in (("abs", qcomm.AbsAdamW), ("adam", torch.optim.AdamW)):
        for sparse in (False, True):
            weight = torch.zeros(2000, requires_grad=True)
            optimizer = kind([weight], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
            for _ in range(1000):
                value = torch.rand(2000, generator=random)  # of a gradient with mean 0.5
                fires = torch.rand(2000, generator=random) * 8 < value
                take(optimizer, [weight], [torch.where(fires, 8.0, 0.0) if sparse else value])
            drift[name, sparse] = -float(weight.detach().mean())
    assert drift["abs", True] / drift["abs", False] == pytest.approx(1, abs=0.05)
    assert drift["adam", True] / drift["adam", False] < 0.4


def test_parameters_without_a_gradient_keep_their_place():
    """A parameter that is used at every other step has the averages of its own steps."""
    torch.manual_seed(0)
    both, alone = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    other = torch.ones(2, requires_grad=True)
    together, single = qcomm.AbsAdamW([both, other], **OPTIONS), qcomm.AbsAdamW([alone], **OPTIONS)
    for step in range(6):
        gradient = torch.randn(3) if step % 2 else None
        take(together, [both, other], [gradient, torch.ones(2)])
        if gradient is not None:
            take(single, [alone], [gradient])
    assert torch.equal(both, alone)


def test_groups_and_schedules():
    weights = [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    optimizer = qcomm.AbsAdamW([{"params": weights[:1]}, {"params": weights[1:], "lr": 0.0}], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(2):
        take(optimizer, weights, [torch.ones(2), torch.ones(2)])
        schedule.step()
    assert torch.equal(weights[1], torch.ones(2)) and optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    first = expected(1.0, [1.0], 0.1, (0.9, 0.999), 1e-8, 0.01)
    second = first * (1 - 0.05 * 0.01) - 0.05 / math.sqrt(math.pi / 2)
    assert weights[0].tolist() == pytest.approx([second, second], abs=1e-5)


def test_a_closure_is_called_once():
    weight, calls = torch.ones(2, requires_grad=True), []

    def closure():
        calls.append(torch.is_grad_enabled())
        weight.grad = None
        loss = weight.square().sum()
        loss.backward()
        return loss

    loss = qcomm.AbsAdamW([weight]).step(closure)
    assert calls == [True] and float(loss) == 2.0 and bool((weight < 1).all())


def test_a_resumed_run_is_bit_exact(tmp_path):
    torch.manual_seed(0)
    gradients = [torch.randn(5) for _ in range(8)]
    weight = torch.ones(5, requires_grad=True)
    optimizer = qcomm.AbsAdamW([weight], **OPTIONS)
    for gradient in gradients[:4]:
        take(optimizer, [weight], [gradient])
    torch.save({"weight": weight.detach(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    for gradient in gradients[4:]:
        take(optimizer, [weight], [gradient])
    saved = torch.load(tmp_path / "state.pt")
    again = saved["weight"].requires_grad_()
    resumed = qcomm.AbsAdamW([again])
    resumed.load_state_dict(saved["optimizer"])
    for gradient in gradients[4:]:
        take(resumed, [again], [gradient])
    assert torch.equal(again, weight)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas is \(0.9,\)"),
        ({"betas": 0.9}, "betas is 0.9"),
        ({"lr": None}, "lr is None"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        qcomm.AbsAdamW([torch.ones(1, requires_grad=True)], **options)
    optimizer = qcomm.AbsAdamW([torch.ones(1, requires_grad=True)])
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_16_bit_parameters_do_not_stall(dtype, tmp_path):
    """An average of bfloat16 that grows by a thousandth would stay at a quarter, also after a resume."""
    weight = torch.ones(3, dtype=dtype).requires_grad_()
    optimizer = qcomm.AbsAdamW([weight], lr=0.0)
    take(optimizer, [weight], [torch.zeros(3, dtype=dtype)])
    assert bool(weight.isfinite().all())
    for _ in range(2):
        for _ in range(1500):
            take(optimizer, [weight], [torch.ones(3, dtype=dtype)])
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        optimizer = qcomm.AbsAdamW([weight], lr=0.0)
        optimizer.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert float(optimizer.state[weight]["exp_avg_abs"][0]) == pytest.approx(1 - 0.999**3000, abs=1e-3)


def test_a_state_of_another_optimizer_changes_nothing():
    weight = torch.ones(3, requires_grad=True)
    adam, ours = torch.optim.AdamW([weight]), qcomm.AbsAdamW([weight])
    for optimizer in (adam, ours):
        take(optimizer, [weight], [torch.ones(3)])
    before = {name: value.clone() for name, value in ours.state[weight].items() if name != "step"}
    with pytest.raises(ValueError, match=r"state_dict must be of AbsAdamW.*exp_avg_sq"):
        ours.load_state_dict(adam.state_dict())
    assert all(torch.equal(ours.state[weight][name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_gradients_that_it_cannot_take_change_nothing(kind):
    good = torch.ones(2, requires_grad=True)
    bad = torch.ones(2, dtype=torch.complex64 if kind == "complex" else torch.float32).requires_grad_()
    bad.grad = torch.ones(2).to_sparse() if kind == "sparse" else torch.ones(2, dtype=torch.complex64)
    good.grad = torch.ones(2)
    optimizer = qcomm.AbsAdamW([good, bad])
    with pytest.raises(ValueError, match=f"a gradient is {kind}"):
        optimizer.step()
    assert torch.equal(good, torch.ones(2)) and not optimizer.state


@pytest.mark.world
@world(2)
def test_behind_the_hook(rank, world_size):
    """No warning, the same bits on both ranks, with and without a state that is split over the ranks."""
    finals = []
    for split in (False, True):
        model = wrap()
        attach(model, grid=qcomm.SigmaGrid(step=2.0))
        options = {"lr": 0.01, "weight_decay": 0.1}
        optimizer = (
            ZeroRedundancyOptimizer(model.parameters(), optimizer_class=qcomm.AbsAdamW, **options)
            if split
            else qcomm.AbsAdamW(model.parameters(), **options)
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(3):
                backward(model, rank, step)
                optimizer.step()
        assert not [warning for warning in caught if "second moment" in str(warning.message)]
        finals.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    gathered = [torch.empty_like(finals[0]) for _ in range(world_size)]
    dist.all_gather(gathered, finals[0])
    assert torch.equal(gathered[0], gathered[1]) and torch.equal(finals[0], finals[1])
