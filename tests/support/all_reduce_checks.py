"""One all-reduce: a check that it works on all ranks, and the error that it raises."""

import torch
from distributed import all_reduce, assert_same_on_all_ranks

import qcomm


def check_works(rank, world_size, group=None):
    tensor = torch.randn(5000, generator=torch.Generator().manual_seed(rank))
    all_reduce(tensor, group=group)
    assert tensor.isfinite().all()
    if group is None:
        assert_same_on_all_ranks(tensor)


def attempt(**options):
    """Returns the error of one all_reduce, or None."""
    try:
        all_reduce(torch.randn(5000), **options)
    except (qcomm.CollectiveError, qcomm.ConfigMismatchError) as error:
        return error
    return None
