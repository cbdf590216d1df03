"""Tensors that tests share: the distributions that gradients and weights are made of, and those that break codecs."""

from collections.abc import Callable

import torch

BLOCK = 32 * 256  # values in a block of single symbols, at the default number of steps
SIZES = (0, 1, 2, 31, 32, 33, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 7, 50_000)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=_generator(seed))


def uniform(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=_generator(seed)) * 2 - 1


def laplace(n: int, seed: int = 0) -> torch.Tensor:
    u = torch.rand(n, generator=_generator(seed), dtype=torch.float64) - 0.5
    return (-u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.5 - 1e-12))).float()


def student_t3(n: int, seed: int = 0) -> torch.Tensor:
    """Heavy tails: the fourth moment does not exist."""
    g = torch.randn(4, n, generator=_generator(seed), dtype=torch.float64)
    return (g[0] / (g[1:].square().sum(0) / 3).sqrt()).float()


def sparse(n: int, seed: int = 0) -> torch.Tensor:
    """99 % exact zeros, as behind a ReLU."""
    return gaussian(n, seed) * (torch.rand(n, generator=_generator(seed + 1)) < 0.01)


def constant(n: int, seed: int = 0) -> torch.Tensor:
    return torch.full((n,), 0.37 + seed)


def one_hot(n: int, seed: int = 0) -> torch.Tensor:
    """All zero but one."""
    x = torch.zeros(n)
    if n:
        x[(seed + n // 2) % n] = 1.0
    return x


DISTRIBUTIONS: dict[str, Callable[..., torch.Tensor]] = {
    f.__name__: f for f in (gaussian, uniform, laplace, student_t3, sparse, constant, one_hot)
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def ulp(x: torch.Tensor) -> torch.Tensor:
    """The distance from each |x| to the next larger number of its dtype, in float64."""
    a = x.abs()
    if x.dtype in (torch.float16, torch.bfloat16):
        return ((a.view(torch.int16) + 1).view(x.dtype)).double() - a.double()
    return torch.nextafter(a, torch.full_like(a, float("inf"))).double() - a.double()


def as_tensor(data: bytes | bytearray) -> torch.Tensor:
    """A packet's bytes, copied, as functions of qcomm take them."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
