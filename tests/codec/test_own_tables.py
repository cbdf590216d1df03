"""Code tables of a sigma segment's own. Those of long segments are made from a sample, and code any value."""

import pytest
import torch
from data import as_tensor, gaussian, laplace

import qcomm
from qcomm import reference
from qcomm.codec._native import code_lengths, measure, quantize, using_cpu_feature
from qcomm.codec.packet import Segment, encode
from qcomm.codec.quantize import plan
from qcomm.codec.quantizers import WIRE_TABLE, Coding, GridKind, Quantizer
from qcomm.reference.grids import sample_indices

SAMPLED_FROM = 2**15 + 2  # values; shorter segments are counted whole


def with_own_table(x: torch.Tensor, coding: Coding, k: float = 1.0, residual: torch.Tensor | None = None) -> Quantizer:
    step = float(torch.tensor(k * measure(x, residual).rms, dtype=torch.float32))
    bits = 4 if coding == Coding.PAIR else plan(measure(x), qcomm.SigmaGrid(k), x).num_bits
    return Quantizer(GridKind.SIGMA, bits, coding, WIRE_TABLE, 0.0, step)


def varying(count: int, seed: int = 0) -> torch.Tensor:
    """Laplace values whose scale differs every 1000 values, so that neighbours are alike and pairs save bits."""
    scale = gaussian(-(-count // 1000), seed).exp().repeat_interleave(1000)[:count]
    return laplace(count, seed + 1) * scale


@pytest.mark.parametrize("coding", [Coding.SINGLE, Coding.PAIR])
@pytest.mark.parametrize("count", [SAMPLED_FROM - 1, SAMPLED_FROM, SAMPLED_FROM + 1])
def test_the_bytes_are_those_of_the_specification(count: int, coding: Coding) -> None:
    x, residual = varying(count), 0.3 * gaussian(count, 7)
    quantizer = with_own_table(x, coding, residual=residual)
    mirror = reference.ReferenceSegment(
        x, int(quantizer.grid), quantizer.num_bits, int(coding), WIRE_TABLE, 0.0, quantizer.p1, residual.clone(), 0.5
    )
    expected = as_tensor(reference.encode_packet([mirror], [count]))
    for version in qcomm.cpu_features():
        kept = residual.clone()
        with using_cpu_feature(version):
            packet = encode([Segment(x, quantizer, kept)], inv_scale=0.5, num_threads=3)
        assert packet.equal(expected), version
        assert kept.equal(mirror.residual), version


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("coding", [Coding.SINGLE, Coding.PAIR])
def test_a_sample_costs_less_than_one_percent(coding: Coding, dtype: torch.dtype) -> None:
    x = varying(400_000).to(dtype)
    quantizer = with_own_table(x, coding)
    packet = encode([Segment(x, quantizer)])
    assert qcomm.inspect(packet).segments[0].table == "own"
    symbols = quantize(x, quantizer).long()
    codewords = symbols[0::2] | symbols[1::2] << 4 if coding == Coding.PAIR else symbols
    counts = torch.bincount(codewords, minlength=256 if coding == Coding.PAIR else 2**quantizer.num_bits)
    best = int((counts * code_lengths(counts, 12)).sum())
    escapes = int((symbols == 2**quantizer.num_bits - 1).sum()) * 8 * (dtype.itemsize + 2)
    blocks = -(-x.numel() // (256 * 32 * (2 if coding == Coding.PAIR else 1)))
    assert 8 * packet.numel() < 1.01 * (best + escapes) + 8 * 140 * blocks


@pytest.mark.parametrize("coding", [Coding.SINGLE, Coding.PAIR])
def test_values_that_the_sample_does_not_hold_are_coded(coding: Coding) -> None:
    count = 4 * SAMPLED_FROM
    x = laplace(count).clamp(-2, 2)
    sampled = {2 * a + i for a in sample_indices(count // 2, 2**14, 0) for i in (0, 1)}
    rare = [i for i in range(count) if i not in sampled][:: count // 40]
    x[rare] = torch.linspace(-6.5, 6.5, len(rare))
    quantizer = with_own_table(x, coding)
    packet = encode([Segment(x, quantizer)])
    levels = (x / torch.tensor(quantizer.p1)).round() * torch.tensor(quantizer.p1)
    assert qcomm.inspect(packet).segments[0].table == "own"
    assert torch.allclose(qcomm.decompress(packet), levels, atol=1e-5)
    kinds = quantize(x, quantizer)[rare].unique()
    assert len(kinds) > len(quantize(x, quantizer)[sorted(sampled)].unique()) - 3  # most are nowhere in the sample


def test_a_table_that_does_not_pay_is_not_written() -> None:
    # All 15 levels are as frequent: four bits a symbol are as short as any code.
    x = torch.arange(2 * SAMPLED_FROM).mul(7).remainder(15).sub(7).float()
    quantizer = Quantizer(GridKind.SIGMA, 4, Coding.SINGLE, WIRE_TABLE, 0.0, 1.0)
    packet = encode([Segment(x, quantizer)])
    assert qcomm.inspect(packet).segments[0].table == "none"
    assert qcomm.decompress(packet).equal(x)
