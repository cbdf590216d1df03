"""Filters: the exact fraction, ties, and what is not finite."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcomm import KFilter, LossFilter


@given(
    losses=st.lists(st.integers(0, 5).map(float), min_size=1, max_size=60),
    percent=st.integers(0, 99),
)
def test_exactly_the_lowest_are_dropped_and_the_earlier_ones_of_equal_losses(losses, percent):
    kept = LossFilter(percent / 100).kept(torch.tensor(losses), epoch=0).tolist()
    order = sorted(range(len(losses)), key=lambda place: (losses[place], place))
    assert kept == sorted(order[percent * len(losses) // 100 :]) and kept


@pytest.mark.parametrize(
    ("fraction", "count", "dropped"), [(0.29, 100, 29), (0.1, 30, 3), (0.57, 100, 57), (0.999, 1, 0)]
)
def test_a_fraction_is_the_number_that_was_written(fraction, count, dropped):
    assert len(LossFilter(fraction).kept(torch.rand(count), epoch=0)) == count - dropped


def test_a_loss_that_is_not_a_number_stays():
    losses = torch.tensor([1.0, float("nan"), 2.0, float("inf")])
    assert LossFilter(0.5).kept(losses, epoch=0).tolist() == [1, 3]
    assert KFilter(k=1).kept(losses, epoch=0).tolist() == [0, 1, 2, 3]


@given(
    losses=st.lists(st.integers(0, 40).map(float), min_size=1, max_size=60),
    k=st.integers(1, 12),
    cap=st.integers(0, 99),
)
def test_the_k_filter_drops_small_losses_up_to_its_cap(losses, k, cap):
    kept = KFilter(k, cap / 100).kept(torch.tensor(losses), epoch=0).tolist()
    order = sorted(range(len(losses)), key=lambda place: (losses[place], place))
    small = sum(loss < sum(losses) / len(losses) / k for loss in losses)
    assert kept == sorted(order[min(small, cap * len(losses) // 100) :]) and kept


@pytest.mark.parametrize("chosen", [LossFilter(0.5, from_epoch=2), KFilter(k=1, from_epoch=2)])
def test_filters_begin_when_they_are_told(chosen):
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert [len(chosen.kept(losses, epoch)) for epoch in (0, 1, 2, 3)] == [4, 4, 2, 2]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: LossFilter(1.0), ValueError, r"fraction must be in \[0, 1\), got 1.0"),
        (lambda: LossFilter(-0.1), ValueError, "fraction must be in"),
        (lambda: LossFilter(float("nan")), ValueError, "fraction must be in"),
        (lambda: LossFilter("0.5"), TypeError, "fraction must be a number, got str"),
        (lambda: LossFilter(0.5, from_epoch=-1), ValueError, "from_epoch must be at least 0, got -1"),
        (lambda: LossFilter(0.5, from_epoch=1.0), TypeError, "from_epoch must be an int, got float"),
        (lambda: KFilter(k=0.5), ValueError, "k must be at least 1 and finite, got 0.5"),
        (lambda: KFilter(k=True), TypeError, "k must be a number, got bool"),
        (lambda: KFilter(cap=1), ValueError, "cap must be in"),
    ],
)
def test_wrong_options(make, error, match):
    with pytest.raises(error, match=match):
        make()
