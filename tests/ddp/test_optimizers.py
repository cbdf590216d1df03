"""The warning about optimizers that divide by the root of a second moment."""

import warnings

import pytest
import torch
from ddp_model import backward, wrap
from distributed import attach, world

import qcomm

pytestmark = pytest.mark.world

COARSE = qcomm.SigmaGrid(step=2.0)


class Foreign(torch.optim.Optimizer):
    """An optimizer of somebody else's, with Adam's second moment under its usual name."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["exp_avg_sq"] = parameter.grad.square()


def make(name, parameters):
    return Foreign(parameters) if name == "Foreign" else getattr(torch.optim, name)(parameters, lr=1e-3)


def steps_of(model, rank, *optimizers, count=3):
    """The warnings of some steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(count):
            backward(model, rank, step)
            for optimizer in optimizers:
                optimizer.step()
    return [warning for warning in caught if "second moment" in str(warning.message)]


@world(1)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RMSprop", "Adagrad", "Adamax", "Foreign"])
def test_a_second_moment_is_warned_about_once(rank, world_size, name):
    model = wrap()
    attach(model, grid=COARSE)
    (warning,) = steps_of(model, rank, make(name, model.parameters()))
    assert str(warning.message).startswith(f"{name} divides") and "SigmaGrid(step=0.5)" in str(warning.message)
    assert warning.filename == __file__  # it points at the line of the optimizer's step
    assert steps_of(model, rank, make(name, model.parameters())) == []


@world(1)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"grid": COARSE}),
        ("AdamW", {"grid": qcomm.SigmaGrid(step=0.5)}),
        ("AdamW", {"grid": qcomm.RangeGrid()}),
        ("AdamW", {"grid": COARSE, "strategy": "none"}),
    ],
    ids=["SGD", "fine", "range", "uncompressed"],
)
def test_what_is_harmless_is_not_warned_about(rank, world_size, name, options):
    model = wrap()
    attach(model, **options)
    assert steps_of(model, rank, make(name, model.parameters())) == []


@world(1)
def test_one_of_several_optimizers_and_models(rank, world_size):
    """Adam of the model's last layer is found behind SGD of the others; Adam of another model is not the model's."""
    model, stranger = wrap(), torch.nn.Linear(2, 2)
    attach(model, grid=COARSE)
    stranger(torch.ones(1, 2)).sum().backward()
    first, last = list(model.parameters())[:-1], list(model.parameters())[-1:]
    other = torch.optim.AdamW(stranger.parameters())
    assert steps_of(model, rank, other, torch.optim.SGD(first, lr=1e-3, momentum=0.9)) == []
    (warning,) = steps_of(model, rank, other, torch.optim.Adam(last))
    assert str(warning.message).startswith("Adam divides")


@world(1)
def test_a_skipped_step_is_not_the_last_word(rank, world_size):
    """GradScaler may skip the first steps, when the optimizer has no state yet."""
    model = wrap()
    attach(model, grid=COARSE)
    optimizer = torch.optim.AdamW(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.zero_grad()
        optimizer.step()  # without gradients it does nothing
    assert len(steps_of(model, rank, optimizer)) == 1
