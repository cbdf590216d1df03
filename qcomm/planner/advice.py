"""Verdict on compression in a few sentences: its gain, the bandwidth up to which it pays, and what may change it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qcomm.planner.hardware import FABRICS, default_fabric
from qcomm.planner.methods import Method, method_named
from qcomm.planner.plan import Request, Speedup, other_fabric, simulated, speedup

__all__ = ["Verdict", "at_bandwidth", "bandwidth_text", "break_even", "no_verdict", "verdict"]

# A smaller gain is not worth a lossy codec.
WORTH = 1.05
SLOWEST, FASTEST = 0.00125, 200.0  # GB/s: 10 Mb/s to 1.6 Tb/s
POINTS_A_DECADE = 6
# The second network that a sentence mentions.
SLOW, FAST = 1.25, 12.5
# Where even the best method leaves a GPU idle for more than this share of the time, exchanging in every step is not the
# plan to follow.
HOPELESS = 0.5
HINTED_PERIOD = 100


@dataclass(frozen=True)
class Verdict:
    """A recommendation.

    Args:
        text: a few sentences.
        method: the fastest method that compresses in every step; of equally fast ones, the first.
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
    if same_fabric:
        return replace(request, network_gb_per_s=gb_per_s)
    fabric = FABRICS[default_fabric(gb_per_s)]
    # What was said of the latency holds on any network.
    if request.fabric.latency_us != FABRICS[request.fabric.name].latency_us:
        fabric = replace(fabric, latency_us=request.fabric.latency_us)
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


def no_verdict(methods: Sequence[Method]) -> str:
    """Returns why :func:`verdict` cannot decide between these methods; "" if it can."""
    if not any(not method.compresses for method in methods):
        return "no method without compression to compare with; add fp32 or bf16 to --methods"
    if not any(method.compresses and method.period == 1 for method in methods):
        return "no method that compresses in every step; add qcomm-1 or powersgd-2 to --methods"
    return ""


def verdict(request: Request, methods: Sequence[Method], same_fabric: bool = False) -> Verdict | None:
    """Recommends a method for the request's network.

    Args:
        request: the model and the cluster.
        methods: the methods to compare.
        same_fabric: whether other bandwidths are of the same kind of network.

    Returns:
        None where :func:`no_verdict` has a reason.
    """
    if no_verdict(methods):
        return None
    best, base, gains = _best(request, methods)
    gain, limit = speedup(request, best, base), break_even(request, best, base, same_fabric)
    pays = gain.factor >= WORTH
    bars, single = f"{gain.low:.2g} to {gain.high:.2g}", request.gpus <= request.gpus_per_node
    here = _place(request) if single else f"at {bandwidth_text(request.network_gb_per_s)}"
    if pays:
        text = f"{here}: {gain.factor:.2g}x faster than {base.name} with {_label(best)} (likely {bars})"
    else:
        text = f"{here}: leave it off ({gain.factor:.2f}x {base.name}'s speed with {_label(best)}, likely {bars})"
    own = max((gains[method] for method in gains if method.is_qcomm), default=None)
    if pays and not best.is_qcomm and own is not None:
        text += f", {own:.2g}x with qcomm"
    if not single:
        text += f"; {_end(limit)}"
    if pays and gain.low < 1:
        text += "; not certain, so measure before relying on it"
    other = FAST if pays else SLOW
    if not single and ((pays and request.network_gb_per_s < other) or (not pays and request.network_gb_per_s > other)):
        there = speedup(at_bandwidth(request, other, same_fabric), best, base, bars=False).factor
        what = f"{there:.2g}x faster" if there >= WORTH else "leave it off"
        text += f"; at {bandwidth_text(other)}: {what}" if there >= WORTH or pays else ""
    text += _on_other_fabric(request, methods, best, pays)
    text += _hint(request, methods)
    return Verdict(text, best.name, base.name, gain, pays, limit)


def _best(request: Request, methods: Sequence[Method]) -> tuple[Method, Method, dict[Method, float]]:
    """Returns the fastest method that compresses, the fastest that does not, and the gains of all that do."""
    plain = [method for method in methods if not method.compresses]
    coded = [method for method in methods if method.compresses and method.period == 1]
    base = min(plain, key=lambda method: 1 / speedup(request, method, plain[0], bars=False).factor)
    gains = {method: speedup(request, method, base, bars=False).factor for method in coded}
    best = next(method for method, gain in gains.items() if gain * WORTH >= max(gains.values()))
    return best, base, gains


def _label(method: Method) -> str:
    return f"k={method.name.removeprefix('qcomm-')}" if method.is_qcomm else method.name


def _place(request: Request) -> str:
    inside = request.cluster.inside
    return f"on {request.gpus} GPU{'s' * (request.gpus > 1)} of one node, {inside.gb_per_s:g} GB/s inside"


def _end(limit: float | None) -> str:
    if limit is None:
        return f"no bandwidth from {bandwidth_text(SLOWEST)} up makes it faster"
    if limit == math.inf:
        return f"it is faster at any bandwidth up to {bandwidth_text(FASTEST)}"
    return f"break-even {bandwidth_text(limit)}"


def _on_other_fabric(request: Request, methods: Sequence[Method], best: Method, pays: bool) -> str:
    """Returns the verdict on the other kind of network, where nobody has named it and it differs."""
    if not request.fabric_is_assumed or request.gpus <= request.gpus_per_node:
        return ""
    there = other_fabric(request)
    found, base, gains = _best(there, methods)
    factor = gains[found]
    if (factor >= WORTH) == pays and (not pays or found == best):
        return ""
    what = f"{factor:.2g}x faster than {base.name} with {_label(found)}" if factor >= WORTH else "leave it off"
    return (
        f". This takes the network for {request.fabric.name}; if it is {there.fabric.name}, {what} "
        f"(--fabric {there.fabric.name})"
    )


def _hint(request: Request, methods: Sequence[Method]) -> str:
    """Returns the advice to exchange less often, where no exchange in every step keeps the GPUs busy."""
    alone = request.times.step
    busy = max(alone / simulated(request, method, draws=1).seconds for method in methods if method.period == 1)
    if request.gpus == 1 or busy >= HOPELESS:
        return ""
    rare = simulated(request, method_named(f"averager-{HINTED_PERIOD}"), draws=1).seconds
    return (
        f". Even so GPUs compute for {busy:.0%} of the time: averaging weights every {HINTED_PERIOD} steps would make "
        f"it {alone / rare:.0%} (--methods averager-{HINTED_PERIOD}, qcomm.CompressedModelAverager); what it costs in "
        "accuracy is not predicted"
    )
