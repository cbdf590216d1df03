"""Any number of threads writes the same bytes, reads the same values and finds the same damage."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from data import gaussian, student_t3
from hypothesis import given, settings
from hypothesis import strategies as st

import qcomm
from qcomm.codec import _native
from qcomm.codec._native import measure
from qcomm.codec.packet import Segment, decode_into, encode
from qcomm.codec.quantize import Quantizer, plan

PER_THREAD = 1 << 17  # parallel.h, kValuesPerThread
THREADS = (2, 3, 5)
SIZES = (2 * PER_THREAD - 1, 2 * PER_THREAD, 3 * PER_THREAD + 77, 1_000_003)
GRIDS = {
    "sigma 1": qcomm.SigmaGrid(1.0),
    "sigma 2 pair": qcomm.SigmaGrid(2.0, coding="pair"),
    "sigma 1 table": qcomm.SigmaGrid(1.0, coding="table"),
    "range c=2": qcomm.RangeGrid(c=2),
    "range 14 bits": qcomm.RangeGrid(num_bits=14),
}


@pytest.mark.parametrize("version", qcomm.cpu_features())
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("n", SIZES)
def test_packets_and_values_do_not_depend_on_threads(grid: qcomm.codec.Grid, version: str, n: int) -> None:
    with _native.using_cpu_feature(version):
        x = student_t3(n)
        x[n // 2 : n // 2 + 20_000] = 0.0  # some constant blocks
        packet = qcomm.compress(x, grid)
        values = qcomm.decompress(packet)
        total = torch.ones(n)
        decode_into(packet, total, accumulate=True)
        for threads in THREADS:
            assert qcomm.compress(x, grid, num_threads=threads).equal(packet), (n, threads)
            assert qcomm.decompress(packet, num_threads=threads).equal(values)
            again = torch.ones(n)
            decode_into(packet, again, accumulate=True, num_threads=threads)
            assert again.equal(total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [*SIZES, 8 * PER_THREAD + 4095, 12 * PER_THREAD + 1])
def test_statistics_do_not_depend_on_threads(dtype: torch.dtype, n: int) -> None:
    x = gaussian(n).to(dtype)
    assert all(measure(x, num_threads=threads) == measure(x) for threads in THREADS)
    x[-1] = float("nan")
    assert not measure(x, num_threads=2).finite


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 33, 5000, *SIZES[:3]]), min_size=1, max_size=4),
    grid=st.sampled_from([*GRIDS.values(), qcomm.SigmaGrid(4.0)]),
    threads=st.integers(2, 6),
    seed=st.integers(0, 99),
)
def test_residuals_do_not_depend_on_threads(sizes: list[int], grid: qcomm.codec.Grid, threads: int, seed: int) -> None:
    def run(num_threads: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        segments = []
        for i, n in enumerate(sizes):
            x, residual = gaussian(n, seed + i), 0.3 * gaussian(n, seed + i + 50)
            stats = measure(x, residual, 0.5, num_threads=num_threads)
            quantizer = plan(stats, grid, x, residual, 0.5, num_threads=num_threads)
            segments.append(Segment(x, quantizer, residual))
            for whole in (Quantizer.raw(), Quantizer.constant(0.25)):
                segments.append(Segment(x, whole, residual.clone()))
        packet = encode(segments, inv_scale=0.5, num_threads=num_threads)
        return packet, [segment.residual for segment in segments if segment.residual is not None]

    (packet, residuals), (expected, kept) = run(threads), run(1)
    assert packet.equal(expected)
    assert all(a.equal(b) for a, b in zip(residuals, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_what_is_stored_whole_does_not_depend_on_threads(dtype: torch.dtype, n: int) -> None:
    with_infinity = gaussian(n).to(dtype)
    with_infinity[n // 3] = float("inf")
    for x in (with_infinity, torch.full((n,), 0.1, dtype=dtype)):
        packet = qcomm.compress(x)
        assert qcomm.decompress(packet).equal(x)
        for threads in THREADS:
            assert qcomm.compress(x, num_threads=threads).equal(packet)
            assert qcomm.decompress(packet, num_threads=threads).equal(x)


@pytest.mark.parametrize("step", [1.0, 4.0], ids=["single", "runs"])
def test_the_first_damaged_block_is_told_by_any_number_of_threads(step: float) -> None:
    x, residual = gaussian(1_000_003), torch.zeros(1_000_003)
    packet = encode([Segment(x, plan(measure(x, residual), qcomm.SigmaGrid(step), x, residual), residual)])
    for at in (0.2, 0.5, 0.9):
        packet[int(at * packet.numel())] ^= 1
    messages = set()
    for threads in (1, *THREADS):
        with pytest.raises(qcomm.PacketError) as caught:
            qcomm.decompress(packet, num_threads=threads)
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_several_python_threads_at_once() -> None:
    x = gaussian(600_000)
    expected = qcomm.compress(x)
    found: list[torch.Tensor] = []
    workers = [threading.Thread(target=lambda: found.append(qcomm.compress(x, num_threads=2))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4 and all(packet.equal(expected) for packet in found)


FORKING = """
import os, torch, qcomm
x = torch.linspace(-1, 1, 600_000)
packet = qcomm.compress(x, num_threads=2)
child = os.fork()
if child == 0:
    os._exit(0 if qcomm.compress(x, num_threads=2).equal(packet) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_has_threads_too() -> None:
    """As a DataLoader's workers do. Torch's own threads do not survive a fork, so it has one here."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FORKING], check=True, env=environment, timeout=120)


@pytest.mark.parametrize(("bad", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)])
def test_a_number_of_threads_that_is_none_is_named(bad: object, error: type[Exception]) -> None:
    x, packet = torch.ones(3), qcomm.compress(torch.ones(3))
    for call in (
        lambda: qcomm.compress(x, num_threads=bad),  # type: ignore[arg-type]
        lambda: qcomm.decompress(packet, num_threads=bad),  # type: ignore[arg-type]
        lambda: decode_into(packet, x, num_threads=bad),  # type: ignore[arg-type]
        lambda: measure(x, num_threads=bad),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match="num_threads must be"):
            call()
