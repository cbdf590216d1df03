"""hierarchical: uncompressed inside a node, compressed between nodes, on every grid of a x b ranks."""

import os
from contextlib import nullcontext
from unittest import mock

import pytest
import strategy_cases
import torch
import torch.distributed as dist
from ddp_model import backward, error_of, wrap
from distributed import TIMEOUT, assert_same_on_all_ranks, die, gathered, world

import qcomm
from qcomm.collectives import hierarchical
from qcomm.transport.base import TransportError

pytestmark = pytest.mark.world


# (ranks, ranks of a node); every grid where there are nodes of several ranks, the two kinds elsewhere.
NODES = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (5, 5), (6, 2), (6, 3)]


@world()
@pytest.mark.parametrize(
    ("world_size", "ranks_per_node", "grid"),
    [
        (world_size, ranks_per_node, grid)
        for world_size, ranks_per_node in NODES
        for grid in (strategy_cases.GRIDS if world_size == 4 else strategy_cases.GRIDS[::3])
    ],
    ids=str,
)
def test_equals_twin_within_the_bound_for_the_bytes_of_the_formula(rank, world_size, ranks_per_node, grid):
    strategy_cases.check_kinds(rank, world_size, "hierarchical", grid, ranks_per_node=ranks_per_node)


@world(4)
def test_a_flat_exchange_sends_twice_as_much_between_nodes_of_two(rank, world_size):
    """Over the links between nodes goes half of what two_phase sends there."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(rank))
    stats = {}
    for strategy in ("two_phase", "hierarchical"):
        work = qcomm.all_reduce(x.clone(), strategy=strategy, ranks_per_node=2, async_op=True)
        work.wait()
        stats[strategy] = work.stats()
    # Of W - 1 = 3 peers of a flat exchange two are on the other node.
    flat = (stats["two_phase"]["bytes_sent_phase1"] + stats["two_phase"]["bytes_sent_phase2"]) * 2 / 3
    ours = stats["hierarchical"]["bytes_sent_phase1"] + stats["hierarchical"]["bytes_sent_phase2"]
    assert 0.47 < ours / flat < 0.53
    assert stats["hierarchical"]["bytes_sent_inside"] == pytest.approx(200_000 // 2 * 8, rel=1e-3)
    assert stats["hierarchical"]["bits_per_element"] == pytest.approx(stats["two_phase"]["bits_per_element"], rel=0.05)


@world(3)
def test_on_one_node_nothing_is_lost(rank, world_size):
    inputs = [strategy_cases.values("heavy", 5000, seed) for seed in range(world_size)]
    tensor = inputs[rank].clone()
    qcomm.all_reduce(tensor, strategy="hierarchical", ranks_per_node=world_size)
    total = inputs[0].clone()
    for x in inputs[1:]:
        total += x
    assert torch.equal(tensor, total / world_size)


@world(4)
def test_faults_and_mismatches_reach_all_ranks(rank, world_size):
    steps = {
        "_split": "preparing the exchange",
        "_encode_sums": "adding and compressing its node's values",
        "choose": "adding and compressing its node's values",
        "_reduce_chunk": "averaging its chunk",
        "_decode_slice": "decoding the result",
    }
    strategy_cases.check_faults(rank, world_size, "hierarchical", hierarchical, steps, last="_join", ranks_per_node=2)
    error = strategy_cases.error_of("hierarchical", ranks_per_node=1 if rank == 1 else 2)
    assert isinstance(error, qcomm.ConfigMismatchError), error
    assert "ranks_per_node: 2 on ranks 0 2 3, 1 on rank 1" in str(error), error
    strategy_cases.check_works(rank, world_size, "hierarchical", ranks_per_node=2)


@world(4)
def test_bytes_that_make_no_sense_are_refused(rank, world_size):
    def lie(name, size, match):
        parts = [torch.zeros(size, dtype=torch.uint8)] * 2
        strategy_cases.check_lie(rank, world_size, "hierarchical", hierarchical, name, parts, match, ranks_per_node=2)

    lie("_split", 100, "packet of rank 1 of the group")
    lie("_split", 10**7, "rank 1 announced a packet of 10000000 bytes")
    lie("_encode_sums", 100, "packet of rank 1 of the group")
    # In the last exchange a lie concerns the own node alone; the other one learns of it in the next collective.
    group, parts = dist.new_group(), torch.zeros(10**7, dtype=torch.uint8)
    with mock.patch.object(hierarchical, "_decode_slice", return_value=parts) if rank == 1 else nullcontext():
        error = strategy_cases.error_of("hierarchical", group=group, ranks_per_node=2)
    if rank == 0:
        assert isinstance(error, TransportError) and "rank 1 announced a packet of 10000000 bytes" in str(error), error
    assert (error is None) == (rank > 1)
    error = strategy_cases.error_of("hierarchical", group=group, ranks_per_node=2)
    assert isinstance(error, qcomm.CollectiveError), error


@world(4, alone=True, dying=(1,), seconds=TIMEOUT.total_seconds() / 2)
@pytest.mark.parametrize("step", ["_encode_sums", "_decode_slice"])
def test_a_killed_rank_is_an_error_on_the_others(rank, world_size, step):
    strategy_cases.check_works(rank, world_size, "hierarchical", ranks_per_node=2)
    if rank == 1:
        mock.patch.object(hierarchical, step, side_effect=lambda *_: die()).start()
    error = strategy_cases.error_of("hierarchical", ranks_per_node=2)
    assert isinstance(error, TransportError) and "no answer from rank(s) " in str(error), error


@world(4)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_nonfinite_value_reaches_all_ranks(rank, world_size, poison):
    tensor = strategy_cases.values("gauss", 5000, rank)
    if rank == world_size - 1:
        tensor[4321] = poison
    qcomm.all_reduce(tensor, strategy="hierarchical", ranks_per_node=2)
    assert bool(tensor[4321].isnan()) and 0 < int(tensor.isfinite().sum()) < 5000
    assert_same_on_all_ranks(tensor)


@world(6)
@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (0, ValueError, "ranks_per_node must be at least 1, got 0"),
        (2.0, TypeError, "ranks_per_node must be an int or None, got float"),
        (4, ValueError, "ranks_per_node must divide the number of ranks, 6, got 4"),
    ],
    ids=["0", "2.0", "4"],
)
def test_ranks_per_node_that_cannot_be_are_refused(rank, world_size, given, error, match):
    with pytest.raises(error, match=match):
        qcomm.all_reduce(torch.randn(5000), strategy="hierarchical", ranks_per_node=given)


def test_a_state_refuses_no_ranks_per_node():
    with pytest.raises(ValueError, match="ranks_per_node must be at least 1, got 0"):
        qcomm.CompressionState(ranks_per_node=0)


@world(6)
def test_ranks_per_node_come_from_the_launcher(rank, world_size):
    tensor = torch.randn(5000)
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="3"):
        ours, theirs = tensor.clone(), tensor.clone()
        qcomm.all_reduce(ours, strategy="hierarchical")
        qcomm.all_reduce(theirs, strategy="hierarchical", ranks_per_node=3)
        assert torch.equal(ours, theirs)


@world(6)
@pytest.mark.parametrize("text", ["", "many", "0", "5"])
def test_a_launcher_that_says_nonsense_is_refused(rank, world_size, text):
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=text), pytest.raises(ValueError, match="LOCAL_WORLD_SIZE"):
        qcomm.all_reduce(torch.randn(5000), strategy="hierarchical")


@world(6)
def test_ranks_per_node_in_ddp(rank, world_size):
    """A number that does not fit is an error of every rank at the end of backward."""
    model = wrap()
    qcomm.attach(model, strategy="hierarchical", ranks_per_node=4)
    assert "ranks_per_node must divide the number of ranks, 6, got 4" in str(error_of(model, rank))
    model = wrap()
    state = qcomm.attach(model, strategy="hierarchical", ranks_per_node=3, min_elements=100)
    backward(model, rank)
    assert_same_on_all_ranks(*[p.grad for p in model.parameters()])
    chosen = state.stats()["strategies"]
    assert gathered(chosen) == [chosen] * world_size and set(chosen.values()) == {"hierarchical"}
