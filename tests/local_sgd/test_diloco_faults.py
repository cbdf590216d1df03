"""DiLoCo's checkpoints, what it refuses, and what remains when an exchange fails."""

import copy
import io
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from averager_model import exact_mean, flat, move
from diloco_model import diloco, network, train_step
from distributed import assert_same_on_all_ranks, die, run, world
from torch import nn

import qcomm
from qcomm.collectives.two_phase_steps import MeanSteps

pytestmark = pytest.mark.world

STREAMED = {"period": 6, "fragments": 2, "delay": 2}


def train(model, ours, rank, steps):
    for step in steps:
        train_step(model, rank, step)
        ours.step()


def saved(model, ours):
    """Both states, through a file."""
    file = io.BytesIO()
    torch.save((model.state_dict(), ours.state_dict()), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@world(2)
@pytest.mark.parametrize("stop", [3, 4, 5, 7, 9, 10], ids=lambda step: f"step_{step}")
@pytest.mark.parametrize(
    "options",
    [{"period": 4}, STREAMED, {"period": 8, "fragments": 3, "error_feedback": False}],
    ids=["plain", "streamed", "no_feedback"],
)
def test_a_resumed_run_is_bit_exact(rank, world_size, options, stop):
    """Also in the middle of a period and with an exchange under way; and who saves goes on as who does not."""
    undisturbed = network()
    ours = diloco(undisturbed, **options)
    train(undisturbed, ours, rank, range(1, 17))
    model = network()
    first = diloco(model, **options)
    train(model, first, rank, range(1, stop))
    weights, state = saved(model, first)
    train(model, first, rank, range(stop, 17))
    resumed = network()
    resumed.load_state_dict(weights)
    second = diloco(resumed, **options)
    second.load_state_dict(state)
    assert second.steps == stop - 1
    train(resumed, second, rank, range(stop, 17))
    for other, its in ((model, first), (resumed, second)):
        assert torch.equal(flat(other.parameters()), flat(undisturbed.parameters()))
        assert torch.equal(flat(its.anchor().values()), flat(ours.anchor().values()))
        assert_same_on_all_ranks(*its.anchor().values())


@world(2)
def test_every_part_of_a_state_counts(rank, world_size):
    """Without the outer optimizer's momentum, or without residuals, a run goes on otherwise."""
    model = network()
    ours = diloco(model, period=2)
    train(model, ours, rank, range(1, 6))
    weights, state = saved(model, ours)
    fresh = diloco(network(), period=2).state_dict()
    ends = []
    for changed in (
        state,
        {**state, "outer": fresh["outer"]},
        {**state, "exchanges": [{**diloco_exchange(state), "error_feedback": None}]},
    ):
        one = network()
        one.load_state_dict(weights)
        other = diloco(one, period=2)
        other.load_state_dict(changed)
        train(one, other, rank, range(6, 11))
        ends.append(flat(other.anchor().values()))
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def diloco_exchange(state):
    return next(iter(state.values()))[0]["exchanges"][0]


def case_other_world(rank, world_size, states):
    """Ranks go on from what another number left, with an exchange under way."""
    model = network()
    ours = diloco(model, **STREAMED)
    if states is None:
        train(model, ours, rank, range(1, 8))
        return model.state_dict(), ours.state_dict()
    known = len(states)
    own = [states[number][1] for number in range(rank, known, world_size)]
    if not own:  # a new rank, as load_rank_states has it
        (key,) = states[0][1]
        state = states[0][1][key][0]
        exchanges = [{**exchange, "error_feedback": None} for exchange in state["exchanges"]]
        own = [{**states[0][1], "exchanges": exchanges}]
    model.load_state_dict(states[rank % known][0])
    ours.load_state_dict(own)
    train(model, ours, rank, range(8, 14))
    assert_same_on_all_ranks(*ours.anchor().values())
    ours.finish()
    stats = ours.stats()
    assert stats["bits_per_element_compressed"] < 6
    return stats["residual_norm"]


@pytest.mark.parametrize(("before", "after"), [(3, 2), (2, 3)])
def test_another_number_of_ranks(before, after):
    assert min(run(after, case_other_world, run(before, case_other_world, None))) > 0


def case_of_a_checkpoint(rank, world_size, folder, goes_on):
    import torch.distributed.checkpoint as dcp

    model = network()
    ours = diloco(model, **STREAMED)
    if not goes_on:
        train(model, ours, rank, range(1, 8))
        dcp.save({"diloco": ours.state_dict()}, checkpoint_id=folder)
        return
    ours.load_state_dict(qcomm.load_rank_states(folder, "diloco"))
    assert ours.steps == 7
    train(model, ours, rank, range(8, 14))
    assert_same_on_all_ranks(*ours.anchor().values())


def test_a_shared_checkpoint_serves_any_number_of_ranks(tmp_path):
    run(3, case_of_a_checkpoint, str(tmp_path), False)
    run(2, case_of_a_checkpoint, str(tmp_path), True)


def failing(method):
    return mock.patch.object(MeanSteps, method, side_effect=ZeroDivisionError("boom"))


@world(2, 3)
@pytest.mark.parametrize("delay", [0, 1])
def test_failures_are_told_to_all_and_change_nothing(rank, world_size, delay):
    model = network()
    ours = diloco(model, lambda parameters: torch.optim.SGD(parameters, lr=1.0), period=2, delay=delay, alpha=0.0)
    odd, count = rank == 1, 0

    def round_of_steps():
        """From one exchange to the next: its merge is at the end."""
        for _ in range(2):
            ours.step()

    def works(uncompressed=False):
        nonlocal count
        count += 1
        move(model, rank, count)
        wanted = exact_mean(model.parameters())
        round_of_steps()
        assert_same_on_all_ranks(*model.parameters())
        off = float((flat(model.parameters()) - wanted).abs().max())
        assert (off < 1e-6) == uncompressed and off < 0.05, off

    def fails(error, match):
        before, anchor = flat(model.parameters()).nan_to_num(nan=7.0), flat(ours.anchor().values())
        with pytest.raises(error, match=match):
            round_of_steps()
        while ours.steps % 2 != delay:
            ours.step()
        assert torch.equal(before, flat(model.parameters()).nan_to_num(nan=7.0))
        assert torch.equal(anchor, flat(ours.anchor().values()))

    if delay:
        ours.step()
    works()
    works()
    # Before anything is sent: residuals stay, too.
    norm = ours.stats()["residual_norm"]
    value = model[0].weight.data[1, 1].clone()
    if odd:
        model[0].weight.data[1, 1] = float("nan")
    fails(qcomm.CollectiveError, "rank 1 failed while preparing.*'0.weight' has 1 of 2304 values that are not finite")
    model[0].weight.data[1, 1] = value
    if odd:
        model[3].bias.requires_grad_(False)
    fails(qcomm.CollectiveError, "rank 1 failed while preparing.*have changed since DiLoCo was made.*'3.bias'")
    model[3].bias.requires_grad_(True)
    assert ours.stats()["residual_norm"] == norm
    works()
    # In the middle of an exchange: told to all in the same one. The anchor and the movement stay.
    for method in ("encode", "reduce"):
        with failing(method) if odd else nullcontext():
            fails(qcomm.CollectiveError, "rank 1 failed while .*ZeroDivisionError: boom")
        assert ours.stats()["residual_norm"] == 0.0
        works()
    # Settings that differ: nothing has changed, and the next exchange has no anchor.
    if odd:
        ours.outer.param_groups[0]["lr"] = 0.5
    fails(qcomm.ConfigMismatchError, "outer: SGD.*'lr': 1.0.* on rank.*'lr': 0.5.* on rank 1")
    ours.outer.param_groups[0]["lr"] = 1.0
    works(uncompressed=True)
    works()
    # On one rank alone, after its last message: the others hear of it, and of the anchors that differ since.
    move(model, rank, 99)
    with failing("decode") if odd else nullcontext():
        if odd:
            fails(qcomm.CollectiveError, "boom; the others are told in the next collective")
        else:
            round_of_steps()
    fails(qcomm.CollectiveError, "rank 1 failed while decoding")
    fails(qcomm.ConfigMismatchError, "anchor: [0-9a-f]{16} on ranks? .*[0-9a-f]{16} on rank 1")
    works(uncompressed=True)
    works()


@world(2)
def test_an_outer_optimizer_that_fails(rank, world_size):
    """On one rank alone: that rank raises, and the ranks begin anew when they meet again."""
    model = network()
    ours = diloco(model, lambda parameters: torch.optim.SGD(parameters, lr=1.0), period=1)
    move(model, rank, 0)
    ours.step()
    move(model, rank, 1)
    with mock.patch.object(ours.outer, "step", side_effect=MemoryError("boom")) if rank else nullcontext():
        if rank:
            with pytest.raises(MemoryError, match="boom"):
                ours.step()
        else:
            ours.step()
    with pytest.raises(qcomm.ConfigMismatchError, match=r"anchor: [0-9a-f]{16} on rank 0, none yet on rank 1"):
        ours.step()
    wanted = exact_mean(model.parameters())
    ours.step()
    assert_same_on_all_ranks(*model.parameters(), *ours.anchor().values())
    assert float((flat(model.parameters()) - wanted).abs().max()) < 1e-6


@world(2)
def test_arithmetic_that_differs_is_found(rank, world_size):
    """An anchor that one rank moved to other bits is no anchor of the others."""
    model = network()
    ours = diloco(model, period=1)
    move(model, rank, 0)
    ours.step()
    if rank == 1:
        ours._outer.anchor["0.weight"].view(-1)[0] += 1e-6
    move(model, rank, 1)
    ours.step()
    move(model, rank, 2)
    with pytest.raises(qcomm.ConfigMismatchError, match="anchor: "):
        ours.step()


@world(2)
def test_ranks_that_begin_with_other_weights(rank, world_size):
    """The first step says so. Who goes on averages the weights, and all are equal from then on."""
    model = network()
    move(model, rank, 0)
    ours = diloco(model, period=2)
    before = flat(model.parameters())
    with pytest.raises(qcomm.ConfigMismatchError, match=r"anchor: [0-9a-f]{16} on rank 0, [0-9a-f]{16} on rank 1"):
        ours.step()
    assert torch.equal(flat(model.parameters()), before)
    wanted = exact_mean(model.parameters())
    ours.step()
    assert_same_on_all_ranks(*model.parameters())
    assert float((flat(model.parameters()) - wanted).abs().max()) < 1e-6
    qcomm.broadcast_parameters(model, lossless=True)
    diloco(model, period=2).step()


@world(2)
@pytest.mark.parametrize(
    ("option", "common", "odd"),
    [
        ("period", 2, 4),
        ("fragments", 1, 2),
        ("delay", 0, 1),
        ("alpha", 0.0, 0.5),
        ("grid", qcomm.SigmaGrid(1.0), qcomm.SigmaGrid(2.0)),
        ("min_elements", 10, 11),
        ("error_feedback", True, False),
    ],
    ids=["period", "fragments", "delay", "alpha", "grid", "min_elements", "error_feedback"],
)
def test_options_that_differ_are_refused_at_the_first_step(rank, world_size, option, common, odd):
    model = network()
    ours = diloco(model, **{"period": 2, option: odd if rank == 1 else common})
    with pytest.raises(qcomm.ConfigMismatchError, match=f"{option}: .* on rank 0, .* on rank 1"):
        ours.step()


def without_momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.7)


@world(2)
def test_ranks_that_load_other_states(rank, world_size):
    model = network()
    ours = diloco(model, without_momentum, period=1)
    train(model, ours, rank, [1])
    early = saved(model, ours)
    train(model, ours, rank, [2])
    late = saved(model, ours)
    weights, state = early if rank else late
    model.load_state_dict(weights)
    ours.load_state_dict({**state, "step": 2})
    with pytest.raises(qcomm.ConfigMismatchError, match=r"anchor: [0-9a-f]{16} on rank 0, [0-9a-f]{16} on rank 1"):
        ours.step()


@world(2)
def test_reset(rank, world_size):
    model = network()
    ours = diloco(model, period=4, delay=2)
    train(model, ours, rank, range(1, 6))  # an exchange is under way
    ours.reset()
    assert ours.stats()["residual_norm"] == 0.0
    train(model, ours, rank, [6, 7])
    train_step(model, rank, 8)
    wanted = exact_mean(model.parameters())
    ours.step()
    train(model, ours, rank, [9, 10])
    assert float((flat(ours.anchor().values()) - wanted).abs().max()) < 1e-6
    assert not ours.outer.state


# Arguments.

LATER = {"period": 4, "fragments": 2}
ARGUMENTS = {
    "model": ((7,), {"period": 1}, TypeError, "model must be a torch.nn.Module, got int"),
    "no parameters": ((nn.ReLU(),), {"period": 1}, ValueError, "model must have parameters that need a gradient"),
    "lazy": ((nn.LazyLinear(3),), {"period": 1}, ValueError, "'weight' has no shape yet"),
    "complex": (
        (nn.Linear(3, 3, dtype=torch.complex64),),
        {"period": 1},
        TypeError,
        "'weight' must be float32.*view it as real",
    ),
    "freed": ((nn.Linear(3, 3, device="meta"),), {"period": 1}, TypeError, "'weight' must be a dense tensor with mem"),
    "period": ((nn.Linear(3, 3),), {"period": 0}, ValueError, "period must be >= 1, got 0"),
    "many fragments": ((nn.Linear(3, 3),), {"period": 9, "fragments": 3}, ValueError, "fragments must be at most 2"),
    "short period": ((nn.Linear(3, 3),), {"period": 1, "fragments": 2}, ValueError, "fragments must be at most 1"),
    "delay": ((nn.Linear(3, 3),), {**LATER, "delay": 2}, ValueError, "delay must be less than .* = 2.*got 2"),
    "alpha": ((nn.Linear(3, 3),), {"period": 1, "alpha": 1.0}, ValueError, "alpha must be at least 0 and less than 1"),
    "alpha's type": ((nn.Linear(3, 3),), {"period": 1, "alpha": "half"}, TypeError, "alpha must be a real number"),
    "exchange": ((nn.Linear(3, 3),), {"period": 1, "exchange": "weights"}, TypeError, "exchange must not be given"),
    "unknown": ((nn.Linear(3, 3),), {"period": 1, "steps": 2}, TypeError, "unexpected keyword argument 'steps'"),
    "step": ((nn.Linear(3, 3),), {"period": 1, "grid": qcomm.SigmaGrid(4.0)}, ValueError, "step must be at most 3.4"),
    "an optimizer": (
        (nn.Linear(3, 3), torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=1.0)),
        {"period": 1},
        TypeError,
        "outer must be a function of the anchor's parameters .*, got SGD",
    ),
    "outer's result": ((nn.Linear(3, 3), lambda _: None), {"period": 1}, TypeError, "outer must return a .*NoneType"),
    "other parameters": (
        (nn.Linear(3, 3), lambda parameters: torch.optim.SGD(parameters[:1], lr=1.0)),
        {"period": 1},
        ValueError,
        "outer must return an optimizer of the 2 parameters .*, got one of 1",
    ),
}


@world(1)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments_are_refused(rank, world_size, name):
    arguments, options, error, match = ARGUMENTS[name]
    with pytest.raises(error, match=match):
        qcomm.DiLoCo(*arguments, **options)


def test_without_a_process_group_it_says_so():
    with pytest.raises(RuntimeError, match=r"torch.distributed is not initialised"):
        qcomm.DiLoCo(nn.Linear(3, 3), period=1)


# Damaged states.


def nested(state, part, **changes):
    """The state with changes in its pending exchange, its outer optimizer, or its first exchange."""
    entries = next(iter(state.values()))[0]
    if part == "exchanges":
        return {**state, "exchanges": [{**entries["exchanges"][0], **changes}, *entries["exchanges"][1:]]}
    return {**state, part: {**entries[part], **changes}}


def bad_momentum(state):
    outer = copy.deepcopy(next(iter(state.values()))[0]["outer"])
    outer["state"][0]["momentum_buffer"] = torch.zeros(3)
    return {**state, "outer": outer}


def infinite_momentum(state):
    outer = copy.deepcopy(next(iter(state.values()))[0]["outer"])
    outer["state"][0]["momentum_buffer"].view(-1)[0] = float("inf")
    return {**state, "outer": outer}


NAMES = "of another model or of other fragments: '0.weight' has shape None there"
DAMAGES = {
    "nothing": (lambda state: {}, "must be a result of state_dict.., with a key such as"),
    "an averager's": (lambda state: dict(state, format=2), "must be of format 1, .* of DiLoCo .* got 2"),
    "step": (lambda state: dict(state, step=-1), "step must be an int >= 0, got -1"),
    "fewer fragments": (lambda state: dict(state, exchanges=[]), "must hold 2 exchanges"),
    "anchor": (lambda state: nested(state, "exchanges", anchor={"x": torch.ones(3)}, error_feedback=None), NAMES),
    "outer": (lambda state: dict(state, outer=None), "of another outer optimizer than SGD: it is not a dictionary"),
    "outer's groups": (
        lambda state: nested(state, "outer", param_groups=[]),
        "another outer optimizer than SGD: Value",
    ),
    "outer's shapes": (bad_momentum, "another outer optimizer than SGD: RuntimeError"),
    "outer's values": (infinite_momentum, "another outer optimizer than SGD: it holds values that are not finite"),
    "began": (lambda state: dict(state, began=[1]), "began must hold 2 steps"),
    "pending": (lambda state: dict(state, pending=3), "pending needs fragment, due, means and is_movement"),
    "its fragment": (lambda state: nested(state, "pending", fragment=2), r"fragment 2, which must be in range\(0, 2\)"),
    "its time": (lambda state: nested(state, "pending", due=6), r"due 6, which must be in range\(7, 13\)"),
    "its kind": (lambda state: nested(state, "pending", is_movement=1), "is_movement must be a bool, got 1"),
    "its means": (lambda state: nested(state, "pending", means={"x": torch.ones(3)}), "of another model or of other"),
    "its values": (
        lambda state: nested(state, "pending", means={"0.weight": torch.full((48, 48), torch.nan)}),
        "the mean of '0.weight' has 2304 of 2304 values that are not finite",
    ),
}


@world(2)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_states_are_refused_and_change_nothing(rank, world_size, damage):
    model = network()
    ours = diloco(model, **STREAMED)
    train(model, ours, rank, range(1, 7))  # the second fragment is under way
    make, match = DAMAGES[damage]
    state = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=match):
        ours.load_state_dict(make(state))
    after = ours.state_dict()
    assert torch.equal(flat(after["exchanges"][0]["anchor"].values()), flat(state["exchanges"][0]["anchor"].values()))
    assert after["pending"]["due"] == state["pending"]["due"] == 8 and after["step"] == 6
    train(model, ours, rank, range(7, 13))
    assert_same_on_all_ranks(*ours.anchor().values())


@world(2)
def test_an_exchange_that_fails_beside_training_is_an_error_of_its_merge(rank, world_size):
    """Ranks go on to the step at which it is due, and raise there; a state has no result to save before."""
    model = network()
    ours = diloco(model, period=4, delay=3)
    train(model, ours, rank, range(1, 4))
    with failing("encode") if rank == 1 else nullcontext():
        train(model, ours, rank, range(4, 7))
        with pytest.raises(qcomm.CollectiveError, match="rank 1 failed while compressing its values"):
            ours.state_dict()
        anchor = flat(ours.anchor().values())
        with pytest.raises(qcomm.CollectiveError, match="rank 1 failed while compressing its values"):
            train(model, ours, rank, [7])
    assert torch.equal(flat(ours.anchor().values()), anchor) and ours.state_dict()["pending"] is None
    train(model, ours, rank, range(8, 12))
    assert_same_on_all_ranks(*ours.anchor().values())
    assert not torch.equal(flat(ours.anchor().values()), anchor)


@world(2, alone=True, dying=(1,))
def test_a_rank_that_dies_is_an_error_on_the_others(rank, world_size):
    model = network()
    ours = diloco(model, period=2)
    train(model, ours, rank, range(1, 4))
    anchor = flat(ours.anchor().values())
    train_step(model, rank, 4)
    with mock.patch.object(MeanSteps, "reduce", side_effect=die) if rank == 1 else nullcontext():
        before = flat(model.parameters())
        with pytest.raises(qcomm.CollectiveError, match=r"no answer from rank\(s\) 1 "):
            ours.step()
    assert torch.equal(flat(model.parameters()), before) and torch.equal(flat(ours.anchor().values()), anchor)
