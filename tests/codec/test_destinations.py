"""Destinations of encoder and decoder: those that do not fit are refused, and nothing beside them is written."""

import itertools

import pytest
import torch
from data import DTYPES, gaussian, student_t3
from hypothesis import given, settings
from hypothesis import strategies as st

import qcomm
from qcomm import _C
from qcomm.codec import _native
from qcomm.codec._native import measure
from qcomm.codec.packet import Segment, decode_into, encode
from qcomm.codec.quantize import plan
from qcomm.codec.quantizers import Coding, GridKind, Quantizer

VERSIONS = qcomm.cpu_features()
MARGIN = 64


def runs(x: torch.Tensor, step: float) -> Segment:
    return Segment(x, Quantizer(GridKind.SIGMA, 3, Coding.RUNS, 0, 0.0, float(torch.tensor(step))), torch.zeros(len(x)))


def packets() -> dict[str, torch.Tensor]:
    """One of every coding."""
    x = gaussian(700)
    not_finite = gaussian(300)
    not_finite[170] = torch.inf
    return {
        "runs": encode([runs(x[:150], 3.0), runs(not_finite, 4.0), runs(x, 0.1)], block_steps=2),
        "runs float64": encode([runs(student_t3(701).double(), 6.0)]),
        "pair": qcomm.compress(x, qcomm.SigmaGrid(1.0, coding="pair")),
        "escapes": qcomm.compress(student_t3(701), qcomm.SigmaGrid(1.0, coding="single")),
        "fixed": qcomm.compress(x[:333], qcomm.RangeGrid(num_bits=14)),
        "raw": qcomm.compress(torch.tensor([1.0, float("nan")] * 30)),
        "constant": qcomm.compress(torch.full((55,), 2.5)),
        "bfloat16": qcomm.compress(x.bfloat16(), qcomm.SigmaGrid(0.5)),
        "float64": qcomm.compress(x.double(), qcomm.SigmaGrid(2.0)),
    }


PACKETS = packets()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", PACKETS)
def test_a_destination_of_another_size_is_refused_and_left_alone(name: str, version: str) -> None:
    packet = PACKETS[name]
    info = qcomm.inspect(packet)
    count = torch.Size(info.shape).numel()
    arena = torch.full((count + 2 * MARGIN,), 123.0, dtype=info.dtype)
    for size in (0, 1, count - 1, count + 1, count + 32):
        for accumulate in (False, True):
            with _native.using_cpu_feature(version), pytest.raises(ValueError, match=f"out must have .*{count}"):
                decode_into(packet, arena[MARGIN : MARGIN + size], accumulate=accumulate)
    assert bool((arena == 123).all())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name, packet in PACKETS.items() for dtype in DTYPES if dtype != qcomm.inspect(packet).dtype],
    ids=str,
)
def test_a_destination_of_another_dtype_is_refused_and_left_alone(name: str, dtype: torch.dtype) -> None:
    packet = PACKETS[name]
    out = torch.full(qcomm.inspect(packet).shape, 123.0, dtype=dtype)
    with pytest.raises(ValueError, match="out must have the packet's dtype"):
        decode_into(packet, out)
    assert bool((out == 123).all())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("name", "accumulate"),
    [(name, False) for name in PACKETS]
    + [(name, True) for name, packet in PACKETS.items() if qcomm.inspect(packet).dtype.itemsize > 2],
)
def test_a_destination_that_fits_is_filled_to_its_ends_only(version: str, name: str, accumulate: bool) -> None:
    packet = PACKETS[name]
    info = qcomm.inspect(packet)
    count = torch.Size(info.shape).numel()
    for begin in (MARGIN, MARGIN + 1, MARGIN + 3):  # no alignment beyond that of an element is promised
        arena = torch.full((count + 2 * MARGIN,), 123.0, dtype=info.dtype)
        with _native.using_cpu_feature(version):
            decode_into(packet, arena[begin : begin + count], accumulate=accumulate)
        expected = qcomm.decompress(packet) + (123 if accumulate else 0)
        assert bool((arena[:begin] == 123).all()) and bool((arena[begin + count :] == 123).all()), begin
        assert torch.equal(arena[begin : begin + count].nan_to_num(7.0), expected.nan_to_num(7.0)), begin


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", PACKETS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_places_are_filled_in_order_and_nothing_else(name: str, version: str, data: st.DataObject) -> None:
    packet = PACKETS[name]
    expected = qcomm.decompress(packet).reshape(-1)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(expected)), max_size=6)))
    lengths = [end - begin for begin, end in itertools.pairwise([0, *cuts, len(expected)])]
    order = data.draw(st.permutations(range(len(lengths))))
    places, at = [(0, 0)] * len(lengths), MARGIN
    for number in order:
        places[number] = at, lengths[number]
        at += lengths[number] + data.draw(st.integers(0, 2))
    arena = torch.full((at + MARGIN,), 123.0, dtype=expected.dtype)
    wanted = arena.clone()
    for (offset, length), part in zip(places, expected.split(lengths), strict=True):
        wanted[offset : offset + length] = part
    with _native.using_cpu_feature(version):
        decode_into(packet, arena, places=places, num_threads=data.draw(st.integers(1, 3)))
    assert torch.equal(arena.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([(0, 699)], "fewer values than the packet; missing are 1"),
        ([], "fewer values than the packet; missing are 700"),
        ([(0, 700), (700, 1)], "more values than the packet, which has 700"),
        ([(-1, 700)], "outside the buffer; its first element is -1"),
        ([(101, 700)], "outside the buffer; its first element is 101"),
        ([(801, 0), (0, 700)], "outside the buffer; its first element is 801"),
        ([(0, -5), (0, 705)], "outside the buffer; its first element is 0"),
        ([(2**62, 2**62), (0, 700)], "outside the buffer"),
    ],
)
def test_places_that_do_not_fit_are_refused_before_anything_is_written(
    places: list[tuple[int, int]], message: str
) -> None:
    arena = torch.full((800,), 123.0)
    with pytest.raises(ValueError, match=message):
        decode_into(PACKETS["pair"], arena, places=places)
    assert bool((arena == 123).all())


def test_places_have_a_dtype_and_are_not_added_to() -> None:
    with pytest.raises(ValueError, match="out must have the packet's dtype"):
        decode_into(PACKETS["pair"], torch.zeros(700, dtype=torch.float64), places=[(0, 700)])
    with pytest.raises(ValueError, match="accumulate must be False with places"):
        decode_into(PACKETS["pair"], torch.zeros(700), places=[(0, 700)], accumulate=True)


@pytest.mark.parametrize("step", [1.0, 4.0], ids=["single", "runs"])
def test_a_destination_one_byte_below_the_bound_is_not_written(step: float) -> None:
    x, residual = student_t3(3000), gaussian(3000, 1)
    before = residual.clone()
    quantizer = plan(measure(x, residual, 1.0), qcomm.SigmaGrid(step), x, residual, 1.0)
    segment = Segment(x, quantizer, residual)
    described = [(x.data_ptr(), x.numel(), residual.data_ptr(), segment.quantizer, 0)]
    bound = _C.encode_bound(described, 0, [3000], True, 16)
    out = torch.full((bound,), 123, dtype=torch.uint8)
    with pytest.raises(ValueError, match="destination is smaller than encode_bound"):
        _C.encode(described, 1.0, 0, [3000], True, 16, 1, out.data_ptr(), bound - 1)
    assert bool((out == 123).all()) and residual.equal(before)
