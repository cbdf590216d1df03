"""Predictions of a training step with error bars, and the speed-up that compression gives."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from qcomm.collectives import LinkProfile
from qcomm.planner.collectives import GLOO_AT_ONCE, Cluster
from qcomm.planner.compute import ComputeTimes, compute_times
from qcomm.planner.errors import PlanError
from qcomm.planner.hardware import FABRICS, INSIDE, Fabric, Gpu, pcie_among
from qcomm.planner.methods import Codec, Method, Setting
from qcomm.planner.profiles import ModelProfile
from qcomm.planner.schedulers import Ddp, Scheduler
from qcomm.planner.simulator import DRAWS, Job, Step, mean_step, simulate, slowest_factors

__all__ = [
    "ASSUMED_CODEC",
    "JITTER",
    "MOST_GPUS",
    "Prediction",
    "Request",
    "Speedup",
    "anchored",
    "assumed_codec",
    "other_fabric",
    "predict",
    "simulated",
    "speedup",
    "trace_step",
    "variations",
]

MOST_GPUS = 65_536
# dietGPU codes at 250 GB/s and more on an A100, entropy coding alone. A tenth of that is assumed until it is measured,
# where there is no model of qcomm's own kernels.
ASSUMED_CODEC = Codec(25.0, 25.0, on_gpu=True, assumed=True)
JITTER = 0.02

# Uncertainties of the inputs, as factors.
NETWORK_FACTOR, LATENCY_FACTOR, JITTER_FACTOR = 1.1, 2.0, 2.0
MEASURED_FACTOR = 1.03  # of a step that was measured on the planned machine
CODEC_FACTOR, ASSUMED_CODEC_FACTOR = 1.2, 4.0
# Uncertainties of the model itself. Frameworks take more or less than TENSOR_SECONDS for a tensor, feed several GPUs
# less well than one, and reach a part of what nccl-tests measures.
TENSOR_FACTOR, TOGETHER_FACTOR, INSIDE_FACTOR, ALGORITHM_FACTOR = 3.0, 1.06, 2.0, 1.3
ANCHOR_STEPS = 40  # of a bisection: far below any error


def assumed_codec(gpu: Gpu | None) -> Codec:
    """Returns the codec's assumed speed on a GPU.

    A GPU without a model of the codec's kernels gets ``ASSUMED_CODEC``.

    Example:
        >>> from qcomm.planner.hardware import GPUS
        >>> assumed_codec(GPUS["v100"]) == ASSUMED_CODEC, assumed_codec(GPUS["h100"]).encode_gb_per_s > 100
        (True, True)
    """
    if gpu is None or gpu.codec_gb_per_s is None:
        return ASSUMED_CODEC
    encode, decode = gpu.codec_gb_per_s
    return replace(ASSUMED_CODEC, encode_gb_per_s=encode, decode_gb_per_s=decode)


@dataclass(frozen=True)
class Request:
    """The question to the planner: a model on GPUs behind a network.

    Args:
        model: profile of the model.
        batch: samples per GPU and step.
        gpus, gpus_per_node: size of the cluster, at most ``MOST_GPUS``.
        network_gb_per_s: nominal rate of a node, 10^9 bytes a second each way.
        gpu: preset; None with a measured profile or rate.
        precision: computing precision, "fp32" or "amp"; gradients are fp32 unless a method casts them.
        fabric: kind of network, which determines the usable share of its rate.
        efficiency: usable share of the rate, in place of the fabric's.
        inside: links of a node; the GPU's usual ones by default.
        scheduler: DDP's buckets or Horovod's cycles.
        codec: qcomm's codec.
        jitter: standard deviation of a rank's computing time, as a fraction.
        samples_per_second: measured rate of one GPU that trains alone, if known.
        fabric_is_assumed: whether nobody has named the kind of network.
        node_is_measured: whether the rate comes from a node that was measured, see :func:`anchored`.
        tensor_factor, together_factor: errors of the model, which :func:`variations` changes.

    Raises:
        PlanError: a field is out of its range; the message names it and a valid value.

    Example:
        >>> from qcomm.planner.hardware import GPUS
        >>> from qcomm.planner.methods import method_named
        >>> from qcomm.planner.models import built_in
        >>> request = Request(built_in("resnet50"), 32, 64, 4, network_gb_per_s=0.5, gpu=GPUS["v100"])
        >>> speedup(request, method_named("qcomm-1"), method_named("bf16")).factor > 1.2
        True
    """

    model: ModelProfile
    batch: int
    gpus: int
    gpus_per_node: int
    network_gb_per_s: float
    gpu: Gpu | None = None
    precision: str = "fp32"
    fabric: Fabric = FABRICS["rdma"]
    efficiency: float | None = None
    inside: LinkProfile | None = None
    scheduler: Scheduler = field(default_factory=Ddp)
    codec: Codec = ASSUMED_CODEC
    jitter: float = JITTER
    samples_per_second: float | None = None
    fabric_is_assumed: bool = False
    node_is_measured: bool = False
    tensor_factor: float = 1.0
    together_factor: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.gpus <= MOST_GPUS:
            raise PlanError(f"gpus is {self.gpus}; it must be in 1..{MOST_GPUS}")
        if not (math.isfinite(self.network_gb_per_s) and self.network_gb_per_s > 0):
            raise PlanError(
                f"network_gb_per_s is {self.network_gb_per_s}; it must be positive, such as 12.5 for 100 Gb/s"
            )
        if self.efficiency is not None and not 0 < self.efficiency <= 1:
            raise PlanError(f"efficiency is {self.efficiency}; it must be above 0 and at most 1, the share of the rate")

    @property
    def cluster(self) -> Cluster:
        """Returns the GPUs with their effective links."""
        inside = self.inside or INSIDE["pcie" if self.gpu is None else self.gpu.inside]
        if inside == INSIDE["pcie"]:
            inside = pcie_among(max(1, min(self.gpus, self.gpus_per_node)))
        nodes = max(1, self.gpus // max(1, self.gpus_per_node))
        between = self.fabric.link(self.network_gb_per_s, nodes, self.efficiency)
        return Cluster(self.gpus, self.gpus_per_node, between, inside, self.fabric.is_gloo)

    @property
    def times(self) -> ComputeTimes:
        """Returns the computing times of one GPU that trains alone."""
        return compute_times(self.model, self.batch, self.gpu, self.precision, self.samples_per_second)

    @property
    def times_together(self) -> ComputeTimes:
        """Returns the computing times of each GPU in the cluster."""
        if self.gpus == 1:
            return self.times
        return self.times.together(self.tensor_factor, self.together_factor)


@dataclass(frozen=True)
class Prediction:
    """The step of a method. Seconds are means over the jitter of the slowest rank.

    Args:
        method: name of the method.
        gpus: number of GPUs.
        seconds, low, high: seconds of a step, and their likely bounds.
        samples_per_second: rate of all GPUs together.
        efficiency, efficiency_low, efficiency_high: rate relative to as many GPUs that do not exchange.
        exposed: seconds after backward until the last gradient is exchanged.
        overlap: share of the link's time that backward hides.
        link, codec: seconds in which each is busy.
    """

    method: str
    gpus: int
    seconds: float
    low: float
    high: float
    samples_per_second: float
    efficiency: float
    efficiency_low: float
    efficiency_high: float
    exposed: float
    overlap: float
    link: float
    codec: float


@dataclass(frozen=True)
class Speedup:
    """The factor by which a method is faster than another, with its likely bounds."""

    factor: float
    low: float
    high: float


def jobs(request: Request, method: Method) -> list[Job]:
    """Returns the buckets of a step and their work."""
    memory = 900.0 if request.gpu is None else request.gpu.memory_gb_per_s  # a V100's
    cluster = request.cluster
    setting = Setting(cluster, request.codec, memory)
    scheduler = request.scheduler if method.period == 1 else Ddp(overlap=False)
    buckets = scheduler.buckets(
        request.model, request.times_together, request.gpus, cluster.nodes, cluster.between.latency_us
    )
    channels = method.channels or (GLOO_AT_ONCE if cluster.is_gloo else 0)
    found = []
    for number, bucket in enumerate(buckets):
        chains = method.chains(bucket.tensors, setting) if request.gpus > 1 else []
        channel = number % channels if channels else None
        found.append(Job(bucket.ready, bucket.delay if request.gpus > 1 else 0.0, chains, channel))
    return found


def simulated(request: Request, method: Method, draws: int = DRAWS) -> Step:
    """Returns the mean step over ``draws`` quantiles of the slowest rank's jitter."""

    def step(factor: float) -> Step:
        return _simulate(request, method, work, factor)

    work = jobs(request, method)
    factors = slowest_factors(request.gpus, request.jitter, draws)
    steps = [step(factor) for factor in factors]
    if method.period > 1:
        # Ranks wait for each other in the last step of a period alone, and their jitter has averaged out by then.
        alone = request.times.step
        spread = 1 / math.sqrt(method.period)
        waits = [1 + (factor - 1) * spread for factor in factors]
        steps = [_every(step(wait), alone * wait, method.period) for wait in waits]
    return mean_step(steps)


def _every(last: Step, alone: float, period: int) -> Step:
    """Returns the mean step of a period, whose last step exchanges and whose others take ``alone``."""
    return Step(
        seconds=(last.seconds + (period - 1) * alone) / period,
        exposed=last.exposed / period,
        link=last.link / period,
        link_after=last.link_after / period,
        codec=last.codec / period,
    )


def anchored(request: Request, node_samples_per_second: float, method: Method) -> Request:
    """Returns the request with the computing rate at which a full node of it reaches a measured rate.

    Args:
        request: whose ``samples_per_second`` is replaced.
        node_samples_per_second: of all GPUs of one node together, that train without another node.
        method: by which they exchanged their gradients.

    Raises:
        PlanError: the rate is not positive, or no computing is fast enough for it on these links.
    """
    if not (math.isfinite(node_samples_per_second) and node_samples_per_second > 0):
        raise PlanError(f"node_samples_per_second is {node_samples_per_second}; it must be positive and finite")
    gpus = min(request.gpus, request.gpus_per_node)
    wanted = request.batch * gpus / node_samples_per_second
    slowest, fastest = node_samples_per_second / gpus, 1000 * node_samples_per_second / gpus

    def at(rate: float) -> Request:
        return replace(request, samples_per_second=rate, node_is_measured=True)

    if simulated(replace(at(fastest), gpus=gpus), method, draws=1).seconds > wanted:
        raise PlanError(
            f"node_samples_per_second is {node_samples_per_second:g}: exchanging gradients alone takes longer on "
            f"{gpus} GPUs with {request.cluster.inside.gb_per_s:g} GB/s; give --inside as measured"
        )
    for _ in range(ANCHOR_STEPS):
        middle = math.sqrt(slowest * fastest)
        if simulated(replace(at(middle), gpus=gpus), method, draws=1).seconds > wanted:
            slowest = middle
        else:
            fastest = middle
    return at(fastest)


def trace_step(request: Request, method: Method) -> Step:
    """Returns one step with its spans, at the median jitter of the slowest rank."""
    factor = slowest_factors(request.gpus, request.jitter, draws=1)[0]
    return _simulate(request, method, jobs(request, method), factor)


def _simulate(request: Request, method: Method, work: Sequence[Job], factor: float) -> Step:
    # PowerSGD and casts always run on the GPU, and take all of it.
    codec_share = 0.0 if method.is_qcomm and not request.codec.on_gpu else 1.0
    # NCCL's collectives of a group wait for each other, those of gloo share the link as TCP's streams do. qcomm's
    # channels do, too, but what was measured between distant hosts is nearer to one after another.
    shares_link = request.cluster.is_gloo and not method.is_qcomm
    return simulate(request.times_together, work, factor=factor, codec_share=codec_share, shares_link=shares_link)


def _scaled_network(request: Request, rate: float, latency: float) -> Request:
    fabric = replace(
        request.fabric,
        most_gb_per_s=request.fabric.most_gb_per_s * rate,
        latency_us=request.fabric.latency_us * latency,
    )
    return replace(request, network_gb_per_s=request.network_gb_per_s * rate, fabric=fabric)


def other_fabric(request: Request) -> Request:
    """Returns the request on the other kind of network, TCP or RDMA."""
    return replace(request, fabric=FABRICS["rdma" if request.fabric.name == "tcp" else "tcp"])


def _scaled_inside(request: Request, factor: float) -> Request:
    inside = request.cluster.inside
    return replace(request, inside=replace(inside, gb_per_s=inside.gb_per_s * factor))


def _scaled_compute(request: Request, factor: float) -> Request:
    return replace(request, samples_per_second=factor * request.batch / request.times.step)


def _scaled_codec(request: Request, factor: float) -> Request:
    codec = request.codec
    return replace(
        request,
        codec=replace(
            codec, encode_gb_per_s=factor * codec.encode_gb_per_s, decode_gb_per_s=factor * codec.decode_gb_per_s
        ),
    )


def variations(request: Request) -> Iterator[tuple[str, Request]]:
    """Yields the request with one input at a time changed by its uncertainty, to both sides."""
    measured = request.samples_per_second is not None or request.model.measured_batch > 0
    compute = MEASURED_FACTOR if measured or request.gpu is None else 1 + request.gpu.uncertainty
    codec = ASSUMED_CODEC_FACTOR if request.codec.assumed else CODEC_FACTOR
    network = NETWORK_FACTOR * (1.0 if request.fabric.name == "exact" else ALGORITHM_FACTOR)
    changes: list[tuple[str, float, Callable[[Request, float], Request]]] = [
        ("compute", compute, _scaled_compute),
        ("network", network, lambda r, f: _scaled_network(r, f, 1.0)),
        ("latency", LATENCY_FACTOR, lambda r, f: _scaled_network(r, 1.0, f)),
        ("straggler", JITTER_FACTOR, lambda r, f: replace(r, jitter=min(0.5, r.jitter * f))),
        ("codec", codec, _scaled_codec),
    ]
    if not request.node_is_measured:
        changes += [
            ("tensors", TENSOR_FACTOR, lambda r, f: replace(r, tensor_factor=r.tensor_factor * f)),
            ("together", TOGETHER_FACTOR, lambda r, f: replace(r, together_factor=r.together_factor * f)),
            ("inside", INSIDE_FACTOR, _scaled_inside),
        ]
    for name, factor, change in changes:
        yield name, change(request, factor)
        yield name, change(request, 1 / factor)
    if request.fabric_is_assumed:
        yield "fabric", other_fabric(request)


def _bounds(value: float, others: Sequence[float]) -> tuple[float, float]:
    """Adds deviations of independent inputs as squares, those below and those above ``value`` apart."""
    below = math.sqrt(sum(min(0.0, other - value) ** 2 for other in others))
    above = math.sqrt(sum(max(0.0, other - value) ** 2 for other in others))
    return max(0.0, value - below), value + above


def predict(request: Request, method: Method) -> Prediction:
    """Predicts the step of a method, with error bars from the uncertainties of its inputs."""
    step = simulated(request, method)
    alone = request.times.step
    others = [(other.times.step, simulated(other, method, draws=1).seconds) for _, other in variations(request)]
    low, high = _bounds(step.seconds, [seconds for _, seconds in others])
    efficiency = alone / step.seconds
    worst, best = _bounds(efficiency, [single / seconds for single, seconds in others])
    samples = request.batch * request.gpus
    return Prediction(
        method.name,
        request.gpus,
        step.seconds,
        low,
        high,
        samples / step.seconds,
        efficiency,
        worst,
        min(best, 1.0),
        step.exposed,
        step.overlap,
        step.link,
        step.codec,
    )


def speedup(request: Request, method: Method, base: Method, bars: bool = True) -> Speedup:
    """Returns the speed-up of ``method`` over ``base``, under the same errors of the inputs."""

    def factor(at: Request) -> float:
        return simulated(at, base, draws=1).seconds / simulated(at, method, draws=1).seconds

    value = factor(request)
    low, high = _bounds(value, [factor(other) for _, other in variations(request)]) if bars else (value, value)
    return Speedup(value, low, high)
