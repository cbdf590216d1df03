"""Cutting a flat buffer into one chunk a rank."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import specs

from qcomm.collectives.layout import BucketLayout, TensorSpec, cut_points, merge_small
from qcomm.collectives.packing import gather_runs, scatter_chunk


@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 1000, 1_000_003])
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 64])
def test_parts_are_nearly_equal_and_aligned(count, parts):
    points = cut_points(count, parts)
    assert points[0] == 0 and points[-1] == count and len(points) == parts + 1
    assert all(point % 32 == 0 for point in points[:-1] if point != count)
    sizes = [b - a for a, b in pairwise(points)]
    assert min(sizes) >= 0 and max(sizes) - min(sizes) <= 63


@given(st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=12), st.integers(1, 7))
def test_every_element_is_in_one_chunk(sizes, world_size):
    tensors = specs(sizes)
    layout = BucketLayout(tensors, world_size)
    total = sum(t.numel for t in tensors)
    covered = torch.zeros(total, dtype=torch.int64)
    for chunk in layout.chunks:
        assert chunk.count == chunk.compressed_count + chunk.raw_count
        assert len({piece.tensor for piece in chunk.pieces}) == len(chunk.pieces)
        for piece in chunk.pieces:
            tensor = layout.tensors[piece.tensor]
            assert tensor.compressed and piece.length > 0
            assert piece.offset == tensor.offset + piece.start and piece.start + piece.length <= tensor.numel
            covered[piece.offset : piece.offset + piece.length] += 1
        for offset, length in chunk.raw_runs:
            covered[offset : offset + length] += 1
    assert torch.equal(covered, torch.ones(total, dtype=torch.int64))
    assert layout.elements == total
    assert layout.compressed_elements == sum(t.numel for t in tensors if t.compressed)


@given(st.lists(st.tuples(st.integers(0, 300), st.booleans()), max_size=12), st.integers(1, 7), st.integers(1, 3))
def test_a_merged_tensor_lies_in_runs(sizes, world_size, parts):
    """Its elements come in the order of its members, and each parameter's own part is that of the chunk."""
    apart = specs(sizes)
    layout = BucketLayout(merge_small(apart, lambda tensor: 0 < tensor.numel < 100), world_size)
    small = [tensor for tensor in apart if 0 < tensor.numel < 100]
    assert sorted(p.key for p in layout.parameters) == sorted(t.key for t in apart)
    assert sum(bool(tensor.members) for tensor in layout.tensors) == bool(small)
    buffer, covered = torch.arange(layout.elements), torch.zeros(layout.elements, dtype=torch.int64)
    owners = {tensor.key: torch.zeros(tensor.numel, dtype=torch.int64) for tensor in apart}
    for rank in range(world_size):
        for key, (start, length) in layout.owned_parts[rank].items():
            owners[key][start : start + length] += 1
    for tensor in apart:
        assert torch.equal(owners[tensor.key] == 1, torch.full((tensor.numel,), tensor.compressed or tensor in small))
    for part in layout.slices(parts):
        for chunk in part:
            for piece in chunk.pieces:
                tensor = layout.tensors[piece.tensor]
                whole = gather_runs(buffer, tensor.runs)
                values = gather_runs(buffer, piece.runs)
                assert torch.equal(values, whole[piece.start : piece.start + piece.length])
                assert [length for _, _, length in tensor.parts(piece.start, piece.length)] != []
            for offset, length in chunk.places:
                covered[offset : offset + length] += 1
    assert torch.equal(covered, torch.ones_like(covered))
    if small:
        members = torch.cat([buffer[t.offset : t.offset + t.numel] for t in small])
        assert torch.equal(gather_runs(buffer, layout.tensors[-1].runs), members)


def test_raw_neighbours_become_one_run():
    layout = BucketLayout(specs([(10, False), (20, False), (100, True), (5, False), (3, False)]), 1)
    assert layout.chunks[0].raw_runs == ((0, 30), (130, 8))


def test_few_raw_elements_are_in_the_first_part():
    def raw_counts(raw):
        layout = BucketLayout(specs([(8000, True), (raw, False), (8000, True)]), 1)
        return [part[0].raw_count for part in layout.slices(4)]

    assert raw_counts(200) == [200, 0, 0, 0] and raw_counts(400) == [96, 96, 96, 112]


def test_gather_and_scatter_are_inverse():
    tensors = specs([(10, False), (5, True), (100, True), (7, False), (5, True), (90, True)])
    layout = BucketLayout(merge_small(tensors, lambda tensor: tensor.numel == 5), 3)
    buffer, copy = torch.randn(217), torch.full((217,), torch.nan)
    for chunk in layout.chunks:
        parts = [gather_runs(buffer, p.runs) for p in chunk.pieces]
        parts += [gather_runs(buffer, chunk.raw_runs)] if chunk.raw_runs else []
        if parts:
            scatter_chunk(torch.cat(parts), chunk, copy)
    assert torch.equal(buffer, copy)


def test_description_tells_layouts_apart():
    base = BucketLayout(specs([(10, False), (100, True)]), 2)
    assert base.description == BucketLayout(specs([(10, False), (100, True)]), 2).description
    for other in ([(10, True), (100, True)], [(100, True), (10, False)], [(10, False), (101, True)]):
        assert base.description != BucketLayout(specs(other), 2).description
    renamed = [TensorSpec("other", 0, 10, False), TensorSpec("t1", 10, 100, True)]
    assert base.description != BucketLayout(renamed, 2).description
    small = [specs([(10, True), (20, True), (100, True)]) for _ in range(2)]
    apart = BucketLayout(small[0], 2)
    merged = [BucketLayout(merge_small(small[1], lambda tensor, n=n: tensor.numel < n), 2) for n in (15, 25)]
    assert len({layout.description for layout in (apart, *merged)}) == 3
