"""Means that differ between ranks: named with bucket, step and ranks, no later than ``verify`` says."""

import itertools
import re
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from all_reduce_checks import attempt, check_works
from ddp_model import AGREED, backward, wrap
from distributed import all_reduce, world

import qcomm
from qcomm.collectives import BYPASSED
from qcomm.collectives.rounds import Rounds
from qcomm.collectives.uncompressed_values import UncompressedValues, fingerprint
from qcomm.communicator.groups import CHANNELS, get_communicator

pytestmark = pytest.mark.world


def flip(tensor):
    """The lowest bit of the first value."""
    tensor.view(torch.uint8)[0] ^= 1


@contextmanager
def damaged(number):
    """Flips a bit in one of this rank's means, the ``number``-th, as damaged memory or a network would.

    It flips before anything else happens to the mean.
    """
    bypassed, agreed, counted = UncompressedValues.fingerprint, Rounds.note_mean, itertools.count(1)

    def of_bypassed(self, buffer):
        if next(counted) == number:
            flip(buffer if self._rounded is None else self._rounded)
        return bypassed(self, buffer)

    def of_agreed(self):
        if next(counted) == number:
            flip(self.task.buffer)
        agreed(self)

    with (
        mock.patch.object(UncompressedValues, "fingerprint", of_bypassed),
        mock.patch.object(Rounds, "note_mean", of_agreed),
    ):
        yield


def train_until_error(model, state, rank, first, most, wrong_rank):
    """Damages the second mean of step ``first`` on one rank; returns the step whose backward raises, and the error."""
    for step in range(first, first + most):
        try:
            with damaged(2) if step == first and rank == wrong_rank else nullcontext():
                backward(model, rank, step)
        except RuntimeError:
            return step, state.exception()
    return None, None


@world(2, 3)
@pytest.mark.parametrize("since", [0, 1, 4])
@pytest.mark.parametrize("strategy", ["none", "bf16"])
def test_a_bypassed_mean_that_differs_is_named_at_the_next_agreement(rank, world_size, strategy, since):
    model = wrap()
    state = qcomm.attach(model, strategy=strategy, min_elements=0)
    first = AGREED + since
    for step in range(first):
        backward(model, rank, step)
    step, error = train_until_error(model, state, rank, first, BYPASSED + 2, wrong_rank=1)
    assert isinstance(error, qcomm.DivergenceError), error
    assert step <= first + BYPASSED + 1
    assert re.search(rf"different means of bucket \d, step {first + 1}:", str(error)), error
    others = "rank 0" if world_size == 2 else "ranks 0 2"
    assert f"on {others}" in str(error) and "on rank 1 (" in str(error)
    # All ranks have left the collective at the same point, and a user who has mended the weights goes on.
    for again in range(step + 1, step + 2 * BYPASSED + 2):
        backward(model, rank, again)


@world(4)
@pytest.mark.parametrize("strategy", ["exact_sum", "hierarchical", "none"])
def test_a_mean_that_was_added_on_the_way_is_compared_in_the_next_collective_of_its_channel(rank, world_size, strategy):
    options = {"strategy": strategy} | ({"ranks_per_node": 2} if strategy == "hierarchical" else {})
    tensor = torch.randn(5000)
    with damaged(1) if rank == 3 else nullcontext():
        all_reduce(tensor, **options)
    errors = [attempt(**options) for _ in range(CHANNELS)]  # the last of them is on the same channel
    assert errors[:-1] == [None] * (CHANNELS - 1)
    assert isinstance(errors[-1], qcomm.DivergenceError), errors
    assert "different means of collective" in str(errors[-1]) and "on rank 3 (" in str(errors[-1])
    check_works(rank, world_size)


@world(2)
@pytest.mark.parametrize(
    ("verify", "strategy", "noticed"),
    [
        ("step", "two_phase", True),
        ("step", "none", True),
        ("interval", "two_phase", False),
        ("off", "none", False),
        ("off", "exact_sum", False),
    ],
)
def test_verify_says_what_is_compared(rank, world_size, verify, strategy, noticed):
    model = wrap()
    state = qcomm.attach(model, strategy=strategy, verify=verify, min_elements=0)
    for step in range(AGREED):
        backward(model, rank, step)
    step, error = train_until_error(model, state, rank, AGREED, 2 * BYPASSED, wrong_rank=0)
    assert (error is not None) == noticed
    if noticed:
        assert isinstance(error, qcomm.DivergenceError) and step == AGREED, (step, error)


@world(2)
def test_a_mean_that_one_rank_does_not_tell_of_is_not_compared(rank, world_size):
    communicator = get_communicator(dist.group.WORLD)
    if rank == 0:
        communicator.means.note("a collective of its own", 1)
    check_works(rank, world_size)


@world(2)
def test_more_means_than_a_message_holds_are_cut_alike(rank, world_size):
    communicator = get_communicator(dist.group.WORLD)
    for number in range(1000):
        communicator.means.note(f"bucket {number}, step 123456789", number if number != 999 else rank)
    assert any("different means of bucket 999, step 123456789" in str(attempt()) for _ in range(CHANNELS))
    check_works(rank, world_size)


@world(2)
def test_ranks_compare_the_option(rank, world_size):
    error = attempt(verify=("off", "step")[rank])
    assert "configured differently in verify: off on rank 0, step on rank 1" in str(error), error


def test_a_wrong_value_names_the_option():
    with pytest.raises(ValueError, match=r"verify must be one of \('off', 'interval', 'step'\), got 'always'"):
        qcomm.CompressionState(verify="always")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_fingerprint_changes_with_every_bit(dtype):
    values = torch.randn(11).to(dtype)[1:]  # at an address that is no multiple of 8 bytes
    known, data = fingerprint([values]), values.view(torch.uint8)
    for byte in range(data.numel()):
        for bit in range(8):
            data[byte] ^= 1 << bit
            assert fingerprint([values]) != known
            data[byte] ^= 1 << bit
    assert fingerprint([values]) == known


@world(2)
@pytest.mark.parametrize("strategy", ["none", "bf16", "exact_sum", "hierarchical"])
def test_memory_that_begins_anywhere_is_averaged(rank, world_size, strategy):
    """As a part of a file in memory, whose words of 64 bits have no alignment."""
    options = {"strategy": strategy} | ({"ranks_per_node": 2} if strategy == "hierarchical" else {})
    for offset, first in ((4, 0), (4, 1), (0, 1)):
        tensor = torch.frombuffer(bytearray(24_000), dtype=torch.float32, offset=offset)[first : first + 5000]
        tensor.fill_(rank)
        all_reduce(tensor, **options)
        assert torch.allclose(tensor, torch.full((5000,), 0.5), atol=0.51)


@world(2)
def test_an_error_of_divergence_has_its_own_advice(rank, world_size):
    model = wrap()
    state = qcomm.attach(model, strategy="none", verify="step", min_elements=0)
    for step in range(AGREED):
        backward(model, rank, step)
    with pytest.raises(RuntimeError) as caught, damaged(1) if rank == 0 else nullcontext():
        backward(model, rank, AGREED)
    text = str(caught.value)
    assert "resume from a checkpoint of an earlier step" in text and "the next step can begin" not in text, text
    assert isinstance(state.exception(), qcomm.DivergenceError)
