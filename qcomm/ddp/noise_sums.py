"""Sums of what each step says about gradient noise, and the estimates that follow from them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcomm.ddp.tail_index import from_sums

__all__ = ["NoiseEstimate", "NoiseSums"]

# Sums: number of steps, trace, squared norm, quantization, and squares and product of the first two of these. The sums
# of tail indices follow.
FIGURES = 7


@dataclass(frozen=True)
class NoiseEstimate:
    """Gradient noise of a tensor, or of all, as one rank sees it.

    Attributes:
        steps: that were measured.
        noise_scale: trace / squared_norm, the simple noise scale in samples. None where the squared norm was not found
            to be positive, which takes more steps.
        noise_scale_error: its standard error; None with it, or with one step.
        trace: of the covariance of one sample's gradient.
        squared_norm: of the true gradient.
        quantization: mean squared error of an averaged gradient by the exchange, summed over elements.
        tail_index: of the noise, over elements; None for a tensor of fewer than 1,024.
        tail_index_over_steps: of the noise of each element over steps; None also before 16 steps.
    """

    steps: int
    noise_scale: float | None
    noise_scale_error: float | None
    trace: float
    squared_norm: float
    quantization: float
    tail_index: float | None
    tail_index_over_steps: float | None


class NoiseSums:
    """Sums over the measured steps, by tensor and of all tensors together."""

    def __init__(self) -> None:
        self._tensors: dict[str, list[float]] = {}
        self._total = _nothing()

    def add(self, figures: Mapping[str, Sequence[float]], tails: Mapping[str, Sequence[float]]) -> None:
        """Adds a step.

        Args:
            figures: trace, squared norm and quantization of each tensor by name.
            tails: 1 / alpha over elements, number of measurements, and the same over steps, of some tensors.
        """
        for name, row in figures.items():
            sums = self._tensors.setdefault(name, _nothing())
            _add(sums, row)
            for number, value in enumerate(tails.get(name, ())):
                sums[FIGURES + number] += value
                self._total[FIGURES + number] += value
        _add(self._total, [math.fsum(column) for column in zip(*figures.values(), strict=True)])

    def total(self) -> NoiseEstimate:
        """Returns the estimate of all tensors together. Its tail indices are means of ``1 / alpha`` over tensors."""
        return _estimate(self._total)

    def tensors(self) -> dict[str, NoiseEstimate]:
        """Returns the estimate of each tensor."""
        return {name: _estimate(sums) for name, sums in self._tensors.items()}

    def to_lists(self) -> dict[str, Any]:
        """Returns the sums as lists of numbers, for a checkpoint."""
        return {"total": list(self._total), "tensors": {name: list(sums) for name, sums in self._tensors.items()}}

    @classmethod
    def from_lists(cls, saved: object) -> "NoiseSums":
        """Returns the sums of a checkpoint.

        Raises:
            ValueError: it is damaged.
        """
        if not isinstance(saved, Mapping) or not isinstance(saved.get("tensors"), Mapping):
            raise ValueError(f"state_dict is damaged: gradient_noise must have total and tensors, got {saved!r:.80}")
        sums = cls()
        sums._total = _checked("total", saved.get("total"))
        sums._tensors = {str(name): _checked(str(name), row) for name, row in saved["tensors"].items()}
        return sums


def _nothing() -> list[float]:
    return [0.0] * (FIGURES + 4)


def _add(sums: list[float], row: Sequence[float]) -> None:
    trace, squared_norm, quantization = row
    products = trace * trace, trace * squared_norm, squared_norm * squared_norm
    for number, value in enumerate((1.0, trace, squared_norm, quantization, *products)):
        sums[number] += value


def _estimate(sums: Sequence[float]) -> NoiseEstimate:
    steps, trace, squared_norm, quantization, *products = sums[:FIGURES]
    n = max(steps, 1.0)
    trace, squared_norm = trace / n, squared_norm / n
    scale = trace / squared_norm if squared_norm > 0 else None
    error = None
    if scale is not None and steps > 1:
        # The variance of a ratio of means, to first order.
        spread = (products[0] - 2 * scale * products[1] + scale * scale * products[2]) / n
        error = math.sqrt(max(spread, 0.0) / (n - 1)) / squared_norm
    tails = from_sums(*sums[FIGURES : FIGURES + 2]), from_sums(*sums[FIGURES + 2 :])
    return NoiseEstimate(int(steps), scale, error, trace, squared_norm, quantization / n, *tails)


def _checked(name: str, row: object) -> list[float]:
    numbers = [float(value) for value in row if _is_finite(value)] if isinstance(row, list) else []
    if not isinstance(row, list) or not len(numbers) == len(row) == FIGURES + 4 or numbers[0] < 0:
        raise ValueError(
            f"state_dict is damaged: gradient_noise of {name!r} must be {FIGURES + 4} finite numbers, got {row!r:.80}"
        )
    return numbers


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
