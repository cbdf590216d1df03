"""Tensors and packets in device memory: qcomm/codec/packet_cuda.py over the emulated kernels, whose device is the host.

What this cannot show is left to a machine with a GPU: streams, devices, and the GPU itself.
"""

import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from emulated_core import emulated_core
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qcomm
from qcomm import RangeGrid, SigmaGrid
from qcomm.codec import _native_cuda, packet_cuda
from qcomm.codec._native import QUANTIZER_BYTES, measure
from qcomm.codec._native_cuda import CodedRange, DecodeTask, PacketSlot
from qcomm.codec.packet import Segment, encode
from qcomm.codec.plans_cuda import (
    ACCOUNT,
    Decoder,
    DeviceTensor,
    Encoder,
    Workspace,
    address,
    codes_runs,
    kernel_grid,
    own_code_bits,
    read_quantizers,
)
from qcomm.codec.quantize import Quantizer, plan
from qcomm.codec.quantizers import Coding

GRIDS = [
    SigmaGrid(1.0),
    SigmaGrid(4.0),
    SigmaGrid(0.05),
    SigmaGrid(1.0, coding="pair"),
    SigmaGrid(0.9, coding="table"),
    SigmaGrid(0.001, coding="fixed"),
    SigmaGrid(0.01, coding="single"),
    SigmaGrid(3.0, coding="runs"),
    RangeGrid(),
    RangeGrid("paper"),
    RangeGrid("compact", entropy_bits=8, seed=3),
    RangeGrid(num_bits=3),
    RangeGrid(num_bits=14),
    RangeGrid(c=12.0, max_bits=15),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(scope="module")
def emulated(emulated_path: Path) -> Iterator[None]:
    with emulated_core(emulated_path):
        yield


def check(values: torch.Tensor, grid: qcomm.SigmaGrid | qcomm.RangeGrid, checksum: bool, steps: int) -> torch.Tensor:
    expected = qcomm.compress(values, grid, checksum=checksum, block_steps=steps)
    packet = packet_cuda.compress(values, grid, checksum, steps)
    assert torch.equal(packet, expected)
    decoded = packet_cuda.decompress(packet)
    wanted = qcomm.decompress(expected)
    assert decoded.dtype == wanted.dtype
    assert decoded.shape == wanted.shape
    assert torch.equal(decoded.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))
    return packet


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_constant_and_infinite_tensors_are_the_bytes_of_the_cpu(
    grid: qcomm.SigmaGrid | qcomm.RangeGrid, dtype: torch.dtype
) -> None:
    check(torch.full((40,), 2.5, dtype=dtype), grid, False, 8)
    check(torch.tensor([1.0, float("inf"), 2.0], dtype=dtype), grid, False, 8)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("shape", "steps"), [((0, 3), 256), ((), 1), ((33,), 8), ((2, 4097), 64), ((4, 3, 11, 13), 17)], ids=str
)
def test_shapes_and_steps_are_those_of_the_cpu(
    grid: qcomm.SigmaGrid | qcomm.RangeGrid, dtype: torch.dtype, shape: tuple[int, ...], steps: int
) -> None:
    torch.manual_seed(5)
    check(torch.randn(shape).to(dtype), grid, True, steps)


@pytest.mark.usefixtures("emulated")
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(0, 3000),
    st.sampled_from(GRIDS),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from([1, 8, 17, 256]),
    st.floats(1e-4, 1e4),
    st.integers(0, 2**31),
)
def test_any_tensor(n: int, grid, dtype: torch.dtype, checksum: bool, steps: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * torch.rand(n, generator=generator) ** 4 * scale
    check(values.to(dtype), grid, checksum, steps)


def to_be_damaged(grid: qcomm.SigmaGrid | qcomm.RangeGrid) -> torch.Tensor:
    torch.manual_seed(7)
    return check(torch.randn(3000), grid, True, 16)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("at", [0, 4, 5, 9, 12, 20, 30, 33, 37, 45, 50, 56, 58, 100, "half", -5])
@pytest.mark.parametrize("grid", [SigmaGrid(1.0), RangeGrid(num_bits=6)], ids=str)
def test_damaged_packets_are_refused(grid: qcomm.SigmaGrid | qcomm.RangeGrid, at: int | str) -> None:
    packet = to_be_damaged(grid)
    packet[packet.numel() // 2 if isinstance(at, str) else at] ^= 0x41
    with pytest.raises(qcomm.PacketError):
        packet_cuda.decompress(packet)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("size", [0, 39, 40, 71, -4])
@pytest.mark.parametrize("grid", [SigmaGrid(1.0), RangeGrid(num_bits=6)], ids=str)
def test_cut_packets_are_refused(grid: qcomm.SigmaGrid | qcomm.RangeGrid, size: int) -> None:
    with pytest.raises(qcomm.PacketError):
        packet_cuda.decompress(to_be_damaged(grid)[:size])


def with_residuals(dtype: torch.dtype, scale: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(11)
    counts = 4000, 1, 33, 0, 2500
    return [(torch.randn(n).to(dtype) * scale, torch.randn(n) * 0.3) for n in counts]


def encode_on_device(
    pairs: list[tuple[torch.Tensor, torch.Tensor]], grid: SigmaGrid, steps: int
) -> tuple[torch.Tensor, list[Quantizer]]:
    tensors = [DeviceTensor(address(v), v.numel(), grid, address(r)) for v, r in pairs]
    segments = [CodedRange(t, 0, v.numel(), address(r)) for t, (v, r) in enumerate(pairs)]
    dtype, workspace = pairs[0][0].dtype, Workspace(torch.device("cpu"))
    bound = Encoder(dtype, steps, tensors, segments, [PacketSlot(len(pairs))], workspace).bound()
    out = torch.zeros(bound, dtype=torch.uint8)
    encoder = Encoder(dtype, steps, tensors, segments, [PacketSlot(len(pairs), address(out), bound)], workspace)
    quantizers = torch.zeros(QUANTIZER_BYTES * len(pairs), dtype=torch.uint8)
    encoder.run(torch.zeros(len(ACCOUNT), dtype=torch.int64), quantizers)
    return out[: int(encoder.sizes[0])], read_quantizers(quantizers)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", [SigmaGrid(2.5), SigmaGrid(3.4), SigmaGrid(1.0, coding="runs")], ids=str)
@pytest.mark.parametrize("steps", [1, 64])
def test_zero_runs_are_those_of_the_cpu(grid: SigmaGrid, dtype: torch.dtype, steps: int) -> None:
    mine, theirs = with_residuals(dtype, 1.0), with_residuals(dtype, 1.0)
    packet, quantizers = encode_on_device(mine, grid, steps)
    wanted = [plan(measure(v, r), grid, v, r) for v, r in theirs]
    expected = encode([Segment(v, q, r) for (v, r), q in zip(theirs, wanted, strict=True)], block_steps=steps)
    assert torch.equal(packet, expected)
    assert quantizers == wanted
    assert quantizers[0].coding == Coding.RUNS
    for (_, residual), (_, other) in zip(mine, theirs, strict=True):
        assert torch.equal(residual, other)
    assert torch.equal(packet_cuda.decompress(packet), qcomm.decompress(expected))
    damaged = packet.clone()
    damaged[-3] ^= 1
    with pytest.raises(qcomm.PacketError, match="block"):
        packet_cuda.decompress(damaged)


@pytest.mark.usefixtures("emulated")
def test_zero_runs_whose_rest_is_no_float32_are_nan_and_stay() -> None:
    pairs, grid = with_residuals(torch.float64, 1e40), SigmaGrid(3.4)
    before = [residual.clone() for _, residual in pairs]
    packet, _ = encode_on_device(pairs, grid, 64)
    decoded = packet_cuda.decompress(packet)
    assert bool(decoded[:4000].isnan().all())
    assert torch.equal(decoded.isnan(), qcomm.decompress(packet).isnan())
    assert torch.equal(pairs[0][1], before[0])


@pytest.mark.usefixtures("emulated")
def test_zero_runs_that_are_not_expected_are_refused() -> None:
    packet, _ = encode_on_device(with_residuals(torch.float32, 1.0), SigmaGrid(3.4), 64)
    values, faults = torch.zeros(qcomm.decompress(packet).numel()), torch.zeros(1, dtype=torch.int32)
    task = DecodeTask(address(packet), packet.numel(), address(values), values.numel())
    for takes_runs in (False, True):
        workspace = Workspace(torch.device("cpu"))
        Decoder(torch.float32, 64, 5, [task], 0, workspace, takes_runs).decode(address(faults))
        assert bool(faults[0]) is not takes_runs


def test_runs_are_asked_for_where_the_cpu_codes_them() -> None:
    for grid in (SigmaGrid(2.0), SigmaGrid(2.5), SigmaGrid(1.0, coding="runs"), SigmaGrid(3.0, coding="pair")):
        for has_residual in (False, True):
            values = torch.randn(100)
            residual = torch.zeros(100) if has_residual else None
            expected = plan(measure(values, residual), grid, values, residual).coding == Coding.RUNS
            assert codes_runs(grid, has_residual) == expected
            assert (kernel_grid(grid, has_residual).quantizer.coding == Coding.RUNS) == expected
    assert own_code_bits(SigmaGrid(3.0), has_residual=True) == 0


@pytest.mark.usefixtures("emulated")
def test_static_codes_are_freed_with_their_workspace() -> None:
    workspace = Workspace(torch.device("cpu"))
    codes = weakref.ref(workspace.codes())
    assert codes() is workspace.codes()
    del workspace
    assert codes() is None


@pytest.mark.usefixtures("emulated")
def test_a_packet_at_an_odd_address() -> None:
    packet = check(torch.randn(500), SigmaGrid(1.0), True, 8)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), packet])[1:]
    assert torch.equal(packet_cuda.decompress(shifted), qcomm.decompress(packet))


@pytest.mark.usefixtures("emulated")
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 9000), st.integers(1, 12), st.sampled_from([0.03, 0.5, 1.0]), st.integers(0, 2**32 - 1))
def test_the_entropy_is_that_of_the_cpu(n: int, num_bits: int, fraction: float, seed: int) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed % 1000)) ** 3
    for tensor in (values, values.to(torch.bfloat16).double(), torch.zeros(n)):
        expected = qcomm.estimate_entropy(tensor, num_bits, fraction, seed=seed)
        with mock.patch.object(_native_cuda, "KERNEL_DEVICES", {"cuda", "cpu"}):
            assert qcomm.estimate_entropy(tensor, num_bits, fraction, seed=seed) == expected
            if n:
                tensor[n // 2] = float("inf")
                with pytest.raises(ValueError, match="finite"):
                    qcomm.estimate_entropy(tensor, num_bits, fraction, seed=seed)


def test_a_build_without_kernels_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qcomm._cuda", None)
    with pytest.raises(RuntimeError, match="QCOMM_CUDA=ON"):
        _native_cuda.core()


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be on one of \('cpu', 'cuda'\), got device meta"):
        qcomm.compress(torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match="must be on the CPU, got device meta"):
        encode([Segment(torch.empty(3, device="meta"), Quantizer.raw())])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and a build with the kernels")
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_packets_of_a_gpu(grid: qcomm.SigmaGrid | qcomm.RangeGrid) -> None:
    values = torch.randn(100_000)
    packet = qcomm.compress(values.cuda(), grid)
    assert packet.is_cuda
    assert torch.equal(packet.cpu(), qcomm.compress(values, grid))
    assert torch.equal(qcomm.decompress(packet).cpu(), qcomm.decompress(packet.cpu()))
