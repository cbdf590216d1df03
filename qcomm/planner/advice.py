"""Verdict on compression in one sentence: its gain, and the bandwidth up to which it pays."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qcomm.planner.hardware import FABRICS, default_fabric
from qcomm.planner.methods import Method
from qcomm.planner.plan import Request, Speedup, speedup

__all__ = ["Verdict", "at_bandwidth", "bandwidth_text", "break_even", "verdict"]

# A smaller gain is not worth a lossy codec.
WORTH = 1.05
SLOWEST, FASTEST = 0.00125, 200.0  # GB/s: 10 Mb/s to 1.6 Tb/s
POINTS_A_DECADE = 6
# The second network that a sentence mentions.
SLOW, FAST = 1.25, 12.5


@dataclass(frozen=True)
class Verdict:
    """A recommendation.

    Args:
        text: one sentence.
        method: the fastest of qcomm's methods; of equally fast ones, the one with the finer step.
        base: the fastest method without compression.
        gain: speed-up of ``method`` over ``base`` on the requested network.
        pays: whether the gain is worth a lossy codec.
        break_even_gb_per_s: bandwidth at which both are equally fast; None if compression never wins, infinite if it
            always does.
    """

    text: str
    method: str
    base: str
    gain: Speedup
    pays: bool
    break_even_gb_per_s: float | None


def bandwidth_text(gb_per_s: float) -> str:
    """Formats a bandwidth in bits a second, the unit of network vendors.

    Example:
        >>> bandwidth_text(12.5), bandwidth_text(0.0125), bandwidth_text(4.7321)
        ('100 Gb/s', '100 Mb/s', '37.9 Gb/s')
    """
    gigabits = 8 * gb_per_s
    if gigabits >= 1000:
        return f"{gigabits / 1000:.3g} Tb/s"
    return f"{gigabits:.3g} Gb/s" if gigabits >= 1 else f"{1000 * gigabits:.3g} Mb/s"


def at_bandwidth(request: Request, gb_per_s: float, same_fabric: bool) -> Request:
    """Returns the request on another network, of the usual kind for that rate unless ``same_fabric``."""
    fabric = request.fabric if same_fabric else FABRICS[default_fabric(gb_per_s)]
    return replace(request, network_gb_per_s=gb_per_s, fabric=fabric)


def break_even(request: Request, method: Method, base: Method, same_fabric: bool = False) -> float | None:
    """Returns the bandwidth in GB/s above which ``method`` is never faster than ``base``.

    Returns:
        None if it is never faster, infinity if it still is at 1.6 Tb/s.
    """

    def faster(gb_per_s: float) -> bool:
        return speedup(at_bandwidth(request, gb_per_s, same_fabric), method, base, bars=False).factor > 1.0

    if request.gpus <= request.gpus_per_node:
        return None  # no network is used
    decades = math.log10(FASTEST / SLOWEST)
    count = round(decades * POINTS_A_DECADE)
    rates = [FASTEST * 10 ** (-decades * i / count) for i in range(count + 1)]
    for number, rate in enumerate(rates):
        if faster(rate):
            if number == 0:
                return math.inf
            low, high = rate, rates[number - 1]
            break
    else:
        return None
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if faster(middle) else (low, middle)
    return math.sqrt(low * high)


def verdict(request: Request, methods: Sequence[Method], same_fabric: bool = False) -> Verdict | None:
    """Recommends a method for the request's network.

    Args:
        request: the model and the cluster.
        methods: the methods to compare.
        same_fabric: whether other bandwidths are of the same kind of network.

    Returns:
        None if the methods do not hold both qcomm and something without compression.
    """
    plain = [method for method in methods if not method.compresses]
    coded = [method for method in methods if method.name.startswith("qcomm")]
    if not plain or not coded:
        return None
    base = min(plain, key=lambda method: 1 / speedup(request, method, plain[0], bars=False).factor)
    gains = [speedup(request, method, base, bars=False).factor for method in coded]
    best = next(method for method, gain in zip(coded, gains, strict=True) if gain * WORTH >= max(gains))
    gain, limit = speedup(request, best, base), break_even(request, best, base, same_fabric)
    here, step = bandwidth_text(request.network_gb_per_s), best.name.removeprefix("qcomm-")
    if request.gpus <= request.gpus_per_node:
        text = f"on {request.gpus} GPU{'s' * (request.gpus > 1)} of one node leave it off: no network is used"
        return Verdict(text, best.name, base.name, gain, False, None)
    if limit is None:
        end = f"no bandwidth from {bandwidth_text(SLOWEST)} up makes it faster"
    elif limit == math.inf:
        end = f"it is faster at any bandwidth up to {bandwidth_text(FASTEST)}"
    else:
        end = f"break-even {bandwidth_text(limit)}"
    pays = gain.factor >= WORTH
    bars = f"{gain.low:.2g} to {gain.high:.2g}"
    if pays:
        text = f"at {here}: {gain.factor:.2g}x faster than {base.name} with k={step} (likely {bars}); {end}"
        if gain.low < 1:
            text += "; not certain, so measure before relying on it"
    else:
        text = f"at {here}: leave it off ({gain.factor:.2f}x {base.name}'s speed with k={step}, likely {bars}); {end}"
    other = FAST if pays else SLOW
    if (pays and request.network_gb_per_s < other) or (not pays and request.network_gb_per_s > other):
        there = speedup(at_bandwidth(request, other, same_fabric), best, base, bars=False).factor
        what = f"{there:.2g}x faster" if there >= WORTH else "leave it off"
        text += f"; at {bandwidth_text(other)}: {what}" if there >= WORTH or pays else ""
    return Verdict(text, best.name, base.name, gain, pays, limit)
