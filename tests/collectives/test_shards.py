"""Layouts of sharded buffers, against what torch's own FSDP puts into them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcomm.collectives import ShardedTensor, shard_layout, shard_lengths

SHAPES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5)


def rows_of(tensors, world_size):
    """The buffer that torch makes of tensors, its padding set to -1."""
    padded = [torch.nn.functional.pad(t.flatten(), (0, missing(t, world_size)), value=-1.0) for t in tensors]
    return torch.cat([part.view(world_size, -1) for part in padded], dim=1).flatten()


def missing(tensor, world_size):
    rows = -(-tensor.shape[0] // world_size) * world_size
    return (rows - tensor.shape[0]) * tensor[0].numel()


def layout_of(tensors, world_size, compressed):
    sharded = []
    for number, tensor in enumerate(tensors):
        lengths, padded = shard_lengths(tensor.shape[0], tensor[0].numel(), world_size)
        sharded.append(ShardedTensor(str(number), lengths, padded, compressed(number)))
    return shard_layout(sharded, world_size)


@given(SHAPES, st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_element_has_its_place_and_no_padding_has_one(shapes, world_size, all_compressed):
    values = iter(range(10**6))
    tensors = [torch.tensor([float(next(values)) for _ in range(torch.Size(s).numel())]).view(s) for s in shapes]
    layout = layout_of(tensors, world_size, lambda number: all_compressed or number % 2 == 0)
    buffer = rows_of(tensors, world_size)
    for spec, tensor in zip(layout.tensors, tensors, strict=True):
        taken = torch.cat([buffer[offset : offset + length] for offset, length in spec.runs])
        assert torch.equal(taken, tensor.flatten())
    places = [place for chunk in layout.chunks for place in chunk.places]
    found = sorted(float(value) for offset, length in places for value in buffer[offset : offset + length])
    assert found == sorted(torch.cat([t.flatten() for t in tensors]).tolist())
    row = buffer.numel() // world_size
    for rank, chunk in enumerate(layout.chunks):
        assert all(rank * row <= offset and offset + length <= (rank + 1) * row for offset, length in chunk.places)
        for piece in chunk.pieces:
            whole = tensors[piece.tensor].flatten()
            assert torch.equal(buffer[piece.offset : piece.offset + piece.length], whole[piece.start :][: piece.length])


@pytest.mark.parametrize("shapes", [[(5, 3), (1, 7), (8,)], [(2,)]])
def test_buffers_are_those_of_torch(shapes):
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives  # noqa: F401 - defines the operation

    tensors = [torch.arange(1.0, torch.Size(shape).numel() + 1).view(shape) for shape in shapes]
    for world_size in (2, 4):
        expected = rows_of(tensors, world_size)
        made = torch.empty(world_size, expected.numel() // world_size)
        torch.ops.fsdp.chunk_cat(tensors, 0, world_size, out=made)
        assert torch.equal(made.flatten(), expected.clamp(min=0.0))


def test_layouts_that_differ_in_shards_alone_are_told_apart():
    def described(lengths, padded):
        return shard_layout([ShardedTensor("weight", lengths, padded, True)], 2).description

    assert len({described((6, 2), 6), described((4, 4), 4), described((4, 4), 5)}) == 3
