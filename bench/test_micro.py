"""Microbenchmarks of each layer, for `make bench-ci`: entropy, Huffman, codec, and an all-reduce of two ranks.

Results are checked before they are timed; a wrong one fails, a slow one never does.
"""

import multiprocessing
import zlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import qcomm
from qcomm.codec._native import measure
from qcomm.codec.huffman import code_lengths
from qcomm.codec.packet import Segment, decode_into, encode
from qcomm.codec.quantize import plan

ELEMENTS = 1 << 20
GRIDS = {"k1": qcomm.SigmaGrid(step=1.0), "k2": qcomm.SigmaGrid(step=2.0), "range": qcomm.RangeGrid(c=2)}


def gaussian(seed: int = 0) -> torch.Tensor:
    return torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(seed)) * 1e-3


def entropy_of(counts: torch.Tensor) -> float:
    p = counts[counts > 0].double() / counts.sum()
    return float(-(p * p.log2()).sum())


def test_entropy(benchmark: Any, throughput: Callable[..., None]) -> None:
    values = gaussian()
    exact = entropy_of(values.histc(16))
    assert qcomm.estimate_entropy(values) == pytest.approx(exact, abs=0.05)
    benchmark(qcomm.estimate_entropy, values)
    throughput(values.nbytes)


@pytest.mark.parametrize("num_bits", [4, 8, 12])
def test_huffman_code_lengths(benchmark: Any, num_bits: int) -> None:
    centre = (2**num_bits - 1) / 2
    distance = (torch.arange(2**num_bits) - centre).abs() / centre
    counts = (1e6 * torch.exp(-6 * distance)).long() + 1
    limit = min(num_bits + 4, 15)
    lengths = code_lengths(counts, limit).double()
    average = float((lengths * counts).sum() / counts.sum())
    assert float((2.0**-lengths).sum()) == 1.0
    assert entropy_of(counts) <= average <= entropy_of(counts) + 0.1
    benchmark(code_lengths, counts, limit)


@pytest.mark.parametrize("grid", GRIDS)
def test_compress(benchmark: Any, throughput: Callable[..., None], grid: str) -> None:
    values = gaussian()
    packet = qcomm.compress(values, GRIDS[grid])
    step = qcomm.inspect(packet).segments[0].step
    assert float((qcomm.decompress(packet) - values).abs().max()) <= step / 2 * (1 + 1e-6)
    benchmark(qcomm.compress, values, GRIDS[grid])
    throughput(values.nbytes, bits_per_element=8 * packet.numel() / values.numel())


@pytest.mark.parametrize("grid", GRIDS)
def test_decompress(benchmark: Any, throughput: Callable[..., None], grid: str) -> None:
    values = gaussian()
    packet = qcomm.compress(values, GRIDS[grid])
    total = torch.zeros_like(values)
    decode_into(packet, total, accumulate=True)
    assert total.equal(qcomm.decompress(packet))
    benchmark(qcomm.decompress, packet)
    throughput(values.nbytes)


def test_encode_with_error_feedback(benchmark: Any, throughput: Callable[..., None]) -> None:
    """What the DDP hook does with a tensor at each step: statistics, plan and encode of gradient plus residual."""
    gradient, residual = gaussian(), torch.zeros(ELEMENTS)

    def step() -> torch.Tensor:
        quantizer = plan(measure(gradient, residual), GRIDS["k1"], gradient, residual)
        return encode([Segment(gradient, quantizer, residual)])

    assert (qcomm.decompress(step()) + residual).allclose(gradient, rtol=0, atol=1e-8)
    benchmark(step)
    throughput(gradient.nbytes)


ALL_REDUCE: dict[str, Callable[[torch.Tensor], object]] = {
    "fp32": lambda tensor: dist.all_reduce(tensor, op=dist.ReduceOp.SUM),
    "k1": lambda tensor: qcomm.all_reduce(tensor, GRIDS["k1"], strategy="two_phase"),
    "k2": lambda tensor: qcomm.all_reduce(tensor, GRIDS["k2"], strategy="two_phase"),
}
DIGEST = "digest"


def join_world(rank: int, store: Path) -> None:
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)


def digest(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.numpy().tobytes())


def run_peer(commands: Connection, store: Path) -> None:
    """Rank 1. A key of ALL_REDUCE: takes part in one; DIGEST: answers with the checksum of its result; None: ends."""
    torch.set_num_threads(1)
    join_world(1, store)
    tensor = torch.empty(0)
    for command in iter(commands.recv, None):
        if command == DIGEST:
            commands.send(digest(tensor))
        else:
            tensor = gaussian(seed=1)
            commands.send(None)  # ready: making the tensor is not part of the measurement
            ALL_REDUCE[command](tensor)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    """A world of two ranks, this process and another. The connection takes rank 1's commands."""
    store = tmp_path_factory.mktemp("world") / "store"
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=run_peer, args=(there, store), daemon=True)
    process.start()
    there.close()  # so that a peer that died is an end of file here
    join_world(0, store)
    yield here
    here.send(None)
    dist.destroy_process_group()
    process.join(timeout=30)
    if process.is_alive():
        process.kill()


@pytest.mark.parametrize("method", ALL_REDUCE)
def test_all_reduce_of_two_ranks(
    benchmark: Any, throughput: Callable[..., None], peer: Connection, method: str
) -> None:
    own = gaussian(seed=0)

    def prepare() -> tuple[tuple[torch.Tensor], dict[str, Any]]:
        tensor = own.clone()
        peer.send(method)
        peer.recv()
        return (tensor,), {}

    def exchange(tensor: torch.Tensor) -> torch.Tensor:
        ALL_REDUCE[method](tensor)
        return tensor

    (tensor,), _ = prepare()
    exchange(tensor)
    peer.send(DIGEST)
    assert digest(tensor) == peer.recv(), "the ranks' results differ"
    mean = tensor / 2 if method == "fp32" else tensor
    # Both ranks' steps and the owner's are at most 2 RMS, of 1e-3 each.
    tolerance = 1e-9 if method == "fp32" else 2.1e-3
    assert float((mean - (own + gaussian(seed=1)) / 2).abs().max()) <= tolerance
    benchmark.pedantic(exchange, setup=prepare, rounds=20, warmup_rounds=2)
    throughput(own.nbytes)
