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
from qcomm.codec.packet import Segment, encode
from qcomm.codec.plans_cuda import Workspace
from qcomm.codec.quantize import Quantizer

GRIDS = [
    SigmaGrid(1.0),
    SigmaGrid(4.0),
    SigmaGrid(0.05),
    SigmaGrid(1.0, coding="pair"),
    SigmaGrid(0.9, coding="table"),
    SigmaGrid(0.001, coding="fixed"),
    SigmaGrid(0.01, coding="single"),
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
    with pytest.raises(ValueError, match="CPU or a CUDA device, got device meta"):
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
