"""The averagers' checkpoints, what they refuse, and what remains when an averaging fails."""

import copy
from unittest import mock

import pytest
import torch
from averager_model import averager, exact_mean, flat, move, network
from distributed import assert_same_on_all_ranks, run, world
from torch import nn

import qcomm
from qcomm.collectives.two_phase_steps import MeanSteps

pytestmark = pytest.mark.world


@world(2)
@pytest.mark.parametrize(
    "options",
    [{}, {"error_feedback": False}, {"strategy": "all_gather"}],
    ids=["defaults", "no_feedback", "all_gather"],
)
def test_checkpoints_are_resumed_bit_for_bit(rank, world_size, options):
    """From a checkpoint in the middle, bit for bit what would have been; without it, something else."""

    def begin():
        return network(), averager(2, **options)

    model, compressed = begin()
    for step in range(5):
        move(model, rank, step)
        compressed.average_parameters(model.parameters())
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(compressed.state_dict())
    results = []
    for saved in (None, state, {**state, "exchanges": [dict(state["exchanges"][0], error_feedback=None)]}):
        one, its_averager = (model, compressed) if saved is None else begin()
        if saved is not None:
            one.load_state_dict(weights)
            its_averager.load_state_dict(saved)
        for step in range(5, 10):
            move(one, rank, step)
            its_averager.average_parameters(one.parameters())
        assert its_averager.step == 10
        results.append(flat(one.parameters()))
    assert torch.equal(results[0], results[1])
    # The residuals were part of it.
    assert torch.equal(results[0], results[2]) == (options.get("error_feedback") is False)


@world(3)
def test_anchors_that_differ(rank, world_size):
    model, compressed = network(), averager()
    for step in range(3):
        move(model, rank, step)
        compressed.average_parameters(model.parameters())
    state = compressed.state_dict()
    move(model, rank, 3)
    compressed.average_parameters(model.parameters())
    other = averager()
    if rank == 0:  # the others forgot theirs
        other.load_state_dict(state)
    other.step = 3
    before = flat(model.parameters())
    with pytest.raises(qcomm.ConfigMismatchError, match=r"anchor: [0-9a-f]{16} on rank 0, none yet on ranks 1 2"):
        other.average_parameters(model.parameters())
    assert torch.equal(before, flat(model.parameters()))
    # All have heard of it, and begin anew.
    move(model, rank, 4)
    wanted = exact_mean(model.parameters())
    other.average_parameters(model.parameters())
    assert float((flat(model.parameters()) - wanted).abs().max()) < 1e-6


def case_other_world(rank, world_size, states):
    """Two ranks go on from what three left: the anchor is theirs, residuals are added up."""
    if states is None:
        model, compressed = network(), averager()
        for step in range(3):
            move(model, rank, step)
            compressed.average_parameters(model.parameters())
        return model.state_dict(), compressed.state_dict()
    model, compressed = network(), averager()
    model.load_state_dict(states[rank][0])
    compressed.load_state_dict([states[0][1], states[2][1]] if rank == 0 else states[1][1])
    for step in range(3, 6):
        wanted = exact_mean(model.parameters())
        move(model, rank, step)
        compressed.average_parameters(model.parameters())
        assert_same_on_all_ranks(*model.parameters())
        assert float((flat(model.parameters()) - wanted).abs().max()) < 0.1
    assert compressed.stats()["bits_per_element_compressed"] < 3
    return None


def test_another_number_of_ranks():
    run(2, case_other_world, run(3, case_other_world, None))


def failing(method):
    return mock.patch.object(MeanSteps, method, side_effect=ZeroDivisionError("boom"))


@world(2, 3)
def test_failures_are_told_to_all_and_change_no_weight(rank, world_size):
    model, compressed = network(), averager()

    def fails(error, match, params=None):
        before = flat(model.parameters())
        with pytest.raises(error, match=match):
            compressed.average_parameters(model.named_parameters() if params is None else params)
        assert torch.equal(before, flat(model.parameters()).nan_to_num(nan=7.0)) or rank == 1

    def works(uncompressed):
        move(model, rank, 0)
        wanted = exact_mean(model.parameters())
        compressed.average_parameters(model.named_parameters())
        assert_same_on_all_ranks(*model.parameters())
        assert (float((flat(model.parameters()) - wanted).abs().max()) < 1e-6) == uncompressed

    works(uncompressed=True)
    works(uncompressed=False)
    state = compressed.state_dict()
    # Before anything is sent: weights, anchor and residuals stay.
    value = model[0].weight.data[1, 1].clone()
    for bad in (float("nan"), float("inf")):
        if rank == 1:
            model[0].weight.data[1, 1] = bad
        fails(qcomm.CollectiveError, r"rank 1 failed while preparing.*'0.weight' has 1 of 2304 values that are not")
    model[0].weight.data[1, 1] = value
    odd = rank == 1
    fails(qcomm.CollectiveError, "rank 1 failed.*TypeError: params must be an iterable", 7 if odd else None)
    fails(qcomm.CollectiveError, "rank 1 failed.*params must hold at least one", iter([]) if odd else None)
    fails(qcomm.CollectiveError, "rank 1 failed.*number 0 is a int", [3] if odd else None)
    complex_ = [("x", nn.Parameter(torch.ones(3, dtype=torch.complex64)))]
    fails(qcomm.CollectiveError, "rank 1 failed.*'x' must be float32.*view it as real", complex_ if odd else None)
    twice = [("x", nn.Parameter(torch.ones(3))), ("x", nn.Parameter(torch.ones(3)))]
    fails(qcomm.CollectiveError, "rank 1 failed.*got 'x' twice", twice if odd else None)
    reshaped = [("0.weight", nn.Parameter(torch.ones(3, 3)))]
    fails(qcomm.CollectiveError, r"rank 1 failed.*has shape \(3, 3\) and had \(48, 48\)", reshaped if odd else None)
    after = compressed.state_dict()
    assert after["exchanges"][0]["identity"] == state["exchanges"][0]["identity"]
    works(uncompressed=False)
    # What differs is named, and forgotten by all.
    fewer = [("0.weight", model[0].weight)]
    fails(qcomm.ConfigMismatchError, r"layout: 6 tensors.* on ranks? 0.*parameters: 0.weight", fewer if odd else None)
    works(uncompressed=True)
    compressed.step += odd
    fails(qcomm.ConfigMismatchError, r"step: \d+ on ranks? ")
    compressed.step -= odd
    works(uncompressed=True)
    # In the middle of an exchange: told to all in the same one. The anchor stays, and the residuals are lost.
    for method in ("encode", "reduce"):
        works(uncompressed=False)
        with failing(method) if odd else mock.MagicMock():
            fails(qcomm.CollectiveError, "rank 1 failed while .*ZeroDivisionError: boom")
        assert compressed.stats()["residual_norm"] == 0.0
        works(uncompressed=False)
    # On one rank alone, after its last message: the others hear of it in the next one.
    with failing("decode") if odd else mock.MagicMock():
        if odd:
            fails(qcomm.CollectiveError, "boom; the others are told in the next collective")
        else:
            compressed.average_parameters(model.named_parameters())
    fails(qcomm.CollectiveError, "rank 1 failed while decoding")
    fails(qcomm.ConfigMismatchError, r"anchor: [0-9a-f]{16} on ranks? .*[0-9a-f]{16} on rank 1")
    works(uncompressed=True)


@world(2)
def test_residuals_stay_where_another_rank_has_nan(rank, world_size):
    """Where a rank has NaN, the others keep what they have, also with a strategy that encodes first."""
    model, compressed = network(), averager(strategy="all_gather")
    for step in range(3):
        move(model, rank, step)
        compressed.average_parameters(model.parameters())
    before = copy.deepcopy(compressed.state_dict()["exchanges"][0])
    move(model, rank, 3)
    if rank == 1:
        model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(qcomm.CollectiveError, match="rank 1 failed while preparing"):
        compressed.average_parameters(model.parameters())
    after = compressed.state_dict()["exchanges"][0]
    assert after["identity"] == before["identity"]
    for name, residual in before["error_feedback"]["local"].items():
        assert torch.equal(residual, after["error_feedback"]["local"][name]) and bool(residual.any())


@world(2)
@pytest.mark.parametrize(
    ("option", "common", "odd", "field"),
    [
        ("grid", qcomm.SigmaGrid(1.0), qcomm.SigmaGrid(2.0), "grid: SigmaGrid"),
        ("exchange", "difference", "weights", "exchange: difference on rank 0, weights on rank 1"),
        ("error_feedback", True, False, "error_feedback: True on rank 0, False on rank 1"),
        ("min_elements", 10, 11, "min_elements: 10 on rank 0"),
        ("strategy", "two_phase", "all_gather", "strategy: two_phase on rank 0"),
    ],
    ids=["grid", "exchange", "error_feedback", "min_elements", "strategy"],
)
def test_options_that_differ_are_refused(rank, world_size, option, common, odd, field):
    options = {option: odd if rank == 1 else common}
    with pytest.raises(qcomm.ConfigMismatchError, match=field):
        averager(**options).average_parameters(network().parameters())
    averager().average_parameters(network().parameters())


@world(2)
@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    [
        ((0,), {}, ValueError, "period must be >= 1, got 0"),
        ((2.5,), {}, TypeError, "period must be an int, got float"),
        ((1, -1), {}, ValueError, "warmup_steps must be >= 0, got -1"),
        ((1,), {"exchange": "deltas"}, ValueError, "exchange must be one of"),
        ((1,), {"exchange": "weights", "error_feedback": True}, ValueError, "error_feedback must not be True"),
        ((1,), {"error_feedback": 1}, TypeError, "error_feedback must be a bool"),
        ((1,), {"grid": "sigma"}, TypeError, "grid must be"),
        ((1,), {"buffers_of": []}, TypeError, "buffers_of must be a torch.nn.Module"),
        ((1,), {"steps": 2}, TypeError, "unexpected keyword argument 'steps'"),
    ],
    ids=[
        "period_0",
        "period_2.5",
        "warmup_steps",
        "exchange",
        "feedback_of_weights",
        "error_feedback",
        "grid",
        "buffers_of",
        "unknown",
    ],
)
def test_bad_arguments_are_refused(rank, world_size, arguments, options, error, match):
    with pytest.raises(error, match=match):
        qcomm.CompressedModelAverager(*arguments, **options)


def with_exchange(good, **changes):
    return {**good, "exchanges": [{**good["exchanges"][0], **changes}]}


def with_anchor(good, value):
    residuals = {**averager().state_dict()["exchanges"][0]["error_feedback"], **value.pop("residuals", {})}
    anchor = {"x": torch.zeros(3), **value}
    return with_exchange(good, identity="abc", anchor=anchor, world_size=2, error_feedback=residuals)


# What damages the state of an averager, and the error that names it.
DAMAGES = {
    "nothing": (lambda good: {}, "must be a result of state_dict.., with a key such as"),
    "no ranks": (lambda good: [], "must hold the state of at least one rank"),
    "format": (lambda good: {**good, "format": 1}, "must be of format 2, .*, got 1"),
    "step": (lambda good: {**good, "step": -1}, "step must be an int >= 0, got -1"),
    "a flag for a step": (lambda good: {**good, "step": False}, "step must be an int >= 0, got False"),
    "two steps": (lambda good: [good, {**good, "step": 3}], r"must be of one step on all ranks, got \[0, 3\]"),
    "no exchanges": (lambda good: {**good, "exchanges": []}, "must hold 1 exchanges"),
    "empty exchange": (
        lambda good: {**good, "exchanges": [{}]},
        "needs identity, anchor, world_size and error_feedback",
    ),
    "anchor": (lambda good: with_exchange(good, anchor={"x": 3}), "last common weights"),
    "anchor of integers": (lambda good: with_anchor(good, {"y": torch.ones(2, dtype=int)}), "got torch.int64 for 'y'"),
    "anchor with a NaN": (
        lambda good: with_anchor(good, {"y": torch.tensor([1.0, torch.nan])}),
        "anchor of 'y' has 1 of 2 values that are not finite",
    ),
    "identity": (lambda good: with_exchange(good, identity="abc"), "'abc' does not fit an anchor of 0 tensors"),
    "world size": (lambda good: with_exchange(good, world_size=0), "world_size must be a positive number of ranks"),
    "residuals of another size": (
        lambda good: with_anchor(good, {"residuals": {"world_size": 2, "local": {"x": torch.zeros(5)}}}),
        "residual of 'x' has 5 elements, the model's parameter 3",
    ),
}


@world(2)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_states_are_refused(rank, world_size, damage):
    one = averager()
    make, match = DAMAGES[damage]
    with pytest.raises(ValueError, match=match):
        one.load_state_dict(make(one.state_dict()))


def test_without_a_process_group_it_says_so():
    with pytest.raises(RuntimeError, match=r"torch.distributed is not initialised"):
        qcomm.CompressedModelAverager(1)
