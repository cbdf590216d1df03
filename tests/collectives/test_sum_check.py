"""Damage to values that are added on their way: found where it is more than rounding may do, and nothing else is."""

import math
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
from all_reduce_checks import attempt, check_works
from distributed import all_reduce, assert_same_on_all_ranks, gathered, world
from hypothesis import given, settings
from hypothesis import strategies as st

import qcomm
from qcomm.collectives import hierarchical
from qcomm.collectives.sum_check import SumCheck, segment_size
from qcomm.transport.gloo import GlooTransport

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Numbers whose sums are rounded up, down, to zero and to infinity.
CORNERS = [
    sign * value for sign in (1, -1) for value in (0.0, 2**-24, 2**-14, 2**-9, 0.1, 1.0, 1.001, 3.3, 5e4, 65504.0)
]
CORNERS += [math.inf, math.nan]


def error_of(call):
    """The error that a call raises, or None."""
    try:
        call()
    except qcomm.CollectiveError as error:
        return error
    return None


def checked_sum(ranks, damage=None):
    """Sums the values of ranks one after another, as a ring does; returns the check, with its totals, and the sum."""
    checks = [SumCheck([values], len(ranks)) for values in ranks]
    if damage is not None:
        damage(ranks[-1])
    total = ranks[0].clone()
    for values in ranks[1:]:
        total += values
    checks[0].totals = torch.stack([check.totals for check in checks]).sum(0)
    return checks[0], total


def rounded_the_same_way(dtype):
    """1, and then numbers that are each rounded up to the next one, all in one direction."""
    eps = torch.finfo(dtype).eps
    return [torch.full((5000,), first, dtype=dtype) for first in (1.0, *[0.51 * eps] * 5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_no_damage(dtype):
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, segment_size(dtype) - 1, segment_size(dtype), segment_size(dtype) + 1, 70_000):
        for scale in (1.0, tiny / 4, largest / 100):
            ranks = [(torch.randn(count, generator=generator) * scale).to(dtype) for _ in range(7)]
            check, total = checked_sum(ranks)
            check.compare([total])
    for ranks in (
        rounded_the_same_way(dtype),
        [torch.full((5000,), largest, dtype=dtype)] * 3,
        [torch.full((5000,), math.inf, dtype=dtype), torch.ones(5000, dtype=dtype)],
        [torch.full((5000,), math.nan, dtype=dtype), torch.ones(5000, dtype=dtype)],
        [torch.full((5000,), largest / 2, dtype=dtype), torch.full((5000,), -largest / 2, dtype=dtype)],
    ):
        check, total = checked_sum(list(ranks))
        check.compare([total])


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.sampled_from(CORNERS), min_size=10, max_size=40),
    world_size=st.integers(2, 5),
    dtype=st.sampled_from(DTYPES),
)
def test_no_values_are_taken_for_damaged(values, world_size, dtype):
    each = len(values) // world_size
    ranks = torch.tensor(values[: each * world_size], dtype=torch.float64).to(dtype).split(each)
    check, total = checked_sum([part.clone() for part in ranks])
    check.compare([total])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("world_size", [2, 5])
def test_what_escapes_is_as_small_as_rounding(dtype, world_size):
    """Every bit of a value is flipped by itself."""
    generator = torch.Generator().manual_seed(1)
    size = segment_size(dtype)
    rounding = (world_size - 1) * torch.finfo(dtype).eps / 2 + 4 * size * 2.0**-53
    found = 0
    for bit in range(8 * dtype.itemsize):
        ranks = [torch.randn(2 * size, generator=generator).to(dtype) for _ in range(world_size)]
        whole = sum(values[size:].double().abs().sum() for values in ranks)
        before = float(ranks[-1][size + 3])

        def flip(values, bit=bit):
            data = values.view(torch.uint8)
            data[(size + 3) * values.element_size() + bit // 8] ^= 1 << bit % 8

        check, total = checked_sum(ranks, flip)
        change = abs(float(ranks[-1][size + 3]) - before)
        error = error_of(lambda check=check, total=total: check.compare([total]))
        found += error is not None
        if error is None:
            assert change <= 2.01 * rounding * float(whole), (bit, change)
        else:
            assert f"values {size} to {2 * size - 1} of a sum were damaged" in str(error)
    assert found >= 1, "at least the highest bit of the exponent is noticed"


def flip(buffer, bit):
    """A bit of the second value, counted from the highest."""
    size = buffer.element_size()
    place = 8 * size - 1 - bit
    buffer.view(torch.uint8)[size + place // 8] ^= 1 << place % 8


@contextmanager
def damaged(bit):
    """Flips a bit of this rank's values after it has loaded them and before gloo adds them."""
    summing = GlooTransport.sum

    def damaging(self, buffers, what):
        flip(buffers[0], bit)
        summing(self, buffers, what)

    with mock.patch.object(GlooTransport, "sum", damaging):
        yield


@pytest.mark.world
@world(3)
@pytest.mark.parametrize("strategy", ["none", "bf16"])
def test_a_bit_that_flips_before_the_sum(rank, world_size, strategy):
    for bit in (1, 2) if strategy == "none" else (1,):  # of the exponent
        values = torch.randn(5000, generator=torch.Generator().manual_seed(rank))
        with damaged(bit) if rank == 1 else nullcontext():
            error = error_of(lambda values=values: all_reduce(values, strategy=strategy, verify="step"))
        assert isinstance(error, qcomm.CollectiveError) and "of a sum were damaged" in str(error), error
        assert all(f"rank {other} failed" in str(error) for other in range(3)), error
        check_works(rank, world_size)
    # The last bit is within what rounding may do: the mean is as near the exact one as others are.
    values = torch.randn(5000, generator=torch.Generator().manual_seed(rank))
    exact = torch.stack(gathered(values)).double().mean(0)
    with damaged(31 if strategy == "none" else 15) if rank == 1 else nullcontext():
        all_reduce(values, strategy=strategy, verify="step")
    assert_same_on_all_ranks(values)
    assert float((values - exact).abs().max()) < (1e-6 if strategy == "none" else 0.05)


@pytest.mark.world
@world(3)
def test_gloo_rounds_as_the_bound_says(rank, world_size):
    """Over gloo's own sums, whose order is another."""
    for dtype in DTYPES:
        tiny = torch.finfo(dtype).smallest_normal
        generator = torch.Generator().manual_seed(rank)
        for values in (
            torch.randn(9000, generator=generator, dtype=torch.float64),
            torch.full((9000,), 1.0 if rank == 0 else 0.51 * torch.finfo(dtype).eps, dtype=torch.float64),
            torch.randn(9000, generator=generator, dtype=torch.float64) * tiny / 2,
            torch.full((9000,), torch.finfo(dtype).max, dtype=torch.float64),
        ):
            tensor = values.to(dtype)
            all_reduce(tensor, strategy="none", verify="step")
            assert_same_on_all_ranks(tensor)


@pytest.mark.world
@world(4)
def test_a_value_inside_a_node_is_damaged_on_its_way(rank, world_size):
    """Its packet has a checksum, whatever ``verify`` is."""
    for step, text in (("_split", "adding and compressing"), ("_decode_slice", "decoding the result")):
        making = getattr(hierarchical, step)

        def altered(*arguments, making=making):
            made = making(*arguments)
            for packet in made if isinstance(made, list) else [made]:
                packet[packet.numel() // 2] ^= 1
            return made

        options = {"strategy": "hierarchical", "ranks_per_node": 2, "verify": "off"}
        with mock.patch.object(hierarchical, step, altered) if rank == 1 else nullcontext():
            errors = [attempt(**options)]
        errors.append(attempt(**options))  # which tells of a fault after the last exchange
        is_last = step == "_decode_slice"  # after which the other node is told in the next collective
        assert [error is not None for error in errors] == [not is_last or rank < 2, is_last], errors
        for error in errors:
            assert error is None or (text in str(error) and "packet of rank 1 of the group" in str(error)), error
        check_works(rank, world_size)
