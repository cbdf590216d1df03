"""The data sets of bench_codec.py, the same every time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import qcomm
from qcomm.codec.quantize import quantize


def laplace(n: int, generator: torch.Generator) -> torch.Tensor:
    u = torch.rand(n, generator=generator) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))


def scaled_laplace(n: int, generator: torch.Generator) -> torch.Tensor:
    """Another scale, log-normal with a deviation of 0.4, for each 1000 values: like the rows of a layer."""
    scale = (0.4 * torch.randn(-(-n // 1000), generator=generator)).exp().repeat_interleave(1000)[:n]
    return laplace(n, generator) * scale


def gaussian(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(n, generator=generator)


def heavy_laplace(n: int, generator: torch.Generator) -> torch.Tensor:
    """Another scale, log-normal with a deviation of 0.7, for each value."""
    return laplace(n, generator) * torch.randn(n, generator=generator).mul(0.7).exp()


@dataclass(frozen=True)
class DataSet:
    """Values and the range grid that they go through; the seed gives the entropy that a set is meant to have."""

    name: str
    about: str
    make: Callable[[int, torch.Generator], torch.Tensor]
    num_bits: int
    seed: int

    @property
    def grid(self) -> qcomm.RangeGrid:
        """The grid that the set's entropy is of."""
        return qcomm.RangeGrid(num_bits=self.num_bits)

    def values(self, n: int) -> torch.Tensor:
        """``n`` float32 values."""
        return self.make(n, torch.Generator().manual_seed(self.seed))


DATA_SETS = (
    DataSet("a", "Laplace, its scale log-normal for each 1000 values, 6 bits", scaled_laplace, 6, 2),
    DataSet("b", "Gaussian, 8 bits", gaussian, 8, 1),
    DataSet("c", "heavy-tailed Laplace, 10 bits", heavy_laplace, 10, 3),
)


@dataclass(frozen=True)
class SymbolStatistics:
    """What a stream of symbols is like; ``entropy`` is Shannon's, in bits a symbol."""

    entropy: float
    p_max: float
    used: int


def statistics_of(symbols: torch.Tensor) -> SymbolStatistics:
    counts = torch.bincount(symbols.reshape(-1))
    p = counts[counts > 0].double() / symbols.numel()
    return SymbolStatistics(float(-(p * p.log2()).sum()), float(p.max()), p.numel())


def bits_over_entropy(values: torch.Tensor, grid: qcomm.codec.Grid, block_steps: int) -> float:
    """A packet's bits, all headers counted, over the entropy of its symbols."""
    packet = qcomm.compress(values, grid, block_steps=block_steps)
    return 8 * packet.numel() / (statistics_of(quantize(values, grid)[0]).entropy * values.numel())
