"""Work of each exchange method: the time that a bucket takes on codec and link.

A bucket's work is a list of chains, one per slice; a chain is a sequence of steps. ``fp32`` and ``bf16`` (or fp16, at
the same cost) are NCCL's all-reduce, or gloo's. PowerSGD is torch's hook: two all-reduces of factors between products
with the gradient matrices. qcomm compresses between nodes, after an uncompressed reduce-scatter inside each
(``hierarchical``), or between all GPUs (``two_phase``), also those of a single node; the cost model picks the faster.
As in the library with a ``strategy`` other than ``auto``, it compresses even at a loss. An averager exchanges weights
every H steps, after the last one's backward, by qcomm's exchange with k=1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qcomm.collectives import (
    CodecProfile,
    LinkProfile,
    Profile,
    TwoPhase,
    Workload,
    bytes_sent,
    hierarchical_latencies,
    two_phase_times,
)
from qcomm.collectives import seconds as collective_seconds
from qcomm.communicator import CHANNELS
from qcomm.planner.collectives import Cluster, all_reduce, gloo_ring
from qcomm.planner.errors import PlanError
from qcomm.planner.profiles import ParameterTensor

__all__ = ["RATIOS", "Chain", "Codec", "Method", "Setting", "Work", "method_named"]

# Compression of a ResNet-20's gradients, both phases together, including all headers: 2.14 and 1.70 bits a value in
# bench/results/train_digits.json, 0.55 and 0.40 in bench/results/accuracy_low_rate.json.
RATIOS = {1.0: 32 / 2.14, 2.0: 32 / 1.70, 3.2: 32 / 0.55, 3.4: 32 / 0.40}
VALUE_BYTES = 4
# A collective of one value takes about so much of a processor: bench/check_planner_wan.py measures it.
COLLECTIVE_SECONDS = 1e-3

# PowerSGD's kernels for one matrix: copies, two products and their back, the error, and for each rank the steps of an
# orthogonalisation; each waits for the one before it.
POWERSGD_KERNELS, POWERSGD_KERNELS_PER_RANK = 25, 12
KERNEL_SECONDS = 10e-6
POWERSGD_PASSES = 8  # over the gradient: reading it thrice, error feedback, writing the result
MOST_RANK = 128
MOST_PERIOD = 100_000
POWERSGD_LEAST_RATIO = 2  # torch's min_compression_rate: other tensors are not compressed


class Work(NamedTuple):
    """A step: ``resource`` is "codec", "link", or "wait" for latency that occupies neither."""

    resource: str
    seconds: float
    label: str


Chain = tuple[Work, ...]


@dataclass(frozen=True)
class Codec:
    """qcomm's codec.

    Args:
        encode_gb_per_s, decode_gb_per_s: 10^9 bytes of uncompressed values a second on each GPU's codec.
        on_gpu: whether the codec takes its time from backward: its kernels are assumed to fill the GPU.
        assumed: whether the rates are unmeasured.
        ratio: ratio measured with a step of one standard deviation; that of ``RATIOS`` by default.
        collective_seconds: processor time of a bucket whatever its size: handing it over, headers, messages.
    """

    encode_gb_per_s: float
    decode_gb_per_s: float
    on_gpu: bool
    assumed: bool
    ratio: float = RATIOS[1.0]
    collective_seconds: float = COLLECTIVE_SECONDS

    def profile(self, step: float) -> CodecProfile:
        """Returns the cost model's profile for a grid whose step is ``step`` standard deviations."""
        ratio = max(1.0, self.ratio * RATIOS[step] / RATIOS[1.0])
        return CodecProfile(self.encode_gb_per_s, self.decode_gb_per_s, ratio)


@dataclass(frozen=True)
class Setting:
    """The surroundings of an exchange of gradients."""

    cluster: Cluster
    codec: Codec
    memory_gb_per_s: float


@dataclass(frozen=True)
class Method:
    """A way to exchange gradients.

    Args:
        name: name in ``--methods``.
        compresses: whether it is qcomm or another lossy codec, the subject of a verdict.
        chains: makes the chains of a bucket in a setting.
        channels: buckets that are exchanged at once, 0 where a bucket need not wait for others.
        period: steps from one exchange to the next.
    """

    name: str
    compresses: bool
    chains: Callable[[Sequence[ParameterTensor], Setting], list[Chain]]
    channels: int = 0
    period: int = 1

    @property
    def is_qcomm(self) -> bool:
        """Returns whether the codec is qcomm's."""
        return self.channels > 0


def _elements(bucket: Sequence[ParameterTensor]) -> int:
    return sum(tensor.elements for tensor in bucket)


def _sum(cluster: Cluster, size: float) -> Chain:
    """Returns the library's own all-reduce."""
    if not cluster.is_gloo:
        return (Work("link", all_reduce(cluster, size), "all-reduce"),)
    return tuple(Work(kind, seconds, "all-reduce") for kind, seconds in gloo_ring(cluster, size))


def _fp32(bucket: Sequence[ParameterTensor], setting: Setting) -> list[Chain]:
    return [_sum(setting.cluster, VALUE_BYTES * _elements(bucket))]


def _half(bucket: Sequence[ParameterTensor], setting: Setting) -> list[Chain]:
    elements = _elements(bucket)
    cast = elements * (VALUE_BYTES + 2) / (1e9 * setting.memory_gb_per_s)
    send = _sum(setting.cluster, 2 * elements)
    return [(Work("codec", cast, "cast"), *send, Work("codec", cast, "cast back"))]


def _powersgd(rank: int) -> Callable[[Sequence[ParameterTensor], Setting], list[Chain]]:
    def chains(bucket: Sequence[ParameterTensor], setting: Setting) -> list[Chain]:
        left = right = matrices = whole = compressed = 0
        for tensor in bucket:
            rows = tensor.shape[0] if tensor.shape else 1
            columns = tensor.elements // max(rows, 1)
            if len(tensor.shape) > 1 and (rows + columns) * rank * POWERSGD_LEAST_RATIO < tensor.elements:
                left, right, matrices = left + rows * rank, right + columns * rank, matrices + 1
                compressed += tensor.elements
            else:
                whole += tensor.elements
        launches = matrices * (POWERSGD_KERNELS + POWERSGD_KERNELS_PER_RANK * rank) * KERNEL_SECONDS
        passes = POWERSGD_PASSES * VALUE_BYTES * compressed / (1e9 * setting.memory_gb_per_s)
        third = (launches + passes) / 3
        return [
            (
                Work("codec", third, "first factor"),
                Work("link", all_reduce(setting.cluster, VALUE_BYTES * (whole + left)), "all-reduce"),
                Work("codec", third, "second factor"),
                Work("link", all_reduce(setting.cluster, VALUE_BYTES * right), "all-reduce"),
                Work("codec", third, "product"),
            )
        ]

    return chains


def _qcomm(step: float) -> Callable[[Sequence[ParameterTensor], Setting], list[Chain]]:
    def chains(bucket: Sequence[ParameterTensor], setting: Setting) -> list[Chain]:
        first, *others = exchange(bucket, setting)
        # The host's processors do this, not the GPU: backward goes on.
        kind = "wait" if setting.codec.on_gpu else "codec"
        return [(Work(kind, setting.codec.collective_seconds, "begin"), *first), *others]

    def exchange(bucket: Sequence[ParameterTensor], setting: Setting) -> list[Chain]:
        cluster = setting.cluster
        elements = _elements(bucket)
        if cluster.nodes == 1:
            profile = Profile(cluster.inside, setting.codec.profile(step))
            return _slices(two_phase_times(Workload(elements, cluster.gpus, VALUE_BYTES), profile))
        # A node's GPUs all send at once.
        link = LinkProfile(cluster.between.gb_per_s / cluster.local, cluster.between.latency_us)
        profile = Profile(link, setting.codec.profile(step), cluster.inside)
        workload = Workload(elements, cluster.gpus, VALUE_BYTES, cluster.local)
        flat = collective_seconds("two_phase", workload, profile)
        if cluster.local > 1 and collective_seconds("hierarchical", workload, profile) < flat:
            return [_hierarchical(workload, profile)]
        return _slices(two_phase_times(workload, profile))

    return chains


def _slices(steps: TwoPhase) -> list[Chain]:
    first = (
        Work("codec", steps.encode, "encode"),
        Work("link", steps.exchange, "packets"),
        Work("wait", steps.latency, "latency"),
        Work("codec", steps.reduce, "reduce"),
        Work("link", steps.exchange, "means"),
        Work("wait", steps.latency, "latency"),
        Work("codec", steps.decode, "decode"),
    )
    later = (first[0], Work("wait", steps.handshake, "headers"), *first[1:])
    return [first, *[later] * (steps.slices - 1)]


def _hierarchical(workload: Workload, profile: Profile) -> Chain:
    """Returns one chain, as in the library: each GPU codes its share of the node's sum, including its own chunk."""
    inner, world = workload.ranks_per_node, workload.world_size
    between, inside = bytes_sent("hierarchical", workload, profile.codec.ratio)
    encode, decode = 1e-9 / profile.codec.encode_gb_per_s, 1e-9 / profile.codec.decode_gb_per_s
    near, share = profile.inside or profile.link, workload.value_bytes / inner
    scatter, values, means, gather = hierarchical_latencies(workload, profile)
    carried, step = between / 2 / (1e9 * profile.link.gb_per_s), inside / 2 / (1e9 * near.gb_per_s)
    return (
        Work("link", step, "reduce-scatter"),
        Work("wait", scatter, "latency"),
        Work("codec", encode * share, "encode"),
        Work("link", carried, "packets"),
        Work("wait", values, "latency"),
        Work("codec", decode * share + encode * workload.value_bytes / world, "reduce"),
        Work("link", carried, "means"),
        Work("wait", means, "latency"),
        Work("codec", decode * share, "decode"),
        Work("link", step, "all-gather"),
        Work("wait", gather, "latency"),
    )


def method_named(name: str) -> Method:
    """Returns a method by its name in ``--methods``.

    Args:
        name: "fp32", "fp16", "bf16", "powersgd-R" with a rank R, "qcomm-K" with a step of K = 1, 2, 3.2 or 3.4
            deviations, "averager-H" for an exchange every H steps.

    Raises:
        PlanError: there is no such method.

    Example:
        >>> method_named("qcomm-1").compresses, method_named("bf16").compresses
        (True, False)
    """
    if name == "fp32":
        return Method(name, False, _fp32)
    if name in ("fp16", "bf16"):
        return Method(name, False, _half)
    kind, _, number = name.partition("-")
    if kind == "powersgd" and number.isdecimal() and 1 <= int(number) <= MOST_RANK:
        return Method(name, True, _powersgd(int(number)))
    if kind == "qcomm" and number in {f"{step:g}" for step in RATIOS}:
        return Method(name, True, _qcomm(float(number)), CHANNELS)
    if kind == "averager" and number.isdecimal() and 2 <= int(number) <= MOST_PERIOD:
        return Method(name, True, _qcomm(1.0), channels=1, period=int(number))
    raise PlanError(
        f"method is {name!r}; it must be fp32, fp16, bf16, powersgd-1 to powersgd-{MOST_RANK}, "
        f"qcomm-1, qcomm-2, qcomm-3.2, qcomm-3.4, or averager-2 to averager-{MOST_PERIOD}"
    )
