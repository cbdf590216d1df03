"""``qcomm plan``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
    PlanError,
    Request,
    Scheduler,
    assumptions,
    bandwidth_text,
    built_in,
    chrome_trace,
    default_fabric,
    document,
    estimate,
    gpu_named,
    heat_map,
    inside_link,
    method_named,
    parse_bandwidth,
    predict,
    print_estimate,
    print_table,
    sweep,
    trace_step,
    verdict,
)

__all__ = ["plan"]

USER_ERROR = 2
LEAST_WIDTH = 100
METHODS = "fp32,bf16,powersgd-2,qcomm-1,qcomm-2"

_MODEL, _CLUSTER, _EXCHANGE, _OUTPUT = "Model", "Cluster", "Gradient exchange", "Output"


def plan(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODEL_NAMES)}.", rich_help_panel=_MODEL)] = "resnet50",
    batch: Annotated[int, typer.Option(help="Samples a GPU and step.", rich_help_panel=_MODEL)] = 32,
    sequence: Annotated[
        int | None,
        typer.Option(help="Tokens a sample.", show_default="128 for BERT, 1024 for GPT-2", rich_help_panel=_MODEL),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="Of computing: fp32 (TF32 where there is that) or amp.", rich_help_panel=_MODEL)
    ] = "fp32",
    samples: Annotated[
        int | None,
        typer.Option(help="In an epoch.", show_default="ImageNet's for images", rich_help_panel=_MODEL),
    ] = None,
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.", rich_help_panel=_CLUSTER)] = "v100",
    samples_per_second: Annotated[
        float | None,
        typer.Option(help="Of one GPU that is alone, measured by you.", rich_help_panel=_CLUSTER),
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a full node.", rich_help_panel=_CLUSTER)] = 8,
    nodes: Annotated[int | None, typer.Option(help="Full nodes.", show_default="4", rich_help_panel=_CLUSTER)] = None,
    gpus: Annotated[int | None, typer.Option(help="In all, instead of --nodes.", rich_help_panel=_CLUSTER)] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="Rate of a node, e.g. 100Gbps.", show_default="100Gbps, or --profile's", rich_help_panel=_CLUSTER
        ),
    ] = None,
    fabric: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(FABRICS)}; exact: the rate is what gradients get.",
            show_default="tcp below 40 Gb/s, otherwise rdma",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(help="Share of the rate for gradients.", show_default="the fabric's", rich_help_panel=_CLUSTER),
    ] = None,
    latency_us: Annotated[
        float | None,
        typer.Option(help="Of a hop between nodes.", show_default="the fabric's", rich_help_panel=_CLUSTER),
    ] = None,
    congestion: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the time that each doubling of nodes adds.",
            show_default="the fabric's",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    inside: Annotated[
        str | None,
        typer.Option(
            help=f"Links of a node: {', '.join(INSIDE)}, or a rate each GPU.",
            show_default="the GPU's usual ones",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    straggler: Annotated[
        float,
        typer.Option(help="Standard deviation of a rank's computing time, a fraction.", rich_help_panel=_CLUSTER),
    ] = JITTER,
    profile: Annotated[
        Path | None,
        typer.Option(help="Measured link and codec, from qcomm bench --save-profile.", rich_help_panel=_CLUSTER),
    ] = None,
    methods: Annotated[
        str,
        typer.Option(help="fp32, fp16, bf16, powersgd-R, qcomm-1, qcomm-2, with commas.", rich_help_panel=_EXCHANGE),
    ] = METHODS,
    codec_gbps: Annotated[
        float | None,
        typer.Option(
            help="10^9 bytes of fp32 gradients that a GPU's codec handles a second: an assumption.",
            show_default=f"{ASSUMED_CODEC.encode_gb_per_s:g}, or --profile's",
            rich_help_panel=_EXCHANGE,
        ),
    ] = None,
    scheduler: Annotated[str, typer.Option(help=f"One of {', '.join(SCHEDULERS)}.", rich_help_panel=_EXCHANGE)] = "ddp",
    overlap: Annotated[
        bool, typer.Option(help="Exchange during backward, not after it (DDP).", rich_help_panel=_EXCHANGE)
    ] = True,
    bucket_mb: Annotated[float, typer.Option(help="Of DDP, MiB.", rich_help_panel=_EXCHANGE)] = 25.0,
    cycle_ms: Annotated[float, typer.Option(help="Of Horovod.", rich_help_panel=_EXCHANGE)] = 1.0,
    fusion_mb: Annotated[float, typer.Option(help="Of Horovod, MiB.", rich_help_panel=_EXCHANGE)] = 128.0,
    sweep_axis: Annotated[
        str | None, typer.Option("--sweep", help=f"Along {', '.join(SWEEPS)}.", rich_help_panel=_OUTPUT)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for plan.json, efficiency.png and speedup.png.", rich_help_panel=_OUTPUT),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="A simulated step of each method for chrome://tracing, in this directory.", rich_help_panel=_OUTPUT
        ),
    ] = None,
) -> None:
    """Predict a training step on a cluster, and say whether compressing gradients pays there.

    [bold]Examples[/bold]

    Summit-like nodes: [green]qcomm plan --model resnet50 --gpu v100 --gpus-per-node 6 --nodes 256 --network 200Gbps
    --inside 40GB/s[/green]

    From which bandwidth on it stops paying: [green]qcomm plan --network 10Gbps --sweep bandwidth --out plan[/green]

    A cluster with effective 4.1 Gb/s: [green]qcomm plan --model bert-large --batch 16 --precision amp --gpus-per-node 4
    --nodes 4 --network 4.1Gbps --fabric exact --no-overlap --methods fp16,qcomm-1[/green]

    Horovod: [green]qcomm plan --scheduler horovod --sweep gpus --nodes 128[/green]
    """
    try:
        chosen = [method_named(name.strip()) for name in methods.split(",")]
        measured = None if profile is None else _read_profile(profile)
        link, between = _network(network, fabric, measured)
        if latency_us is not None:
            between = dataclasses.replace(between, latency_us=latency_us)
        if congestion is not None:
            between = dataclasses.replace(between, congestion=congestion)
        profile_of_model = built_in(model, sequence)
        if samples is not None:
            if samples < 1:
                raise PlanError(f"samples is {samples}; it must be at least 1")
            profile_of_model = profile_of_model.with_dataset(samples)
        request = Request(
            model=profile_of_model,
            batch=batch,
            gpus=_gpus(gpus, nodes, gpus_per_node),
            gpus_per_node=gpus_per_node,
            network_gb_per_s=link,
            gpu=gpu_named(gpu),
            precision=precision,
            fabric=between,
            efficiency=efficiency,
            inside=_inside(inside, measured),
            scheduler=_scheduler(scheduler, overlap, bucket_mb, cycle_ms, fusion_mb),
            codec=_codec(codec_gbps, measured),
            jitter=straggler,
            samples_per_second=samples_per_second,
        )
        _run(request, chosen, sweep_axis, fabric is not None or measured is not None, out, trace)
    except (PlanError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(USER_ERROR) from error


def _run(
    request: Request, methods: list[Method], axis: str | None, same_fabric: bool, out: Path | None, trace: Path | None
) -> None:
    # Narrower than this a table is torn; a file or a pipe has no width of its own.
    console = Console(width=max(Console().width, LEAST_WIDTH))
    points = [("", request)] if axis is None else sweep(request, axis, same_fabric)
    rows = [(label, [predict(at, method) for method in methods]) for label, at in points]
    print_table(console, request, rows)
    found = estimate(request.model, request.batch, request.gpus)
    here = predict(request, methods[0])
    print_estimate(console, request, found, here.samples_per_second)
    for text in assumptions(request):
        console.print(text, style="yellow", highlight=False)
    decision = verdict(request, methods, same_fabric)
    if decision is not None:
        console.print(f"Verdict: {decision.text}.", style="bold", highlight=False)
    if trace is not None:
        trace.mkdir(parents=True, exist_ok=True)
        for method in methods:
            (trace / f"{method.name}.trace.json").write_text(chrome_trace(trace_step(request, method)))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "plan.json").write_text(document(request, rows, found, decision) + "\n")
        _plot(request, methods, same_fabric, out)


def _plot(request: Request, methods: list[Method], same_fabric: bool, out: Path) -> None:
    try:
        from qcomm.planner import plot_efficiency, plot_heat_map
    except ImportError as error:
        raise PlanError(f"plots need {error.name}: pip install 'qcomm[train]', or leave out --out") from error
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


def _read_profile(path: Path) -> Profile:
    try:
        return Profile.load(path)
    except ValueError as error:
        raise PlanError(f"{error}; write one with qcomm bench --save-profile {path}") from error


def _gpus(gpus: int | None, nodes: int | None, gpus_per_node: int) -> int:
    if gpus_per_node < 1:
        raise PlanError(f"gpus_per_node is {gpus_per_node}; it must be at least 1")
    if gpus is not None and nodes is not None and gpus != nodes * gpus_per_node:
        raise PlanError(
            f"gpus is {gpus}, but {nodes} nodes of {gpus_per_node} are {nodes * gpus_per_node}; give one of the two"
        )
    if gpus is not None:
        return gpus
    nodes = 4 if nodes is None else nodes
    if nodes < 1:
        raise PlanError(f"nodes is {nodes}; it must be at least 1")
    return nodes * gpus_per_node


def _network(network: str | None, fabric: str | None, measured: Profile | None) -> tuple[float, Fabric]:
    if fabric is not None and fabric not in FABRICS:
        raise PlanError(f"fabric is {fabric!r}; it must be one of {', '.join(FABRICS)}")
    if measured is not None and network is None:
        return measured.link.gb_per_s, dataclasses.replace(FABRICS["exact"], latency_us=measured.link.latency_us)
    rate = parse_bandwidth(network or "100Gbps")
    return rate, FABRICS[fabric or default_fabric(rate)]


def _inside(inside: str | None, measured: Profile | None) -> LinkProfile | None:
    if inside is not None:
        return inside_link(inside)
    return None if measured is None else measured.inside


def _codec(codec_gbps: float | None, measured: Profile | None) -> Codec:
    if codec_gbps is not None:
        if not 0 < codec_gbps < 1e6:
            raise PlanError(f"codec_gbps is {codec_gbps}; it must be positive, in GB/s of fp32 gradients, such as 25")
        return dataclasses.replace(ASSUMED_CODEC, encode_gb_per_s=codec_gbps, decode_gb_per_s=codec_gbps)
    if measured is None:
        return ASSUMED_CODEC
    codec = measured.codec
    return Codec(codec.encode_gb_per_s, codec.decode_gb_per_s, on_gpu=False, assumed=False, ratio=codec.ratio)


def _scheduler(name: str, overlap: bool, bucket_mib: float, cycle_ms: float, fusion_mib: float) -> Scheduler:
    if name == "ddp":
        return Ddp(bucket_mib=bucket_mib, overlap=overlap)
    if name == "horovod":
        if not overlap:
            raise PlanError("--no-overlap belongs to --scheduler ddp: Horovod exchanges during backward")
        return Horovod(cycle_ms=cycle_ms, fusion_mib=fusion_mib)
    raise PlanError(f"scheduler is {name!r}; it must be one of {', '.join(SCHEDULERS)}")
