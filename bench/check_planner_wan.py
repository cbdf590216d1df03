"""The planner's error on distant hosts: its predictions against steps that bench_wan.py measures. Linux, as root.

    python bench/check_planner_wan.py --json bench/results/planner_wan.json       # 32 scenes, half an hour
    python bench/check_planner_wan.py --quick                                      # 4 scenes
    python bench/check_planner_wan.py --hosts 2 --rates 1gbit --delays 0 50 --models 5x520
    python bench/check_planner_wan.py --measured bench/results/planner_wan.json    # its steps, predicted anew

A scene is a model of equal linear layers, each a bucket, on hosts with one rate and one delay between any two. The
exposed time of a step, of torch's fp32 all-reduce and of qcomm k=1 with two_phase, is compared with `qcomm.planner`'s
prediction. Its inputs are the rate that tc or the hub lets through, 1448 bytes of values in a frame of 1514, the
delay and the planner's own latency of TCP, and the processors' part, from steps of the same models by as many
processes without links: the hosts share this machine's cores. Nothing is fitted to times with links. TCP's congestion
control is cubic, Linux's default: BBR spreads a message over a part of the round trip, which the planner does not know.

Exits with 1 if fewer than 80 % of the points are within 15 %, or inside the bars that the planner calls likely.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from netlab import NetlabError
from ranks import LOOPBACK, RanksError, about, explain, is_rank, run_ranks, start_rank, write
from wan import Wan, bits_per_second

import qcomm
from qcomm.collectives import measure_codec
from qcomm.planner import FABRICS, Codec, Ddp, ModelProfile, ParameterTensor, Request, method_named, predict

BENCH_WAN = Path(__file__).with_name("bench_wan.py")
METHODS = {"fp32": "fp32", "qcomm k=1": "qcomm-1"}  # here, and in the planner
TOLERANCE, NEEDED = 0.15, 0.8
FRAME, VALUES = 1514, 1448
CODEC_ELEMENTS, CODEC_REPEATS, COLLECTIVE_REPEATS = 1 << 20, 9, 100
UNLIMITED_GB_PER_S = 100.0  # as fast as sockets are
FASTER_THAN_LINKS = 1e9  # samples a second: next to nothing is computed
QUICK = 4
FIT_ROUNDS = 30
CONTROL = "cubic"


class Scene(NamedTuple):
    """Hosts, their links, and the layers of a model, of width x width values each."""

    hosts: int
    rate: str
    delay_ms: float
    layers: int
    width: int


def layers_of(text: str) -> tuple[int, int]:
    """Layers and their width, as in 5x520.

    Example:
        >>> layers_of("5x520")
        (5, 520)
    """
    layers, _, width = text.partition("x")
    if not (layers.isdecimal() and width.isdecimal() and int(layers) > 0):
        raise argparse.ArgumentTypeError(f"must be layers x width, such as 5x520, got {text!r}")
    return int(layers), int(width)


def request_of(scene: Scene, codec: Codec) -> Request:
    """The scene as a question to the planner."""
    tensors = [ParameterTensor(f"layer{i}", (scene.width, scene.width), 1.0) for i in range(scene.layers)]
    model = ModelProfile("layers", "resnet", tuple(tensors), "samples", scene.width, 4 * scene.width)
    gloo = FABRICS["gloo"]
    latency = gloo.latency_us + 1e3 * scene.delay_ms
    fabric = replace(gloo, efficiency=VALUES / FRAME, latency_us=latency, congestion=0.0)
    tiny = 2.0**-20  # MiB: every layer is a bucket
    return Request(
        model,
        1,
        scene.hosts,
        1,
        UNLIMITED_GB_PER_S if scene.rate == LOOPBACK else bits_per_second(scene.rate) / 8e9,
        fabric=fabric,
        scheduler=Ddp(first_mib=tiny, bucket_mib=tiny),
        codec=codec,
        samples_per_second=FASTER_THAN_LINKS,
    )


def time_codec() -> Codec:
    """The codec of this rank and its processor time of a collective, while all ranks use theirs. A collective."""
    values = torch.randn(CODEC_ELEMENTS, generator=torch.Generator().manual_seed(0))
    dist.barrier()
    found = measure_codec(values, qcomm.SigmaGrid(step=1.0), repeats=CODEC_REPEATS)
    one, taken = torch.ones(1), []
    for _ in range(COLLECTIVE_REPEATS):
        begin = time.process_time()
        qcomm.all_reduce(one, strategy="two_phase")
        taken.append(time.process_time() - begin)
    return Codec(
        found.encode_gb_per_s,
        found.decode_gb_per_s,
        on_gpu=False,
        assumed=False,
        ratio=found.ratio,
        collective_seconds=statistics.median(taken),
    )


def run_rank() -> None:
    """On all ranks; rank 0 prints one line of JSON, of the slowest ones."""
    rank, world_size = start_rank()
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, asdict(time_codec()))
    if rank == 0:
        slowest = {name: min(one[name] for one in found) for name in ("encode_gb_per_s", "decode_gb_per_s")}
        taken = max(one["collective_seconds"] for one in found)
        print(json.dumps({**found[0], **slowest, "collective_seconds": taken}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def codec_among(hosts: int, models: Sequence[tuple[int, int]], steps: int) -> Codec:
    """The codec of a host while all hosts use this machine's cores: from steps of the models without links."""
    scenes = [Scene(hosts, LOOPBACK, 0.0, *model) for model in models]
    taken = {scene: measure(scene, steps, ["qcomm k=1"])[0]["exposed_seconds"] for scene in scenes}
    return fitted(Codec(**run_ranks(__file__, [], hosts)), taken)


def fitted(codec: Codec, taken: Mapping[Scene, float]) -> Codec:
    """The codec with which steps without links take as long as measured.

    The largest model's step sets the rates, whose ratio is kept, and the smallest one's, where it is another, the time
    of a collective.
    """
    smallest, *_, largest = sorted([*taken, *taken], key=lambda scene: scene.layers * scene.width**2)
    for _ in range(FIT_ROUNDS):
        factor = taken[largest] / step_seconds(largest, codec)
        codec = replace(
            codec, encode_gb_per_s=codec.encode_gb_per_s / factor, decode_gb_per_s=codec.decode_gb_per_s / factor
        )
        if smallest != largest:
            factor = taken[smallest] / step_seconds(smallest, codec)
            codec = replace(codec, collective_seconds=codec.collective_seconds * min(2.0, max(0.5, factor)))
    return codec


def step_seconds(scene: Scene, codec: Codec) -> float:
    """What the planner says of qcomm k=1."""
    return predict(request_of(scene, codec), method_named(METHODS["qcomm k=1"])).seconds


def point(scene: Scene, row: dict[str, Any], codec: Codec) -> dict[str, Any]:
    """A measured row of bench_wan beside its prediction."""
    found = predict(request_of(scene, codec), method_named(METHODS[row["method"]]))
    measured = row["exposed_seconds"]
    kept = {name: row[name] for name in ("method", "p10", "p90")}
    return {
        **scene._asdict(),
        **kept,
        "seconds": measured,
        "predicted": found.seconds,
        "low": found.low,
        "high": found.high,
        "error": found.seconds / measured - 1,
        "likely": found.low <= measured <= found.high,
    }


def measure(scene: Scene, steps: int, methods: Sequence[str] = tuple(METHODS)) -> list[dict[str, Any]]:
    """Rows of bench_wan."""
    options = [f"--buckets={scene.layers}", f"--width={scene.width}", f"--steps={steps}"]
    options += ["--methods", *methods, "--delay-ms", str(scene.delay_ms)]
    wan = Wan(delay_ms=scene.delay_ms, control=CONTROL) if scene.delay_ms else None
    rows: list[dict[str, Any]] = run_ranks(BENCH_WAN, options, scene.hosts, scene.rate, wan=wan)
    return rows


def measured_rows(document: dict[str, Any]) -> tuple[dict[Scene, list[dict[str, Any]]], dict[int, Codec]]:
    """The rows of an earlier run by scene, and the codecs by number of hosts."""
    found: dict[Scene, list[dict[str, Any]]] = {}
    for one in document["points"]:
        scene = Scene(**{name: one[name] for name in Scene._fields})
        row = {"exposed_seconds": one["seconds"], **{name: one[name] for name in ("method", "p10", "p90")}}
        found.setdefault(scene, []).append(row)
    return found, {int(hosts): Codec(**codec) for hosts, codec in document["codecs"].items()}


def shares(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How many points are within the tolerance, and inside the bars."""
    return {
        "within_15_percent": sum(abs(one["error"]) <= TOLERANCE for one in points) / len(points),
        "likely_holds": sum(one["likely"] for one in points) / len(points),
    }


def show(one: dict[str, Any]) -> None:
    place = f"{one['hosts']} hosts {one['rate']:>8} {one['delay_ms']:>4g} ms {one['layers']} x {one['width']:<5}"
    bars = f"({1e3 * one['low']:.0f} .. {1e3 * one['high']:.0f})"
    print(f"{place}{one['method']:<10}{1e3 * one['seconds']:>8.0f} ms, predicted {1e3 * one['predicted']:>6.0f} "
          f"{bars:<16}{one['error']:>+7.1%}", file=sys.stderr, flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"], help="as tc writes them")
    parser.add_argument("--delays", nargs="+", type=float, default=[0.0, 5.0, 20.0, 50.0], help="ms one way")
    parser.add_argument("--models", nargs="+", type=layers_of, default=[(5, 520), (3, 1150)], help="layers x width")
    parser.add_argument("--steps", type=int, default=9, help="that are counted, of each method")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} of the scenes")
    parser.add_argument("--measured", type=Path, help="figures of an earlier run, for which there are new predictions")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    if is_rank():
        run_rank()
        return 0
    axes = itertools.product(arguments.hosts, arguments.rates, arguments.delays, arguments.models)
    scenes = [Scene(hosts, rate, delay, *model) for hosts, rate, delay, model in axes]
    earlier = json.loads(arguments.measured.read_text()) if arguments.measured else {}
    known, codecs = measured_rows(earlier) if earlier else ({}, {})
    scenes = list(known) or scenes
    if arguments.quick:
        scenes = scenes[:: max(1, len(scenes) // QUICK + 1)]
    header, points = about(steps=arguments.steps, control=CONTROL), []
    models = sorted({(scene.layers, scene.width) for scene in scenes})
    for scene in scenes:
        try:
            if scene.hosts not in codecs:
                codecs[scene.hosts] = codec_among(scene.hosts, models, arguments.steps)
            rows = known.get(scene) or measure(scene, arguments.steps)
        except (NetlabError, RanksError) as error:
            return explain(error, "check_planner_wan", "it needs the rights of root")
        for row in rows:
            points.append(point(scene, row, codecs[scene.hosts]))
            show(points[-1])
    found = shares(points)
    print(f"{found['within_15_percent']:.0%} of {len(points)} points within 15 %, "
          f"{found['likely_holds']:.0%} inside the bars", file=sys.stderr)  # fmt: skip
    # An earlier run keeps its own date, machine and load: only the predictions are of now.
    document = {**header, "load_after": about()["load"], **earlier, **found, "predicted_by": header["commit"]}
    document |= {"codecs": {hosts: asdict(codec) for hosts, codec in codecs.items()}, "points": points}
    write(arguments.json, document)
    return 0 if min(found.values()) >= NEEDED else 1


if __name__ == "__main__":
    sys.exit(main())
