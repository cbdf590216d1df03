"""The command ``qcomm plan``: the prediction of a training step, and advice on compression."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from qcomm.cli.options import option, takes
from qcomm.collectives import LinkProfile, Profile
from qcomm.planner import (
    ASSUMED_CODEC,
    FABRICS,
    GPUS,
    INSIDE,
    JITTER,
    MODEL_NAMES,
    SCHEDULERS,
    SWEEPS,
    Codec,
    Ddp,
    Fabric,
    Horovod,
    Method,
    ModelProfile,
    PlanError,
    Request,
    Scheduler,
    anchored,
    assumed_codec,
    assumptions,
    bandwidth_text,
    built_in,
    check_plots,
    chrome_trace,
    default_fabric,
    document,
    estimate,
    gpu_named,
    heat_map,
    inside_link,
    is_infiniband,
    method_named,
    no_verdict,
    parse_bandwidth,
    plot_efficiency,
    plot_heat_map,
    predict,
    print_estimate,
    print_table,
    sweep,
    trace_step,
    verdict,
)

__all__ = ["PLAN_HELP", "plan"]

LEAST_WIDTH = 100
DISTANT_US = 1000.0
METHODS = "fp32,bf16,powersgd-2,qcomm-1,qcomm-2,qcomm-3.2"

PLAN_HELP = """Predict a training step on a cluster, and say whether compressing gradients pays there.

[bold]Examples[/bold]

Summit-like nodes: [green]qcomm plan --model resnet50 --gpu v100 --gpus-per-node 6 --nodes 256 --network 200Gbps
--inside 40GB/s[/green]

From which bandwidth on it stops paying: [green]qcomm plan --network 10Gbps --sweep bandwidth --out plan[/green]

A cluster with effective 4.1 Gb/s: [green]qcomm plan --model bert-large --batch 16 --precision amp --gpus-per-node 4
--nodes 4 --network 4.1Gbps --fabric exact --no-overlap --methods fp16,qcomm-1[/green]

Horovod: [green]qcomm plan --scheduler horovod --sweep gpus --nodes 128[/green]
"""

_MODEL, _CLUSTER, _EXCHANGE, _OUTPUT = "Model", "Cluster", "Gradient exchange", "Output"


@dataclass(frozen=True)
class PlanOptions:
    """The options of ``qcomm plan`` as they were given. None is an option that was left out.

    Raises:
        PlanError: a value that is out of its range, or options that contradict each other. :class:`Request` and its
            parts check the rest.
    """

    model: str = field(default="resnet50", metadata=option("One of {choices}.", _MODEL, choices=MODEL_NAMES))
    batch: int = field(default=32, metadata=option("Samples a GPU and step.", _MODEL))
    sequence: int | None = field(
        default=None, metadata=option("Tokens a sample.", _MODEL, shown="128 for BERT, 1024 for GPT-2")
    )
    precision: str = field(
        default=Request.precision, metadata=option("Of computing: fp32 (TF32 where there is that) or amp.", _MODEL)
    )
    samples: int | None = field(default=None, metadata=option("In an epoch.", _MODEL, shown="ImageNet's for images"))
    gpu: str = field(default="v100", metadata=option("One of {choices}.", _CLUSTER, choices=GPUS))
    samples_per_second: float | None = field(
        default=None, metadata=option("Of one GPU that is alone, measured by you.", _CLUSTER)
    )
    node_samples_per_second: float | None = field(
        default=None,
        metadata=option("Of all GPUs of one node together, measured by you with the first of --methods.", _CLUSTER),
    )
    gpus_per_node: int = field(default=8, metadata=option("GPUs of a full node.", _CLUSTER))
    nodes: int | None = field(default=None, metadata=option("Full nodes.", _CLUSTER, shown="4"))
    gpus: int | None = field(default=None, metadata=option("In all, instead of --nodes.", _CLUSTER))
    network: str | None = field(
        default=None,
        metadata=option("Rate of a node, e.g. 100Gbps, 10GbE or HDR.", _CLUSTER, shown="100Gbps, or --profile's"),
    )
    fabric: str | None = field(
        default=None,
        metadata=option(
            "One of {choices}; exact: the rate is what gradients get.",
            _CLUSTER,
            choices=FABRICS,
            shown="guessed: tcp below 40 Gb/s, otherwise rdma",
        ),
    )
    efficiency: float | None = field(
        default=None, metadata=option("Share of the rate for gradients.", _CLUSTER, shown="the fabric's")
    )
    latency_us: float | None = field(
        default=None, metadata=option("Of a hop between nodes.", _CLUSTER, shown="the fabric's")
    )
    congestion: float | None = field(
        default=None,
        metadata=option("Fraction of the time that each doubling of nodes adds.", _CLUSTER, shown="the fabric's"),
    )
    inside: str | None = field(
        default=None,
        metadata=option(
            "Links of a node: {choices}, or a rate each GPU.",
            _CLUSTER,
            choices=INSIDE,
            shown="the GPU's usual ones",
        ),
    )
    straggler: float = field(
        default=JITTER,
        metadata=option("Standard deviation of a rank's computing time, a fraction.", _CLUSTER),
    )
    profile: Path | None = field(
        default=None,
        metadata=option("Measured link and codec, from qcomm bench --save-profile.", _CLUSTER),
    )
    methods: str = field(
        default=METHODS,
        metadata=option(
            "fp32, fp16, bf16, powersgd-R, qcomm-K with K = 1, 2, 3.2, 3.4, averager-H every H steps; with commas.",
            _EXCHANGE,
        ),
    )
    codec_gbps: float | None = field(
        default=None,
        metadata=option(
            "10^9 bytes of fp32 gradients that a GPU's codec handles a second: an assumption.",
            _EXCHANGE,
            shown=f"{ASSUMED_CODEC.encode_gb_per_s:g}, a model's for A100 and H100, or --profile's",
        ),
    )
    scheduler: str = field(default="ddp", metadata=option("One of {choices}.", _EXCHANGE, choices=SCHEDULERS))
    overlap: bool = field(
        default=Ddp.overlap, metadata=option("Exchange during backward, not after it (DDP).", _EXCHANGE)
    )
    bucket_mb: float = field(default=Ddp.bucket_mib, metadata=option("Of DDP, MiB.", _EXCHANGE))
    cycle_ms: float = field(default=Horovod.cycle_ms, metadata=option("Of Horovod.", _EXCHANGE))
    fusion_mb: float = field(default=Horovod.fusion_mib, metadata=option("Of Horovod, MiB.", _EXCHANGE))
    sweep: str | None = field(default=None, metadata=option("Along {choices}.", _OUTPUT, choices=SWEEPS))
    out: Path | None = field(
        default=None, metadata=option("Directory for plan.json, efficiency.png and speedup.png.", _OUTPUT)
    )
    trace: Path | None = field(
        default=None,
        metadata=option("A simulated step of each method for chrome://tracing, in this directory.", _OUTPUT),
    )

    def __post_init__(self) -> None:
        for name, choices in (("fabric", FABRICS), ("scheduler", SCHEDULERS)):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise PlanError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
        for name, value in (("samples", self.samples), ("gpus_per_node", self.gpus_per_node)):
            if value is not None and value < 1:
                raise PlanError(f"{name} is {value}; it must be at least 1")
        in_nodes = None if self.nodes is None else self.nodes * self.gpus_per_node
        if self.gpus is not None and in_nodes not in (None, self.gpus):
            raise PlanError(
                f"gpus is {self.gpus}, but {self.nodes} nodes of {self.gpus_per_node} are {in_nodes}; "
                "give one of the two"
            )
        if self.gpus is None and self.nodes is not None and self.nodes < 1:
            raise PlanError(f"nodes is {self.nodes}; it must be at least 1")
        if self.samples_per_second is not None and self.node_samples_per_second is not None:
            raise PlanError("give --samples-per-second of one GPU or --node-samples-per-second, not both")
        if self.scheduler == "horovod" and not self.overlap:
            raise PlanError("--no-overlap belongs to --scheduler ddp: Horovod exchanges during backward")
        if self.codec_gbps is not None and not 0 < self.codec_gbps < 1e6:
            raise PlanError(
                f"codec_gbps is {self.codec_gbps}; it must be positive, in GB/s of fp32 gradients, such as 25"
            )

    @property
    def same_fabric(self) -> bool:
        """True where a sweep over bandwidths keeps the kind of network."""
        return self.fabric is not None or self.profile is not None

    def request(self) -> Request:
        """Reads the profile, and builds the question to the planner."""
        measured = None if self.profile is None else _read_profile(self.profile)
        rate, fabric = self._network(measured)
        request = Request(
            model=self._model(),
            batch=self.batch,
            gpus=self._all_gpus(),
            gpus_per_node=self.gpus_per_node,
            network_gb_per_s=rate,
            gpu=gpu_named(self.gpu),
            precision=self.precision,
            fabric=fabric,
            efficiency=self.efficiency,
            inside=self._inside(measured),
            scheduler=self._scheduler(),
            codec=self._codec(measured),
            jitter=self.straggler,
            samples_per_second=self.samples_per_second,
            fabric_is_assumed=not self.same_fabric and not is_infiniband(self.network or ""),
        )
        if self.node_samples_per_second is None:
            return request
        first = method_named(self.methods.split(",")[0].strip())
        return anchored(request, self.node_samples_per_second, first)

    def _all_gpus(self) -> int:
        if self.gpus is not None:
            return self.gpus
        return (4 if self.nodes is None else self.nodes) * self.gpus_per_node

    def _model(self) -> ModelProfile:
        profile = built_in(self.model, self.sequence)
        return profile if self.samples is None else profile.with_dataset(self.samples)

    def _network(self, measured: Profile | None) -> tuple[float, Fabric]:
        if measured is not None and self.network is None:
            rate, fabric = measured.link.gb_per_s, replace(FABRICS["exact"], latency_us=measured.link.latency_us)
        else:
            rate = parse_bandwidth(self.network or "100Gbps")
            guessed = "rdma" if is_infiniband(self.network or "") else default_fabric(rate)
            fabric = FABRICS[self.fabric or guessed]
        if self.latency_us is not None:
            fabric = replace(fabric, latency_us=self.latency_us)
        if self.congestion is not None:
            fabric = replace(fabric, congestion=self.congestion)
        return rate, fabric

    def _inside(self, measured: Profile | None) -> LinkProfile | None:
        if self.inside is not None:
            return inside_link(self.inside)
        return None if measured is None else measured.inside

    def _codec(self, measured: Profile | None) -> Codec:
        if self.codec_gbps is not None:
            return replace(ASSUMED_CODEC, encode_gb_per_s=self.codec_gbps, decode_gb_per_s=self.codec_gbps)
        if measured is None:
            return assumed_codec(gpu_named(self.gpu))
        codec = measured.codec
        return Codec(codec.encode_gb_per_s, codec.decode_gb_per_s, on_gpu=False, assumed=False, ratio=codec.ratio)

    def _scheduler(self) -> Scheduler:
        if self.scheduler == "ddp":
            return Ddp(bucket_mib=self.bucket_mb, overlap=self.overlap)
        return Horovod(cycle_ms=self.cycle_ms, fusion_mib=self.fusion_mb)


@takes(PlanOptions, PlanError, OSError)
def plan(options: PlanOptions) -> None:
    """Predicts the step with every method, prints the advice, and writes the files that were asked for."""
    if options.out is not None:
        check_plots()
    methods = [method_named(name.strip()) for name in options.methods.split(",")]
    request = options.request()
    # A narrower table is torn, and a file or a pipe has no width of its own.
    console = Console(width=max(Console().width, LEAST_WIDTH))
    points = [("", request)] if options.sweep is None else sweep(request, options.sweep, options.same_fabric)
    rows = [(label, [predict(at, method) for method in methods]) for label, at in points]
    print_table(console, request, rows)
    found = estimate(request.model, request.batch, request.gpus)
    print_estimate(console, request, found, predict(request, methods[0]).samples_per_second)
    for text in [*assumptions(request), *_doubts(options, request)]:
        console.print(text, style="yellow", highlight=False)
    decision = verdict(request, methods, options.same_fabric)
    if decision is not None:
        console.print(f"Verdict: {decision.text}.", style="bold", highlight=False)
    else:
        console.print(f"No verdict: {no_verdict(methods)}.", style="bold", highlight=False)
    if options.trace is not None:
        _write_traces(request, methods, options.trace)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "plan.json").write_text(document(request, rows, found, decision) + "\n")
        _plot(request, methods, options.same_fabric, options.out)


def _doubts(options: PlanOptions, request: Request) -> list[str]:
    latency = request.fabric.latency_us
    if options.profile is None or options.network is not None or options.latency_us is not None or latency < DISTANT_US:
        return []
    return [
        f"The profile's latency is {latency / 1e3:.3g} ms, as between cities. If the hosts are near each other, they "
        "were busy when it was taken: take it again, or set --latency-us."
    ]


def _read_profile(path: Path) -> Profile:
    try:
        return Profile.load(path)
    except ValueError as error:
        raise PlanError(f"{error}; write one with qcomm bench --save-profile {path}") from error


def _write_traces(request: Request, methods: list[Method], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for method in methods:
        (folder / f"{method.name}.trace.json").write_text(chrome_trace(trace_step(request, method)))


def _plot(request: Request, methods: list[Method], same_fabric: bool, out: Path) -> None:
    place = f"{request.model.name}, batch {request.batch} a GPU, {bandwidth_text(request.network_gb_per_s)}"
    by_gpus = [[predict(at, method) for method in methods] for _, at in sweep(request, "gpus", same_fabric)]
    plot_efficiency(by_gpus, f"{place}, {request.gpus_per_node} GPUs a node", out / "efficiency.png")
    decision = verdict(request, methods, same_fabric)
    if decision is not None:
        names = {method.name: method for method in methods}
        heat = heat_map(request, names[decision.method], names[decision.base], same_fabric)
        title = f"{request.model.name}, batch {request.batch} a GPU, {request.gpus_per_node} GPUs a node"
        if request.codec.assumed:
            title += f"; assumed codec, {request.codec.encode_gb_per_s:g} GB/s"
        plot_heat_map(heat, title, out / "speedup.png")
