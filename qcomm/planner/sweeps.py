"""Sweeps of requests along one axis, and the grid of a heat map."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qcomm.planner.advice import at_bandwidth
from qcomm.planner.errors import PlanError
from qcomm.planner.methods import Method
from qcomm.planner.plan import MOST_GPUS, Request, speedup

__all__ = ["BANDWIDTHS", "SWEEPS", "HeatMap", "gpu_counts", "heat_map", "sweep"]

SWEEPS = ("gpus", "bandwidth", "batch")
BANDWIDTHS = tuple(gigabits / 8 for gigabits in (0.1, 1, 2.5, 5, 10, 25, 40, 100, 200, 400))  # GB/s
MOST_BATCH_FACTOR = 4


def gpu_counts(request: Request) -> list[int]:
    """Returns 1, one node, then doubling nodes up to the requested number, which is the last."""
    node = min(request.gpus, request.gpus_per_node)
    counts = [1, node]
    while counts[-1] * 2 < request.gpus:
        counts.append(counts[-1] * 2)
    return sorted({*counts, request.gpus})


def sweep(request: Request, axis: str, same_fabric: bool = False) -> list[tuple[str, Request]]:
    """Returns requests along an axis, each with a label for its difference.

    Args:
        request: the base, from which the others differ along the axis only.
        axis: one of ``SWEEPS``.
        same_fabric: whether all bandwidths are of the same kind of network.

    Raises:
        PlanError: there is no such axis.

    Example:
        >>> from qcomm.planner.hardware import GPUS
        >>> from qcomm.planner.models import built_in
        >>> request = Request(built_in("resnet18"), 32, 24, 6, 1.25, gpu=GPUS["v100"])
        >>> [label for label, _ in sweep(request, "gpus")], [label for label, _ in sweep(request, "batch")]
        (['1 GPU', '6 GPUs', '12 GPUs', '24 GPUs'], ['batch 8', 'batch 16', 'batch 32', 'batch 64', 'batch 128'])
    """
    if axis == "gpus":
        return [(f"{count} GPU{'s' * (count > 1)}", replace(request, gpus=count)) for count in gpu_counts(request)]
    if axis == "bandwidth":
        return [(f"{8 * rate:g} Gb/s", at_bandwidth(request, rate, same_fabric)) for rate in BANDWIDTHS]
    if axis == "batch":
        factors = (1 / MOST_BATCH_FACTOR, 1 / 2, 1, 2, MOST_BATCH_FACTOR)
        batches = sorted({max(1, round(request.batch * factor)) for factor in factors})
        return [(f"batch {batch}", replace(request, batch=batch)) for batch in batches]
    raise PlanError(f"sweep is {axis!r}; it must be one of {', '.join(SWEEPS)}")


@dataclass(frozen=True)
class HeatMap:
    """Speed-ups: ``factors[i][j]`` at ``bandwidths[i]`` GB/s with ``gpus[j]``."""

    method: str
    base: str
    bandwidths: tuple[float, ...]
    gpus: tuple[int, ...]
    factors: tuple[tuple[float, ...], ...]


def heat_map(request: Request, method: Method, base: Method, same_fabric: bool = False) -> HeatMap:
    """Returns speed-ups by bandwidth and number of GPUs: two nodes up to eight times the requested number."""
    node = request.gpus_per_node
    counts = [2 * node]
    while counts[-1] < min(MOST_GPUS // 2, max(16 * node, 8 * request.gpus)):
        counts.append(counts[-1] * 2)
    counts = [count for count in counts if count <= MOST_GPUS]
    if not counts:
        raise PlanError(f"gpus_per_node is {node}; a map over nodes needs at most {MOST_GPUS // 2}")
    rows: list[Sequence[float]] = []
    for rate in BANDWIDTHS:
        there = at_bandwidth(request, rate, same_fabric)
        rows.append([speedup(replace(there, gpus=count), method, base, bars=False).factor for count in counts])
    return HeatMap(method.name, base.name, BANDWIDTHS, tuple(counts), tuple(map(tuple, rows)))
