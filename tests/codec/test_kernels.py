"""Every version of the inner loops writes and reads the same bytes."""

import subprocess
from collections.abc import Callable

import pytest
import torch
from data import BLOCK, DISTRIBUTIONS, DTYPES, gaussian, laplace, student_t3
from golden_cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from native_build import build, skip_unless_built

import qcomm
from qcomm.codec import _native
from qcomm.codec._native import measure
from qcomm.codec.packet import Segment, decode_into, encode
from qcomm.codec.quantize import plan

VERSIONS = qcomm.cpu_features()
VECTOR_VERSIONS = VERSIONS[1:]
GRIDS = (
    qcomm.SigmaGrid(1.0, coding="pair"),
    qcomm.SigmaGrid(1.0, coding="single"),
    qcomm.SigmaGrid(0.2),
    qcomm.SigmaGrid(2.0, coding="table"),
    qcomm.RangeGrid(num_bits=5),
    qcomm.RangeGrid(num_bits=12, reconstruction="center"),
    qcomm.RangeGrid(num_bits=3),
)
# With a residual, which zero runs need.
FEEDBACK_GRIDS = (*GRIDS, qcomm.SigmaGrid(4.0), qcomm.SigmaGrid(1.0, coding="runs"))


def test_scalar_is_always_there() -> None:
    assert VERSIONS[0] == "scalar" and len(set(VERSIONS)) == len(VERSIONS)


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(ValueError, match="name must be one of"), _native.using_cpu_feature("mmx"):
        pass


@pytest.mark.parametrize("version", VECTOR_VERSIONS)
def test_golden_packets(version: str) -> None:
    with _native.using_cpu_feature("scalar"):
        expected = cases()
    with _native.using_cpu_feature(version):
        for name, packet in cases().items():
            assert packet.equal(expected[name]), name
            decoded = qcomm.decompress(packet)
            with _native.using_cpu_feature("scalar"):
                assert decoded.view(torch.uint8).equal(qcomm.decompress(packet).view(torch.uint8)), name


def test_lanes_agree_for_any_code_and_any_words() -> None:
    skip_unless_built()
    result = subprocess.run([build("compare_lanes"), "4000", "1"], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("version", VECTOR_VERSIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_bytes_and_values_agree(version: str, dtype: torch.dtype, make: Callable[..., torch.Tensor]) -> None:
    for n in (1, 31, 32, 33, 63, 64, 65, 1023, BLOCK - 1, BLOCK + 33, 2 * BLOCK + 1, 40_001):
        x = make(n).to(dtype)
        for grid in GRIDS:
            with _native.using_cpu_feature("scalar"):
                expected = qcomm.compress(x, grid)
                values = qcomm.decompress(expected)
            with _native.using_cpu_feature(version):
                assert qcomm.compress(x, grid).equal(expected), (make.__name__, n, grid)
                assert qcomm.decompress(expected).view(torch.uint8).equal(values.view(torch.uint8)), (
                    make.__name__,
                    n,
                    grid,
                )


def encoded_with_feedback(x: torch.Tensor, grid: qcomm.codec.Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    residual = 0.3 * gaussian(x.numel(), 5)
    quantizer = plan(measure(x, residual, 0.125), grid, x, residual, 0.125)
    packet = encode([Segment(x, quantizer, residual)], inv_scale=0.125)
    total = gaussian(x.numel(), 6).to(x.dtype)
    decode_into(packet, total, accumulate=True)
    return packet, residual, total


@pytest.mark.parametrize("version", VECTOR_VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "x", [laplace(20_011), student_t3(20_011), gaussian(77)], ids=["laplace", "student_t3", "gaussian"]
)
def test_feedback_and_accumulation_agree(version: str, dtype: torch.dtype, x: torch.Tensor) -> None:
    for grid in FEEDBACK_GRIDS:
        with _native.using_cpu_feature("scalar"):
            expected = encoded_with_feedback(x.to(dtype), grid)
        with _native.using_cpu_feature(version):
            found = encoded_with_feedback(x.to(dtype), grid)
        assert all(a.equal(b) for a, b in zip(expected, found, strict=True)), grid


@pytest.mark.parametrize("version", VECTOR_VERSIONS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_payloads_are_judged_alike(version: str, data: st.DataObject) -> None:
    """Without checksums: the same verdict, and the same values where there is one."""
    x, residual = student_t3(1500), torch.zeros(1500)
    grid = data.draw(st.sampled_from(FEEDBACK_GRIDS))
    segment = Segment(x, plan(measure(x, residual), grid, x, residual), residual)
    packet = encode([segment], checksum=False, block_steps=data.draw(st.integers(1, 40)))
    start = qcomm.inspect(packet).header_bytes
    damaged = packet.clone()
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(start, packet.numel() - 1))] = data.draw(st.integers(0, 255))
    results = []
    for name in ("scalar", version):
        with _native.using_cpu_feature(name):
            try:
                results.append(qcomm.decompress(damaged).view(torch.uint8))
            except qcomm.PacketError as error:
                results.append(str(error))
    scalar, vector = results
    assert scalar == vector if isinstance(scalar, str) or isinstance(vector, str) else scalar.equal(vector)


SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -torch.inf, torch.inf, torch.nan, 3.3895e38, 3.4028e38, 1.1755e-38, -1e-45, 9.1835e-41, 2**-133],
)


@pytest.mark.parametrize("version", VERSIONS)
@given(bits=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=70), divisor=st.integers(1, 2**20))
@settings(max_examples=60, deadline=None)
def test_divided_bfloats_are_torchs(version: str, bits: list[int], divisor: int) -> None:
    values = torch.cat([torch.tensor(bits, dtype=torch.int32).view(torch.float32), SPECIAL])
    out = torch.empty(values.numel(), dtype=torch.bfloat16)
    with _native.using_cpu_feature(version):
        _native.divide_to_bfloat(values, divisor, out)
    expected = torch.empty_like(out).copy_(values).div_(divisor)
    assert out.isnan().equal(expected.isnan())
    number = ~expected.isnan()
    assert out[number].view(torch.int16).equal(expected[number].view(torch.int16))


@pytest.mark.parametrize(
    ("values", "out"),
    [
        (torch.ones(3, dtype=torch.float64), torch.empty(3, dtype=torch.bfloat16)),
        (torch.ones(3), torch.empty(3, dtype=torch.float16)),
        (torch.ones(3), torch.empty(2, dtype=torch.bfloat16)),
    ],
)
def test_divided_bfloats_need_room_of_their_own(values: torch.Tensor, out: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="values must be float32 and out bfloat16, of one size"):
        _native.divide_to_bfloat(values, 2, out)
