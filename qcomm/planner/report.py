"""Printed tables and JSON documents of ``qcomm plan``."""

import dataclasses
import json
import math
from collections.abc import Sequence
from math import prod
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from qcomm.planner.advice import Verdict, bandwidth_text
from qcomm.planner.estimate import Estimate
from qcomm.planner.plan import ASSUMED_CODEC, Prediction, Request, assumed_codec, other_fabric

__all__ = ["assumptions", "document", "memory_at_least", "print_estimate", "print_table"]

GB = 1e9
Rows = Sequence[tuple[str, Sequence[Prediction]]]


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def assumptions(request: Request) -> list[str]:
    """Lists the unmeasured inputs of the prediction, one sentence each."""
    codec, found = request.codec, []
    if codec.assumed:
        speed = f"codes {codec.encode_gb_per_s:g}"
        modelled = codec == assumed_codec(request.gpu) != ASSUMED_CODEC
        if modelled:
            speed = f"encodes {codec.encode_gb_per_s:g} and decodes {codec.decode_gb_per_s:g}"
        found.append(
            f"ASSUMED, not measured: qcomm {speed} GB/s of fp32 gradients on each GPU"
            f"{', by a model of its compiled kernels' if modelled else ''}. Its "
            "kernels and its NCCL path have never run on one; set --codec-gbps to what you believe."
        )
    elif not codec.on_gpu:
        found.append("The codec is the profile's, on the CPU; copies between GPU and CPU are not counted.")
    if request.fabric_is_assumed and request.gpus > request.gpus_per_node:
        other = other_fabric(request)
        found.append(
            f"ASSUMED from the rate: the network is {request.fabric.name}, with "
            f"{_gigabits(request)} Gb/s for gradients; {other.fabric.name} would have {_gigabits(other)}. Say --fabric."
        )
    if request.gpu is not None and request.samples_per_second is None and not request.model.measured_batch:
        found.append(
            f"Computing is that of a preset, {request.gpu.name} to {request.gpu.uncertainty:.0%}; "
            "--samples-per-second of one GPU of yours would be better, --node-samples-per-second best."
        )
    least, room = memory_at_least(request), None if request.gpu is None else request.gpu.memory_gb
    if room is not None and least > room:
        found.append(
            f"It does NOT FIT: weights, gradients, an optimizer's moment and the outputs of layers take at least "
            f"{least:.3g} GB, and {request.gpu.name if request.gpu else ''} has {room:g} GB at most."
        )
    return found


def _gigabits(request: Request) -> str:
    return f"{8 * request.cluster.between.gb_per_s:.3g}"


def memory_at_least(request: Request) -> float:
    """Returns a lower bound of the GB that training takes on a GPU; 0 for a measured profile, which has fitted."""
    model = request.model
    if model.measured_batch:
        return 0.0
    # Weights, gradients and one moment in float32.
    kept = 12.0 * model.parameters
    # A matrix's output has as many values as its operations over twice its rows' length. Before a normalization, and
    # behind it, a convolution's output is kept twice.
    outputs = sum(
        tensor.forward_flops / (2 * prod(tensor.shape[1:])) for tensor in model.tensors if len(tensor.shape) > 1
    )
    copies = 2 if model.family == "resnet" else 1
    return 1e-9 * (kept + request.batch * outputs * copies * (4 if request.precision == "fp32" else 2))


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")


def print_table(console: Console, request: Request, rows: Rows) -> None:
    """Prints one line per method and point."""
    model, cluster = request.model, request.cluster
    place = f"{request.gpus} GPUs on {cluster.nodes} nodes, {bandwidth_text(request.network_gb_per_s)} a node"
    title = f"{model.name}, {model.parameters / 1e6:.1f} M parameters, batch {request.batch} a GPU, {place}"
    guessed = ", assumed" if request.fabric_is_assumed else ""
    table = _table(f"{title} ({request.fabric.name}{guessed})")
    several = len(rows) > 1
    if several:
        table.add_column("point", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for name in ("step ms", "likely", f"{model.sample}/s", "effic.", "exposed", "link ms", "hidden", "codec"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, predictions in rows:
        for number, p in enumerate(predictions):
            cells = [label if number == 0 else ""] if several else []
            cells += [p.method, _milliseconds(p.seconds), f"{_milliseconds(p.low)} … {_milliseconds(p.high)}"]
            cells += [f"{p.samples_per_second:.0f}", f"{p.efficiency:.1%}", _milliseconds(p.exposed)]
            cells += [_milliseconds(p.link), f"{p.overlap:.0%}", _milliseconds(p.codec)]
            table.add_row(*cells)
    console.print(table)


def print_estimate(console: Console, request: Request, found: Estimate, samples_per_second: float) -> None:
    """Prints the volume of data and gradients, which is independent of the method."""
    model = request.model
    table = _table("What moves, each GPU, fp32 gradients in a ring")
    table.add_column("")
    for name in ("data values", "bytes", "gradients", "their bytes", "to data", "in bytes"):
        table.add_column(name, justify="right")
    rows = [("a step", 1.0)]
    if found.steps_per_epoch:
        rows.append((f"an epoch, {found.steps_per_epoch:.0f} steps", found.steps_per_epoch))
    for label, steps in rows:
        data = f"{steps * found.data_values_per_step:.3g}", f"{steps * found.data_bytes_per_step / GB:.3g} GB"
        sent = f"{steps * found.gradient_values_per_step:.3g}", f"{steps * found.gradient_bytes_per_step / GB:.3g} GB"
        table.add_row(label, *data, *sent, f"{found.values_ratio:.3g}", f"{found.bytes_ratio:.3g}")
    console.print(table)
    storage = samples_per_second * model.sample_bytes
    console.print(
        f"As many gradient as data values at batch {found.equal_values_batch:.0f} a GPU, as many bytes at "
        f"{found.equal_bytes_batch:.0f}. Storage must deliver {storage / GB:.3g} GB/s of uncompressed samples in all, "
        f"{storage / request.cluster.nodes / GB:.3g} GB/s a node.",
        highlight=False,
    )


def _finite(value: Any) -> Any:
    """Replaces infinity and NaN by None, since JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def document(request: Request, rows: Rows, found: Estimate, decision: Verdict | None) -> str:
    """Returns the whole plan as JSON; a null break-even with ``pays`` true lies beyond all networks."""
    cluster = request.cluster
    return json.dumps(
        _finite(
            {
                "model": {"name": request.model.name, "parameters": request.model.parameters},
                "batch": request.batch,
                "precision": request.precision,
                "gpu": None if request.gpu is None else request.gpu.name,
                "samples_per_second_of_one_gpu": request.batch / request.times.step,
                "cluster": dataclasses.asdict(cluster) | {"nodes": cluster.nodes},
                "network_gb_per_s": request.network_gb_per_s,
                "fabric": dataclasses.asdict(request.fabric),
                "scheduler": {"name": type(request.scheduler).__name__, **dataclasses.asdict(request.scheduler)},
                "codec": dataclasses.asdict(request.codec),
                "straggler": request.jitter,
                "assumptions": assumptions(request),
                "points": [
                    {"point": label, "predictions": [dataclasses.asdict(p) for p in row]} for label, row in rows
                ],
                "estimate": dataclasses.asdict(found),
                "verdict": None if decision is None else dataclasses.asdict(decision),
            }
        ),
        indent=1,
    )
