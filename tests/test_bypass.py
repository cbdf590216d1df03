"""Buckets that go past the worker thread: what DDP alone would compute, and all ranks in step whatever happens."""

import copy
import itertools
import pickle
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ddp_model import backward, error_of, mlp, wrap
from distributed import TIMEOUT, assert_same_on_all_ranks, die, gathered, run, run_alone
from test_strategies import all_slow_but
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import qcomm
from qcomm import bypass, chooser, strategies
from qcomm.communicator import get_communicator

pytestmark = pytest.mark.world

AGREED = 2  # before the first bypass: DDP rebuilds its buckets after the first step


def agreements():
    return get_communicator(dist.group.WORLD).agreements


def case_plain(rank, world_size):
    model = wrap()
    other = wrap(copy.deepcopy(model.module))
    other.register_comm_hook(None, allreduce_hook)
    state = qcomm.attach(model, strategy="none")
    inputs = torch.randn(8, 48)
    counts, buckets, sent = [], 0, []
    for _ in range(2 * bypass.BYPASSED + 5):
        before = agreements()
        for each in (model, other):
            each.zero_grad()
            each(inputs).square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert_same_on_all_ranks(*gradients)
        for ours, theirs in zip(gradients, other.parameters(), strict=True):
            assert torch.equal(ours, theirs.grad)
        stats = state.stats()
        counts.append((agreements() - before) / (stats["buckets"] - buckets))
        sent.append(stats["bytes_sent"] - stats["bytes_sent_overhead"])
        buckets = stats["buckets"]
    period = [0] * bypass.BYPASSED
    assert counts[AGREED - 1 :] == ([1, *period] * 3)[: len(counts) - AGREED + 1] and counts[0] == 1
    assert stats["steps"] == len(counts) and stats["elements"] == len(counts) * sum(
        p.numel() for p in mlp().parameters()
    )
    # A step counts as many bytes whether it was agreed on or not.
    steps = {after - before for before, after in itertools.pairwise(sent[2:])}
    assert len(steps) == 1 and stats["wait_seconds"] > 0
    assert set(stats["strategies"].values()) == {"none"}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_gradients_are_those_of_ddp_alone(world_size):
    run(world_size, case_plain)


def case_auto(rank, world_size):
    model = wrap()
    state = qcomm.attach(model)
    with all_slow_but("none", 0.02):
        ways = len(strategies.automatic_ways(next_layout(state, model), 4, 1))
        trials = 2 * ways * chooser.ROUNDS + chooser.WARM_UP
        for _ in range(trials + 2):
            backward(model, rank)
        before = agreements()
        for _ in range(bypass.BYPASSED // 2):
            backward(model, rank)
    assert agreements() == before and set(state.stats()["strategies"].values()) == {"none"}
    # What error feedback kept during the trials has been sent, and nothing was kept since.
    assert state.stats()["residual_norm"] == 0


def next_layout(state, model):
    backward(model, dist.get_rank())
    return next(iter(state._table._layouts.values()))[0]


def test_auto_bypasses_when_it_has_settled():
    run(2, case_auto)


def case_scale(rank, world_size):
    model = wrap()
    scales = iter([1.0, 1.0, 1.0, -1.0 if rank == 1 else 1.0])
    state = qcomm.attach(model, strategy="none", grad_scale=lambda: next(scales, 1.0))
    for _ in range(AGREED + 1):
        assert error_of(model, rank) is None
    # The others do not wait for the rank whose scale is wrong, and hear of it when they next agree.
    error = error_of(model, rank)
    assert (error is not None) == (rank == 1)
    for _ in range(bypass.BYPASSED - 2):
        assert error_of(model, rank) is None
    error = error_of(model, rank)
    assert "rank 1 failed while preparing the exchange: ValueError: grad_scale must be positive" in str(error)
    assert isinstance(state.exception(), qcomm.CollectiveError)
    for _ in range(bypass.BYPASSED + 5):
        assert error_of(model, rank) is None
    assert_same_on_all_ranks(*[parameter.grad for parameter in model.parameters()])


def test_a_fault_of_a_bypassed_step_is_told_later():
    run(3, case_scale)


def case_mixed(rank, world_size):
    """Some buckets are compressed and others bypass; a step in which a compressed one fails does not upset these."""
    model = wrap()
    state = qcomm.attach(model)
    original = strategies.average

    def by_size(task, communicator):
        task.strategy = "none" if task.index == 0 else "two_phase"
        return original(task, communicator)

    with (
        mock.patch("qcomm.ddp_state.average", by_size),
        mock.patch("qcomm.ddp_state.settled", lambda task, _: task.strategy),
    ):
        for step in range(bypass.BYPASSED + 10):
            failing = rank == 1 and step in (7, 20)
            target = "qcomm.mean_steps.encode"
            if failing:
                with mock.patch(target, side_effect=ZeroDivisionError("boom")):
                    error = error_of(model, rank)
            else:
                error = error_of(model, rank)
            assert (error is not None) == (step in (7, 20)), (step, error)
            if error is None:
                assert_same_on_all_ranks(*[parameter.grad for parameter in model.parameters()])
    ways = state.stats()["strategies"]
    assert ways[0] == "none" and set(ways.values()) == {"none", "two_phase"}


def test_buckets_of_both_kinds():
    run(2, case_mixed)


def case_dying(rank, world_size):
    model = wrap()
    state = qcomm.attach(model, strategy="none")
    for _ in range(AGREED + 1):
        backward(model, rank)
    if rank == 1:
        die()
    error = error_of(model, rank)
    assert "was not averaged" in str(error) and isinstance(state.exception(), qcomm.CollectiveError)


def test_a_rank_that_dies_is_an_error_on_the_others():
    run_alone(3, case_dying, dying=(1,), timeout=TIMEOUT)


def case_pickled(rank, world_size):
    model = wrap()
    state = qcomm.attach(model, strategy="none")
    for _ in range(AGREED + 1):
        backward(model, rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied = pickle.loads(pickle.dumps(state))
    again = wrap()
    qcomm.attach(again, state=copied)
    before = agreements()
    backward(again, rank)
    assert agreements() > before  # a new model's first step is agreed on
    assert gathered(copied.stats()["steps"]) == [AGREED + 2] * world_size


def test_a_pickled_state_agrees_again():
    run(2, case_pickled)


def case_groups(rank, world_size):
    assert bypass.can_bypass(dist.group.WORLD)
    with mock.patch.object(dist.ProcessGroup, "_get_backend", side_effect=RuntimeError("no backend for cpu")):
        assert not bypass.can_bypass(dist.group.WORLD)
    with mock.patch.object(dist.ProcessGroup, "_get_backend", return_value=object()):
        assert not bypass.can_bypass(dist.group.WORLD)


def test_only_gloo_is_bypassed_to():
    run(1, case_groups)
