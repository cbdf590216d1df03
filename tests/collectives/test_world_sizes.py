"""Worlds of 1, 2, 3, 5 and 8 ranks: equal bits on all ranks, within the bound, for the bytes of the formula.

Here two_phase's bytes, in every world, and the strategies among 8 ranks, with few elements; all kinds of data in worlds
of up to 6 are in the strategies' own files.
"""

import pytest
import strategy_cases
import torch
import twin
from distributed import assert_same_on_all_ranks, counting_bytes, gathered, sliced, world
from strategy_twins import HEADER_BYTES, size

import qcomm
from qcomm.codec.packet import Segment
from qcomm.codec.quantize import Quantizer
from qcomm.collectives import ReduceOptions
from qcomm.collectives.layout import BucketLayout, TensorSpec
from qcomm.collectives.two_phase_schedule import cut_slices
from qcomm.communicator.pipeline import HEADER_BYTES as MESSAGE_HEADER_BYTES

pytestmark = pytest.mark.world

GRIDS = [qcomm.SigmaGrid(step=1.0), qcomm.RangeGrid(c=2)]
SLICE_ELEMENTS = 500


def packets_of_formula(buffers, layout, grid, slices):
    """Sizes of two_phase's packets of one tensor: (of rank's values of owner's chunk, of owner's mean), all slices."""
    world_size = len(buffers)
    quantizers = [twin.quantizer_for(x, grid) for x in buffers]
    values, means = torch.zeros(world_size, world_size, dtype=torch.int64), [0] * world_size
    codes = {}
    for part in slices:
        for owner, chunk in enumerate(part):
            for piece in chunk.pieces:
                place = slice(piece.offset, piece.offset + piece.length)
                for rank, x in enumerate(buffers):
                    values[rank, owner] += 0 if rank == owner else size([Segment(x[place], quantizers[rank])])
                sent = [Quantizer.raw() if rank == owner else q for rank, q in enumerate(quantizers)]
                mean = twin.sum_in_order([twin.lossy(x[place], q) for x, q in zip(buffers, sent, strict=True)])
                quantizer = twin.quantizer_for(mean, ReduceOptions(grid).mean_grid, codes.get(owner))
                codes[owner] = quantizer.coding, quantizer.table
                if isinstance(grid, qcomm.RangeGrid):
                    codes.clear()
                means[owner] += size([Segment(mean, quantizer)])
    return values, means


@world(2, 3, 5, 8)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_two_phase_sends_the_bytes_of_the_formula(rank, world_size, grid):
    for count in (5000, 9999):
        buffers = [strategy_cases.values("heavy", count, seed) for seed in range(world_size)]
        layout = BucketLayout([TensorSpec("tensor", 0, count, True)], world_size)
        slices = cut_slices(layout, SLICE_ELEMENTS)
        values, means = packets_of_formula(buffers, layout, grid, slices)
        expected, bound = twin.mean(buffers, layout, grid, len(slices))
        tensor, others = buffers[rank].clone(), world_size - 1
        with sliced(SLICE_ELEMENTS), counting_bytes() as counting:
            work = qcomm.all_reduce(tensor, grid, strategy="two_phase", async_op=True)
            work.wait()
        assert torch.equal(tensor, expected)
        assert_same_on_all_ranks(tensor)
        exact = torch.stack([x.double() for x in buffers]).mean(0)
        assert bool(((tensor - exact).abs() <= bound.double() + twin.rounding(buffers, torch.float32)).all())
        stats = work.stats()
        assert stats["bytes_sent_phase1"] == int(values[rank].sum())
        assert stats["bytes_received_phase1"] == int(values[:, rank].sum())
        assert stats["bytes_sent_phase2"] == others * means[rank]
        assert stats["bytes_received_phase2"] == sum(means) - means[rank]
        overhead = others * (HEADER_BYTES + 2 * len(slices) * MESSAGE_HEADER_BYTES)
        assert (stats["bytes_sent_overhead"], stats["bytes_received_overhead"]) == (overhead, overhead)
        assert (stats["bytes_sent"], stats["bytes_received"]) == (counting.sent, counting.received())
        # No rank carries much more than another.
        sent = gathered(stats["bytes_sent"])
        assert max(sent) <= 1.25 * min(sent)


@world(1)
def test_a_world_of_one_sends_nothing(rank, world_size):
    tensor = strategy_cases.values("heavy", 9999, 0)
    work = qcomm.all_reduce(tensor, strategy="two_phase", async_op=True)
    work.wait()
    stats = work.stats()
    assert stats["bytes_sent"] == stats["bytes_received"] == 0 and stats["bits_per_element_phase2"] > 0


@world(8)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("all_gather", {}),
        ("exact_sum", {}),
        ("hierarchical", {"ranks_per_node": 2}),
        ("hierarchical", {"ranks_per_node": 4}),
    ],
)
def test_eight_ranks(rank, world_size, strategy, grid, options):
    for count in (0, 1, 7, 8, 9, 257, 4097):
        inputs = [strategy_cases.values("gauss", count, seed) for seed in range(world_size)]
        strategy_cases.check(rank, strategy, grid, inputs, **options)
    inputs = [strategy_cases.values("heavy", 3000, seed, torch.bfloat16) for seed in range(world_size)]
    strategy_cases.check(rank, strategy, grid, inputs, **options)
