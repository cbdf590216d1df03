"""Buckets on several channels: under way at once, the same bits on any number of them, errors raised once."""

import threading
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from ddp_model import backward, error_of, wrap
from distributed import TIMEOUT, assert_same_on_all_ranks, attach, world

from qcomm.collectives.two_phase_steps import MeanSteps
from qcomm.communicator import CHANNELS
from qcomm.communicator.pipeline import Pipeline
from qcomm.ddp import reducer as reducer_module

pytestmark = pytest.mark.world


class Watched:
    """The events of a state's buckets, and threads that wait for them."""

    def __init__(self, state):
        self.events, self.changed = [], threading.Condition()
        state.telemetry.observer = self.note

    def note(self, index, event):
        with self.changed:
            self.events.append((index, event))
            self.changed.notify_all()

    def wait(self, *expected):
        with self.changed:
            return self.changed.wait_for(lambda: set(expected) <= set(self.events), TIMEOUT.total_seconds() / 2)


def number_of_buckets(model):
    return len(model.reducer._get_zeros_like_grad_buckets())


@world(2, seconds=TIMEOUT.total_seconds())
def test_a_bucket_does_not_wait_for_the_messages_of_the_one_before_it(rank, world_size):
    model = wrap()
    state = attach(model, min_elements=100, strategy="two_phase")
    for step in range(2):
        backward(model, rank, step)
    watched, receive, held = Watched(state), Pipeline.receive, []

    def late(self, *arguments):
        """The first bucket's values are taken when the buckets behind it are there."""
        if threading.current_thread() is first:
            held.append(watched.wait((1, "done"), (2, "done"), (3, "done")))
        return receive(self, *arguments)

    group = state.process_group or torch.distributed.group.WORLD
    first = reducer_module.connect(group, False)._thread
    with mock.patch.object(Pipeline, "receive", late) if rank == 1 else nullcontext():
        got = backward(model, rank, 3)
    assert all(held) and len(held) == 2 * (rank == 1) * -(-number_of_buckets(model) // CHANNELS), held
    assert_same_on_all_ranks(*got)


@world(3)
@pytest.mark.parametrize("strategy", ["two_phase", "all_gather", "exact_sum"])
def test_the_number_of_channels_does_not_change_a_bit(rank, world_size, strategy):
    results = []
    for channels in (1, 3, CHANNELS):
        model = wrap()
        with mock.patch.object(reducer_module, "CHANNELS", channels):
            attach(model, min_elements=100, strategy=strategy)
            results.append([gradient for step in range(4) for gradient in backward(model, rank, step)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@world(3)
@pytest.mark.parametrize("index", [0, 1, 3])
def test_backward_returns_when_nothing_writes_to_gradients_any_more(rank, world_size, index):
    """A bucket fails while others are on their way, on other channels."""
    model = wrap()
    state = attach(model, min_elements=100, strategy="two_phase")
    for step in range(2):
        backward(model, rank, step)
    watched, encode = Watched(state), MeanSteps.encode

    def fail(self, number):
        if self._task.index == index:
            raise ZeroDivisionError("boom")
        return encode(self, number)

    with mock.patch.object(MeanSteps, "encode", fail) if rank == 1 else nullcontext():
        error = error_of(model, rank)
    after = len(watched.events)
    assert f"bucket {index} was not averaged" in str(error) and "rank 1 failed while compressing its values" in str(
        error
    ), error
    for _ in range(2):
        assert error_of(model, rank) is None
    begun = [number for number, event in watched.events[:after] if event == "encode"]
    assert index in begun or rank == 1
    assert_same_on_all_ranks(*[p.grad for p in model.parameters()])


@world(2)
def test_auto_deals_buckets_that_it_compresses(rank, world_size):
    """Where all ranks have settled, without an agreement in between; the clock runs on the first channel."""
    model = wrap()
    with (
        mock.patch("qcomm.collectives.strategies.automatic_strategies", return_value=("two_phase",)),
        mock.patch("qcomm.collectives.tuner.WARM_UP", 1),
    ):
        state = attach(model, min_elements=100)
        used = []
        connect = reducer_module.connect

        def note(group, alone, secret, channel, channels):
            used.append(channel)
            return connect(group, alone, secret, channel, channels)

        with mock.patch.object(reducer_module, "connect", note):
            for step in range(45):
                used.clear()
                backward(model, rank, step)
                if step == 0:
                    assert set(used) == {0}
                if step == 40:
                    first_dealt = list(used)
            assert_same_on_all_ranks(*[p.grad for p in model.parameters()])
    assert set(state.stats()["strategies"].values()) == {"two_phase"}
    assert first_dealt == [index % CHANNELS for index in range(number_of_buckets(model))]


@world(2)
def test_a_fault_after_the_last_message_is_told_on_whatever_channel_comes_next(rank, world_size):
    """The ranks may go on uncompressed, on the first channel alone."""
    model = wrap()
    state = attach(model, min_elements=100, strategy="two_phase")
    for step in range(2):
        backward(model, rank, step)
    last, decode = number_of_buckets(model) - 1, MeanSteps.decode

    def fail(self, number, means):
        if self._task.index == last:
            raise ZeroDivisionError("boom")
        return decode(self, number, means)

    with mock.patch.object(MeanSteps, "decode", fail) if rank == 1 else nullcontext():
        error = error_of(model, rank)
    assert (error is not None) == (rank == 1)
    state.reconfigure(strategy="none")
    error = str(error_of(model, rank))
    assert "rank 1 failed while decoding the result: ZeroDivisionError: boom" in error, error
    for _ in range(2):
        assert error_of(model, rank) is None
