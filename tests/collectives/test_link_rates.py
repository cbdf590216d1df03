"""Ranks whose links differ: shares of the buffer by what a link carries, and the measurement of links."""

import math
from itertools import pairwise

import pytest
import torch
from ddp_model import backward, exact_mean, wrap
from distributed import all_reduce, assert_same_on_all_ranks, attach, gathered, world
from hypothesis import example, given
from hypothesis import strategies as st
from layouts import specs

import qcomm
from qcomm.collectives.layout import BucketLayout, cut_points
from qcomm.collectives.options import ReduceOptions
from qcomm.collectives.owner_shares import DIFFERENCE, owner_shares

RATES = st.lists(st.floats(0.01, 1000), min_size=3, max_size=9)


def seconds(rates, shares):
    """What each link takes for a buffer of one unit."""
    return [(1 + (len(rates) - 2) * share) / rate for rate, share in zip(rates, shares, strict=True)]


@given(RATES)
@example([100.0, 100.0, 100.0, 20.0])
@example([1000.0, 1.0, 1.0])
def test_shares_reach_the_least_time_that_there_is(rates):
    shares = owner_shares(rates)
    if shares is None:
        assert max(rates) <= DIFFERENCE * min(rates)
        return
    assert min(shares) >= 0 and math.isclose(sum(shares), 1)
    ranks = len(rates)
    # No link carries less than one unit, and all together carry 2 (W - 1).
    bound = max(1 / min(rates), 2 * (ranks - 1) / sum(rates))
    assert max(seconds(rates, shares)) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("rates", [[1e308, 1e308, 1e308, 2e307], [5e-324, 1.0, 1.0], [5e-324, 1e308, 1e308]], ids=str)
def test_shares_of_extreme_rates(rates):
    assert owner_shares(rates) == pytest.approx([*[1 / 3] * 3, 0] if len(rates) == 4 else [0, 0.5, 0.5])


@given(RATES, st.permutations(range(3)))
def test_a_rank_s_share_does_not_depend_on_its_number(rates, order):
    rates = rates[:3]
    shares, moved = owner_shares(rates), owner_shares([rates[rank] for rank in order])
    if shares is not None:
        assert [shares[rank] for rank in order] == pytest.approx(moved, abs=1e-12)


@given(st.integers(0, 5000), RATES)
def test_cuts_follow_shares(count, rates):
    shares = owner_shares(rates) or [1 / len(rates)] * len(rates)
    points = cut_points(count, len(rates), shares)
    assert points[0] == 0 and points[-1] == count and points == sorted(points)
    assert all(point % 32 == 0 for point in points if point != count)
    for (begin, end), share in zip(pairwise(points), shares, strict=True):
        assert abs(end - begin - share * count) <= 64
        assert share or begin == end


@given(st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=8), RATES)
def test_every_element_has_one_owner(sizes, rates):
    layout = BucketLayout(specs(sizes), len(rates), shares=owner_shares(rates))
    owners = torch.zeros(layout.elements, dtype=torch.int64)
    for chunk in layout.chunks:
        for offset, length in chunk.places:
            owners[offset : offset + length] += 1
    assert torch.equal(owners, torch.ones_like(owners))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"link_rates": 5}, TypeError, "link_rates must be a sequence of numbers or None, got int"),
        ({"link_rates": "fast"}, TypeError, "link_rates must be a sequence of numbers or None, got str"),
        ({"link_rates": [1, True]}, TypeError, "link_rates must be numbers, got bool for rank 1"),
        ({"link_rates": [0.0, 1]}, ValueError, "positive and finite, got 0.0 for rank 0"),
        ({"link_rates": [1, math.nan]}, ValueError, "positive and finite, got nan for rank 1"),
        ({"link_rates": [1, math.inf]}, ValueError, "positive and finite, got inf for rank 1"),
        ({"link_rates": [1, 10**400]}, ValueError, "positive and finite, got 1000"),
        ({"link_rates": [1, 2], "strategy": "hierarchical"}, ValueError, "None with strategy 'hierarchical'"),
        ({"link_rates": [1, 2], "device_codec": True}, ValueError, "None with device_codec"),
    ],
)
def test_rates_that_cannot_be(options, error, text):
    with pytest.raises(error, match=text):
        ReduceOptions(**options)


def test_rates_of_another_number_of_ranks():
    with pytest.raises(ValueError, match="link_rates must be of 3 ranks, got 2"):
        ReduceOptions(link_rates=[1, 2]).for_world(3)


@world(2, 3, 4)
@pytest.mark.parametrize("strategy", ["two_phase", "exact_sum", "all_gather", "none"])
def test_the_mean_is_as_near_as_with_equal_shares(rank, world_size, strategy):
    x = torch.randn(20_001, generator=torch.Generator().manual_seed(rank))
    mean = sum(gathered(x)) / world_size
    rates = [100.0] * (world_size - 1) + [20.0]
    tensor = x.clone()
    work = all_reduce(tensor, strategy=strategy, link_rates=rates, async_op=True)
    work.wait()
    assert_same_on_all_ranks(tensor)
    assert float((tensor - mean).abs().max()) <= 1.1  # half a step of the values, and half of the mean's
    sent = [int(each) for each in gathered(torch.tensor([float(work.stats()["bytes_sent"])]))]
    if strategy == "two_phase" and world_size > 2:
        # A rank that owns nothing sends its values; the others send their means to all as well.
        equal = x.clone()
        usual = all_reduce(equal, strategy=strategy, async_op=True)
        usual.wait()
        own_share = 1 / (world_size - 1)
        wanted = (1 + (world_size - 2) * own_share) / (2 - 2 / world_size)
        usual_sent = usual.stats()["bytes_sent"]
        assert sent[-1] < 0.85 * usual_sent
        assert all(abs(each / usual_sent - wanted) < 0.15 for each in sent[:-1])


@world(3)
def test_residuals_follow_their_owners(rank, world_size):
    """Shares change while training goes on, and no gradient is lost."""
    model = wrap()
    state = attach(model, strategy="two_phase", min_elements=100)
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for number, rates in enumerate([None, [5, 5, 1], [5, 5, 1], [1, 9, 2], None, None]):
        state.reconfigure(link_rates=rates, strategy="none" if number == 5 else "two_phase")
        got = backward(model, rank, number)
        for total, g, wanted in zip(sums, got, exact_mean(rank, world_size, number), strict=True):
            total.add_(g.double() - wanted)
        assert number == 5 or max(float(total.abs().max()) for total in sums) > 1e-3
    assert max(float(total.abs().max()) for total in sums) < 1e-4
    assert_same_on_all_ranks(*[p.grad for p in model.parameters()])


@world(2)
def test_ranks_that_take_other_rates(rank, world_size):
    with pytest.raises(qcomm.ConfigMismatchError, match="link_rates"):
        all_reduce(torch.zeros(5000), strategy="two_phase", link_rates=[1, 2 + rank])


@world(2, 3, 4)
def test_links_are_measured(rank, world_size):
    rates = qcomm.measure_link_rates()
    assert len(rates) == world_size and all(0 < rate < math.inf for rate in rates)
    assert_same_on_all_ranks(torch.tensor(rates))
    all_reduce(torch.ones(5000), strategy="two_phase", link_rates=rates)


@world(2)
def test_a_measurement_beside_another_operation(rank, world_size):
    other = qcomm.measure_link_rates if rank == 0 else lambda: all_reduce(torch.zeros(5000), strategy="two_phase")
    with pytest.raises(qcomm.ConfigMismatchError, match="measure_link_rates"):
        other()
