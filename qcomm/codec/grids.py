"""Grids, small immutable descriptions of the levels to which a tensor is quantized.

docs/format.md has the arithmetic.
"""

import math
from dataclasses import dataclass
from functools import cached_property

__all__ = ["Grid", "RangeGrid", "SigmaGrid"]

MIN_SIGMA_STEP = 2.0**-12
MAX_SIGMA_STEP = 16.0
SIGMA_CODINGS = ("auto", "single", "pair", "table", "runs", "fixed")
RECONSTRUCTIONS = ("center", "endpoint")
BIT_RULES = ("entropy", "rms")
PRESETS: dict[str | None, dict[str, float | str]] = {
    None: {},
    "paper": {"c": 6.0, "reconstruction": "center"},
    "compact": {"c": 5.0},
}
# Below this k a pair code's 4-bit alphabet would leave too many values outside (sigma_num_bits gives more than 4 bits).
PAIR_BITS = 4
# From this step on most values are 0, and runs of zeros are coded in fewer bytes than pairs, and faster.
RUNS_STEP = 2.5
MIN_RUNS_STEP = 1.0  # a level of 3 is then three times the RMS


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    return float(value)


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}, got {value}")
    return value


def sigma_num_bits(step: float) -> int:
    """Returns the bits of a sigma grid's alphabet: the fewest, of 4..16, that reach 6.25 sigma on each side of zero."""
    return next(n for n in range(4, 17) if (2 ** (n - 1) - 0.5) * step >= 6.25)


@dataclass(frozen=True)
class SigmaGrid:
    """A symmetric mid-tread grid relative to a tensor's RMS, with levels at multiples of ``step * rms``, including 0.

    It is the default for gradients. Values outside the alphabet are sent exactly; nothing is clipped.

    Args:
        step: distance of the levels in units of the tensor's root mean square, 2**-12..16. A step of 1 costs about 2.1
            bits per value of a typical gradient, a step of 2 about 1.3. Use error feedback with steps of 2 or more.
        coding: ``"auto"`` prices the codes on a sample and takes the cheapest. ``"single"`` and ``"pair"`` force a
            built-in table with one or two symbols per codeword; pairs need ``step >= 0.84``. ``"table"`` puts the
            tensor's own table into the packet. ``"runs"`` codes runs of zeros, with levels up to 3 on each side. It
            needs ``step >= 1``, and is for tensors with a residual, which keeps the rest; others are coded as with
            ``"auto"``. ``"auto"`` takes it for steps of 2.5 and more. ``"fixed"`` uses no Huffman code.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Example:
        >>> SigmaGrid(step=2.0).num_bits
        4
    """

    step: float = 1.0
    coding: str = "auto"

    def __post_init__(self) -> None:
        step = _real("step", self.step)
        if not MIN_SIGMA_STEP <= step <= MAX_SIGMA_STEP:
            raise ValueError(f"step must be in [2**-12, 16] (multiples of the tensor's RMS), got {self.step}")
        object.__setattr__(self, "step", step)
        if self.coding not in SIGMA_CODINGS:
            raise ValueError(f"coding must be one of {SIGMA_CODINGS}, got {self.coding!r}")
        if self.coding == "pair" and self.num_bits != PAIR_BITS:
            raise ValueError(f"coding 'pair' needs step >= 0.84, where 4 bits a symbol suffice; got step={step}")

        if self.coding == "runs" and step < MIN_RUNS_STEP:
            raise ValueError(f"coding 'runs' needs step >= {MIN_RUNS_STEP:g}, as its levels end at 3; got step={step}")

    @cached_property
    def num_bits(self) -> int:
        """Returns the bits of the alphabet before coding."""
        return sigma_num_bits(self.step)

    @cached_property
    def codes_runs(self) -> bool:
        """Returns whether runs of zeros are coded where there is a residual."""
        return self.coding == "runs" or (self.coding == "auto" and self.step >= RUNS_STEP)

    def describe(self) -> str:
        """Returns the configuration as one line, equal on all ranks with the same configuration."""
        return f"SigmaGrid(step={self.step!r}, coding={self.coding!r})"


@dataclass(frozen=True)
class RangeGrid:
    """A grid of uniform levels between a tensor's minimum and maximum, whose number follows from the entropy.

    It is the default for weights. The entropy H of a coarse histogram of a small sample gives ``N = ceil(H + c)`` bits,
    anew for each tensor and each time it is encoded.

    Source: A. Oland and B. Raj, "Reducing communication overhead in distributed learning by an order of magnitude
    (almost)", ICASSP 2015.

    Args:
        preset: ``"paper"`` is ``c=6, reconstruction="center"``; ``"compact"`` is ``c=5``; None takes the arguments
            below.
        c: bits added to the entropy, >= 0. It is the minimum of N; ``c + entropy_bits`` is the maximum.
        entropy_bits: the histogram has ``2**entropy_bits`` bins, 1..12 (the paper's M).
        sample_fraction: fraction of the values that are sampled, in (0, 1]; never fewer than 1024 values.
        max_bits: upper bound of N, 1..16.
        reconstruction: ``"endpoint"`` has levels at both ends, so that decoding and encoding again changes nothing.
            ``"center"`` decodes to the middle of a bin, as in the paper. It shrinks repeatedly exchanged weights by
            ``2**-N`` per round.
        num_bits: a fixed N, 1..16, which replaces the entropy's.
        seed: seed of the sample.
        bits: ``"entropy"``, or ``"rms"`` for the paper's first rule, ``N = round(log2(G + 1) + c)`` with G the root
            mean square of the tensor, a gradient in its own units. As G is nearly always far below 1, N is nearly
            always c. It has the same bounds, and is not for ``"exact_sum"`` nor for ``device_codec``.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it.

    Example:
        >>> RangeGrid("paper").reconstruction
        'center'
    """

    preset: str | None = None
    c: float = 6.0
    entropy_bits: int = 4
    sample_fraction: float = 0.03
    max_bits: int = 16
    reconstruction: str = "endpoint"
    num_bits: int | None = None
    seed: int = 0
    bits: str = "entropy"

    def __post_init__(self) -> None:
        if not isinstance(self.preset, str | None) or self.preset not in PRESETS:
            is_number = isinstance(self.preset, (int, float))
            hint = f"; bits above the entropy are written RangeGrid(c={self.preset})" if is_number else ""
            raise ValueError(f"preset must be None, 'paper' or 'compact', got {self.preset!r}{hint}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) not in (getattr(type(self), name), value):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} contradicts preset {self.preset!r}, which sets it to {value!r}"
                )
            object.__setattr__(self, name, value)
        c = _real("c", self.c)
        object.__setattr__(self, "c", c)
        if not 0.0 <= c <= 16.0:
            raise ValueError(f"c must be in [0, 16] bits, got {self.c}")
        _integer("entropy_bits", self.entropy_bits, 1, 12)
        fraction = _real("sample_fraction", self.sample_fraction)
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"sample_fraction must be in (0, 1], got {self.sample_fraction}")
        _integer("max_bits", self.max_bits, 1, 16)
        if self.num_bits is not None:
            _integer("num_bits", self.num_bits, 1, 16)
        _integer("seed", self.seed, 0, 2**32 - 1)
        if self.reconstruction not in RECONSTRUCTIONS:
            raise ValueError(f"reconstruction must be one of {RECONSTRUCTIONS}, got {self.reconstruction!r}")
        if self.bits not in BIT_RULES:
            raise ValueError(f"bits must be one of {BIT_RULES}, got {self.bits!r}")
        if self.bits == "rms" and self.num_bits is not None:
            raise ValueError(f"num_bits must be None with bits='rms', which chooses N, got {self.num_bits}")

    def bits_for(self, entropy: float) -> int:
        """Returns N for a tensor of ``entropy`` bits: ``min(ceil(H + c), floor(c + M), max_bits)``, at least 1.

        Raises:
            ValueError: N does not follow from the entropy.
        """
        if self.num_bits is not None:
            return self.num_bits
        if self.bits != "entropy":
            raise ValueError(
                f"bits must be 'entropy' where N follows from it, as in strategy 'exact_sum', got {self.bits!r}"
            )
        return max(1, min(math.ceil(entropy + self.c), math.floor(self.c + self.entropy_bits), self.max_bits))

    def bits_for_rms(self, rms: float) -> int:
        """Returns N by the rule of ``bits="rms"`` for a tensor of that root mean square, within the same bounds.

        Example:
            >>> [RangeGrid(c=4, bits="rms").bits_for_rms(rms) for rms in (0.01, 1.0, 6.0, 1e9)]
            [4, 5, 7, 8]
        """
        wanted = math.log2(rms + 1.0) + self.c + 0.5
        return max(1, math.floor(min(wanted, self.max_num_bits)))

    @property
    def max_num_bits(self) -> int:
        """Returns the largest N that a tensor may get."""
        return self.num_bits or max(1, min(math.floor(self.c + self.entropy_bits), self.max_bits))

    def describe(self) -> str:
        """Returns the configuration as one line, equal on all ranks with the same configuration."""
        fields = ("c", "entropy_bits", "sample_fraction", "max_bits", "reconstruction", "num_bits", "seed", "bits")
        return f"RangeGrid({', '.join(f'{name}={getattr(self, name)!r}' for name in fields)})"


Grid = SigmaGrid | RangeGrid
