"""Faults of a rank in the exchanges of a sharded model: an error on all ranks, and a next step that works."""

import signal
import sys
import threading
from datetime import timedelta
from unittest import mock

import pytest
import torch
from distributed import die, gathered, world
from sharded_model import (
    attach,
    backward,
    exact_means,
    failing,
    gradients,
    half_a_step,
    inputs,
    local_gradients,
    net,
    shard,
)
from torch.distributed.fsdp import FSDPModule

import qcomm
from qcomm.collectives.reduce_scatter import _ScatterSteps
from qcomm.collectives.two_phase_steps import MeanSteps
from qcomm.fsdp.exchanges import Exchanges

pytestmark = pytest.mark.world

needs_reset = pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"), reason="this torch cannot go on after an error in backward"
)


GATHER = sys.modules["qcomm.collectives.gather_shards"]  # the package has a function of that name


def start(**options):
    model = shard(net())
    return model, attach(model, **options)


def assert_goes_on(model, rank, step=7):
    """A step after the failed one has gradients near the exact ones, on all ranks."""
    model.reset_iter_state()
    model.zero_grad()
    backward(model, rank, step)
    found = gradients(model)
    of_ranks = [local_gradients(other, step) for other in range(2)]
    for name, mean in exact_means(2, step).items():
        assert (found[name] - mean).abs().max() <= half_a_step(of_ranks, 1.0, name), name


@needs_reset
@world(2)
def test_a_rank_that_cannot_encode(rank, world_size):
    model, _ = start(error_feedback=False)
    backward(model, rank)
    told = pytest.raises(qcomm.CollectiveError, match=r"rank 1 failed while compressing its values: .*none left")
    with failing(1, MeanSteps, "encode"), told:
        backward(model, rank, 1)
    assert_goes_on(model, rank)


@needs_reset
@world(2)
@pytest.mark.parametrize("failing_call", [0, 2], ids=["in the first unit", "in the last unit"])
def test_a_rank_that_fails_after_its_last_message(rank, world_size, failing_call):
    """It goes on with NaN, and the next exchange tells all; after the last unit that is the agreement at the end."""
    model, _ = start(error_feedback=False)
    backward(model, rank)
    calls, reduce = [], _ScatterSteps.reduce

    def damaged(self, number, packets):
        calls.append(number)
        if rank == 1 and len(calls) == failing_call + 1:
            packets[0][-1] ^= 255
        return reduce(self, number, packets)

    with (
        mock.patch.object(_ScatterSteps, "reduce", damaged),
        pytest.raises(qcomm.CollectiveError, match=r"rank 1 failed while averaging its chunk: PacketError"),
    ):
        backward(model, rank, 1)
    assert len(calls) == failing_call + 1
    assert_goes_on(model, rank)


@needs_reset
@world(2)
def test_a_rank_that_cannot_decode_weights(rank, world_size):
    model, _ = start(weights=qcomm.RangeGrid())
    backward(model, rank)
    told = pytest.raises(qcomm.CollectiveError, match=r"rank 0 failed while decoding the result: .*none left")
    with failing(0, GATHER, "unpack"), told:
        model(inputs(rank))
    model.reset_iter_state()
    backward(model, rank)


STEPS = [
    (MeanSteps, "begin"),
    (MeanSteps, "encode"),
    (_ScatterSteps, "reduce"),
    (_ScatterSteps, "finish"),
    (GATHER, "_encode"),
    (GATHER, "_decode_row"),
    (Exchanges, "_scatter_task"),
    (Exchanges, "_gather_task"),
]


@needs_reset
@world(2)
def test_every_step_may_fail_in_every_unit(rank, world_size):
    """All ranks raise and name the one that failed, and the next step is as if nothing had been."""
    model, state = start(weights=qcomm.RangeGrid(num_bits=12), error_feedback=False)
    backward(model, rank)
    expected = gradients(model)
    for number, (owner, name) in enumerate(STEPS):
        victim = number % world_size
        for call in range(3):
            step, calls = getattr(owner, name), []

            def fails(*arguments, step=step, calls=calls, call=call, victim=victim):
                calls.append(0)
                if rank == victim and len(calls) == call + 1:
                    raise MemoryError("none left")
                return step(*arguments)

            model.zero_grad()
            with (
                mock.patch.object(owner, name, fails),
                pytest.raises(qcomm.CollectiveError, match=rf"rank {victim} failed .*none left"),
            ):
                backward(model, rank)
            model.reset_iter_state()
        model.zero_grad()
        backward(model, rank)
        found = gradients(model)
        assert all(torch.equal(found[key], gradient) for key, gradient in expected.items()), name
    assert state.stats()["residual_norm"] == 0.0


@needs_reset
@world(2)
def test_a_loss_scale_that_is_none(rank, world_size):
    scale = {"value": 1.0}
    model, state = start(grad_scale=lambda: scale["value"], error_feedback=False)
    backward(model, rank)
    scale["value"] = 0.0 if rank == 1 else 1.0
    with pytest.raises(qcomm.CollectiveError, match=r"rank 1 failed while preparing .*grad_scale must be positive"):
        backward(model, rank, 1)
    scale["value"] = 1.0
    assert_goes_on(model, rank)
    with pytest.raises(ValueError, match="grad_scale must be positive"):
        state.grad_scale = 0.0


@needs_reset
@world(2)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            [{"gradients": qcomm.SigmaGrid(1.0)}, {"gradients": qcomm.SigmaGrid(2.0)}],
            "grid: .* on rank 0, .* on rank 1",
        ),
        ([{"error_feedback": True}, {"error_feedback": False}], "error_feedback: True on rank 0, False on rank 1"),
        ([{"exclude": []}, {"exclude": ["0.*"]}], "exclude: "),
        ([{"min_elements": 20}, {"min_elements": 30}], "min_elements: 20 on rank 0, 30 on rank 1"),
        ([{"weights": qcomm.RangeGrid(num_bits=8)}, {"weights": qcomm.RangeGrid(num_bits=9)}], "grid: "),
    ],
    ids=["grid", "feedback", "exclude", "size", "weights"],
)
def test_ranks_that_are_configured_differently(rank, world_size, options, message):
    model, _ = start(**options[rank])
    with pytest.raises(qcomm.ConfigMismatchError, match=message):
        backward(model, rank)


@world(2)
def test_ranks_that_use_other_parameters(rank, world_size):
    model, _ = start()
    if rank == 1:
        model[0].bias.requires_grad_(False)
    with pytest.raises(qcomm.ConfigMismatchError, match="layout: "):
        backward(model, rank)


@world(2)
def test_gradients_that_no_hook_has_seen(rank, world_size):
    """A gradient that comes by another way than backward is an error that says so, on all ranks."""
    model, _ = start()
    backward(model, rank)
    unit = model._get_fsdp_state()._fsdp_param_groups[0]._reduce_scatter_comm._unit
    with mock.patch.object(unit, "_note"):
        unit._watched.clear()
        model[4].bias.requires_grad_(False)
        unit.parameters[0]._fsdp_param._unsharded_param.grad = None
    comm = model._get_fsdp_state()._fsdp_param_groups[0]._reduce_scatter_comm
    with pytest.raises(qcomm.CollectiveError, match="call the module itself in forward"):
        comm(torch.empty(5), torch.ones(10), unit.group, torch.distributed.ReduceOp.AVG)


@world(2, alone=True, dying=[1], timeout=timedelta(seconds=10))
def test_a_rank_that_is_killed(rank, world_size):
    model, _ = start()
    backward(model, rank)
    if rank == 1:
        with mock.patch.object(MeanSteps, "encode", die):
            backward(model, rank, 1)
    with pytest.raises(qcomm.CollectiveError, match=r"rank\(?s?\)? ?1"):
        backward(model, rank, 1)


@world(2, alone=True)
def test_ctrl_c_while_a_rank_waits(rank, world_size):
    """The rank leaves at once, and the other one gets an error. All of the exchanges are qcomm's."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in background jobs
    model, _ = start(weights=qcomm.RangeGrid())
    backward(model, rank)
    if rank == 0:  # the other one does not begin before this one has left
        waits = threading.Event()
        wait = qcomm.communicator.Ticket.wait

        def noted(ticket, timeout=None):
            waits.set()
            return wait(ticket, timeout)

        def strike():
            waits.wait()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        threading.Thread(target=strike).start()
        with mock.patch.object(qcomm.communicator.Ticket, "wait", noted), pytest.raises(KeyboardInterrupt):
            backward(model, rank, 1)
    gathered(rank)
    if rank == 1:
        with pytest.raises(qcomm.CollectiveError):
            backward(model, rank, 1)


@world(2)
def test_values_that_overflow_only_in_their_sum(rank, world_size):
    model = shard(torch.nn.Sequential(torch.nn.Linear(48, 64, bias=False)), units=())
    attach(model, error_feedback=False)
    model(torch.full((1, 48), 2e38)).sum().backward()
    found = gradients(model)["0.weight"]
    assert found.isfinite().all() and torch.allclose(found, torch.full_like(found, 2e38), rtol=1e-3)
    assert gathered(rank) == [0, 1]
