"""The planner's error: its predictions against times that bench_allreduce.py measured between network namespaces.

    python bench/check_planner.py                                  reads bench/results/allreduce.json; no rights needed
    python bench/check_planner.py --json bench/results/planner_check.json
    python bench/check_planner.py --allreduce other.json --rounds 21

    python bench/check_planner.py --published --json bench/results/planner_check.json    measures nothing

The JSON also has what others published (qcomm/planner/published.py) beside what is predicted for it.

Nothing is fitted to the measured times. A prediction is made of

- the link: tc's rate; 1448 bytes of values in each frame of 1514, an acknowledgement of 66 bytes for two of them the
  other way; the token bucket's burst, which passes at once;
- the bytes that each method sent, counted by the bench;
- the codec and the casts, timed here with as many ranks at once as take part, without a network: CPU seconds of the
  slowest rank, because that is what a collective waits for, times ranks over cores where there are more ranks;
- what else a rank's threads do in a compressed collective, CPU seconds of the whole process over loopback less those of
  the codec: making, copying, sending and receiving messages. It is shared out over the codec's steps;
- latency: a collective of one value over loopback, by the number of messages that follow each other in it.

CPU seconds are used so that other work on the machine is not taken for the codec; that of the bench's own time shows up
as an error. Run it on the bench's machine. Exits with 1 if fewer than 80 % of the points are within 15 %.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from allreduce_methods import GRIDS, Compressed, plain
from gradient_data import Bucket, bucket, load, save
from netlab import BURST

from qcomm.collectives.cost_model import LinkProfile
from qcomm.collectives.layout import BucketLayout, TensorSpec
from qcomm.collectives.options import ReduceOptions
from qcomm.collectives.task import MeanTask
from qcomm.collectives.telemetry import Telemetry
from qcomm.collectives.two_phase_schedule import SLICE_ELEMENTS, Step, schedule
from qcomm.collectives.two_phase_steps import MeanSteps, plan_slices
from qcomm.communicator.handshake import Fields
from qcomm.planner import plan
from qcomm.planner.collectives import Cluster, ring
from qcomm.planner.compute import ComputeTimes
from qcomm.planner.methods import RATIOS, Codec, Setting, method_named
from qcomm.planner.profiles import ParameterTensor
from qcomm.planner.published import CALIBRATION, CHECK, PUBLISHED, Point
from qcomm.planner.simulator import Job, simulate

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STEPS = {"qcomm k=1": 1.0, "qcomm k=2": 2.0}
LATENCY_ROUNDS = 50
TOLERANCE, NEEDED = 0.15, 0.8

# Of a full Ethernet frame, as tc counts it: 14 of header, 20 of IPv4, 32 of TCP with time stamps.
FRAME, HEADERS, ACKNOWLEDGEMENT = 1514, 66, 66
FRAMES_AN_ACKNOWLEDGEMENT = 2
RATES = {"100mbit": 12.5e6, "1gbit": 125e6, "10gbit": 1.25e9}  # bytes a second
KIB = 1024

Timings = dict[str, float]


def slowest(function: Callable[[], Timings], rounds: int) -> Timings:
    """Medians, over rounds, of the slowest rank's seconds; all ranks run at once."""
    found: list[torch.Tensor] = []
    names: list[str] = []
    for _ in range(rounds + 1):
        dist.barrier()
        timings = function()
        names, seconds = list(timings), torch.tensor(list(timings.values()), dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        found.append(seconds)
    seconds = torch.stack(found[1:]).median(dim=0).values  # the first round allocates
    return dict(zip(names, seconds.tolist(), strict=True))


def codec_timer(values: torch.Tensor, specs: Sequence[TensorSpec], method: str) -> Callable[[], Timings]:
    """Times what a rank computes in a mean, in the schedule's order, with packets that are made before."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layout = BucketLayout(specs, world)
    plan = plan_slices(layout, SLICE_ELEMENTS, torch.float32)
    slices = plan.slices

    def steps_of(owner: int, buffer: torch.Tensor) -> MeanSteps:
        task = MeanTask(buffer, layout, ReduceOptions(GRIDS[method]), Fields({}), Telemetry())
        steps = MeanSteps(task, owner, plan)
        steps.begin()
        return steps

    # Any rank's packet of a slice is like another's: those of the owners' next ones stand for all.
    incoming: list[list[list[torch.Tensor | None]]] = []
    means: list[list[torch.Tensor | None]] = [[] for _ in slices]
    for owner in range(world):
        sender, receiver = steps_of((owner + 1) % world, values.clone()), steps_of(owner, values.clone())
        incoming.append([[sender.encode(number)[owner]] * world for number in range(len(slices))])
        for number in range(len(slices)):
            receiver.encode(number)
            receiver.reduce(number, incoming[owner][number])
            mean = receiver.encode_mean(number)
            means[number].append(None if mean is None else mean.clone())

    def time_once() -> Timings:
        steps = steps_of(rank, values.clone())
        timings = dict.fromkeys(("encode", "reduce", "decode"), 0.0)
        for step, number in schedule(len(slices)):
            begin = time.thread_time()
            if step is Step.ENCODE:
                steps.encode(number)
            elif step is Step.REDUCE:
                steps.reduce(number, incoming[rank][number])
                steps.encode_mean(number)
            else:
                steps.decode(number, means[number])
            timings[step.value] += time.thread_time() - begin
        return timings

    return time_once


def process_timer(average: Callable[[torch.Tensor], object], values: torch.Tensor) -> Callable[[], Timings]:
    """Times all that a rank's threads do in a collective over loopback."""
    buffer = values.clone()

    def time_once() -> Timings:
        buffer.copy_(values)
        begin = time.process_time()
        average(buffer)
        return {"process": time.process_time() - begin}

    return time_once


def cast_timer(values: torch.Tensor, dtype: torch.dtype) -> Callable[[], Timings]:
    """Times what torch's hooks do around an all-reduce."""
    buffer = values.clone()

    def time_once() -> Timings:
        begin = time.thread_time()
        sent = buffer.to(dtype)
        sent.div_(dist.get_world_size())
        if sent is not buffer:
            buffer.copy_(sent)
        return {"cast": time.thread_time() - begin}

    return time_once


def latency_timer(average: Callable[[torch.Tensor], object], messages: int) -> Callable[[], Timings]:
    """Times a collective of one value, by the messages in it that follow each other."""
    tiny = torch.ones(1)

    def time_once() -> Timings:
        begin = time.perf_counter()
        average(tiny)
        return {"latency": (time.perf_counter() - begin) / messages}

    return time_once


def measure_rank(folder: Path, mib: float, rounds: int) -> dict[str, Timings]:
    """On every rank: what a rank takes for its part of each method."""
    world = dist.get_world_size()
    gradients = bucket(load(folder, dist.get_rank()), int(mib * 2**20 / 4))
    values, specs = gradients.values, gradients.specs
    found: dict[str, Timings] = {}
    for method, dtype in DTYPES.items():
        found[method] = slowest(cast_timer(values, dtype), rounds)
        found[method] |= slowest(latency_timer(plain(dtype), 2 * (world - 1)), LATENCY_ROUNDS)
    tiny = Bucket(torch.ones(1), [TensorSpec("tiny", 0, 1, False)], [torch.Size([1])])
    for method in STEPS:
        found[method] = slowest(codec_timer(values, specs, method), rounds)
        found[method] |= slowest(process_timer(Compressed(GRIDS[method], gradients).average, values), rounds)
        # A message in each exchange; its header travels with the first.
        found[method] |= slowest(latency_timer(Compressed(GRIDS[method], tiny).average, 2), LATENCY_ROUNDS)
    return found


def measure(folder: Path, world: int, mib: float, rounds: int) -> dict[str, Timings]:
    """Starts the ranks on this machine and asks the first one. Their gradients are in ``folder``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", __file__]
    command += ["--gradients", str(folder), "--mib", str(mib), "--rounds", str(rounds)]
    quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, env={**os.environ, **quiet}, check=True, stdout=subprocess.PIPE, text=True)
    answer: dict[str, Timings] = json.loads(done.stdout.splitlines()[-1])
    return answer


def link(rate: str, nbytes: float, latency: float) -> LinkProfile:
    """What a rank's link gives to ``nbytes`` of values each way."""
    wire = RATES[rate] * (FRAME - HEADERS) / (FRAME + ACKNOWLEDGEMENT / FRAMES_AN_ACKNOWLEDGEMENT)
    at_once = min(KIB * float(BURST[rate].removesuffix("mb").removesuffix("kb")), nbytes / 2)
    at_once *= KIB if BURST[rate].endswith("mb") else 1
    return LinkProfile(1e-9 * wire * nbytes / (nbytes - at_once), max(1e-3, 1e6 * latency))


def predict(row: dict[str, Any], timings: Timings) -> float:
    """Seconds of one collective, by the planner."""
    world, elements = row["world_size"], int(row["mib"] * 2**20 / 4)
    sharing = max(1.0, world / (os.cpu_count() or 1))
    between = link(row["rate"], row["bytes_sent"], timings["latency"])
    cluster = Cluster(world, 1, between, between)
    if row["method"] in DTYPES:
        return ring(cluster, elements * DTYPES[row["method"]].itemsize) + sharing * timings["cast"]
    step, values, share = STEPS[row["method"]], 4 * elements, (world - 1) / world
    # Half of the rest with what is encoded, half with what is decoded.
    rest = max(0.0, timings["process"] - timings["encode"] - timings["reduce"] - timings["decode"]) / 2
    encode, decode = timings["encode"] / share + rest, timings["decode"] + rest / (1 + share)
    codec = Codec(
        1e-9 * values / encode / sharing,
        1e-9 * values / decode / sharing,
        on_gpu=False,
        assumed=False,
        ratio=2 * share * values / row["bytes_sent"] * RATIOS[1.0] / RATIOS[step],
        collective_seconds=0.0,  # it is in the rest, and in the latency
    )
    # As one tensor: what travels uncompressed is in the ratio.
    whole = [ParameterTensor("bucket", (elements,))]
    chains = method_named(f"qcomm-{step:g}").chains(whole, Setting(cluster, codec, memory_gb_per_s=1.0))
    return simulate(ComputeTimes(0.0, (0.0,)), [Job(0.0, 0.0, chains)], codec_share=0.0).seconds


def check(document: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Measures, predicts, compares."""
    rows = [row for row in document["rows"] if row["rate"] in RATES and row["method"] in (*DTYPES, *STEPS)]
    cases, inputs, points = sorted({(row["world_size"], row["mib"]) for row in rows}), {}, []
    with tempfile.TemporaryDirectory(prefix="qcomm-bench-") as folder:
        save(Path(folder), max(world for world, _ in cases))
        for world, mib in cases:
            inputs[f"{world} ranks, {mib:g} MiB"] = timings = measure(Path(folder), world, mib, rounds)
            for row in rows:
                if (row["world_size"], row["mib"]) == (world, mib):
                    predicted = predict(row, timings[row["method"]])
                    names = ("rate", "world_size", "mib", "method", "seconds", "p10", "p90")
                    kept = {name: row[name] for name in names}
                    points.append({**kept, "predicted": predicted, "error": predicted / row["seconds"] - 1})
    within = sum(abs(point["error"]) <= TOLERANCE for point in points) / len(points)
    worst = max(points, key=lambda point: abs(point["error"]))
    found = {"inputs": inputs, "points": points, "within_15_percent": within, "worst": worst}
    return found | published()


def published() -> dict[str, Any]:
    """What others published, beside predictions: what the planner was built on, and the two halves of the tables."""
    halves = {"calibration": [examined(point) for point in CALIBRATION], "check": [examined(point) for point in CHECK]}
    return {
        "published": [examined(point) for point in PUBLISHED],
        "halves": halves,
        "of_halves": {
            name: {
                "points": len(points),
                "within_15_percent": sum(abs(point["error"]) <= TOLERANCE for point in points) / len(points),
                "likely_holds": sum(point["likely"] for point in points) / len(points),
            }
            for name, points in halves.items()
        },
    }


def examined(point: Point) -> dict[str, Any]:
    """A published figure and its prediction."""
    found = plan.predict(point.request, method_named(point.method))
    value = getattr(found, point.measure)
    kept = {name: getattr(point, name) for name in ("name", "source", "measure", "published")}
    if point.measure == "efficiency":
        likely = found.efficiency_low <= point.published <= found.efficiency_high
    else:
        likely = found.low <= point.request.batch * point.request.gpus / point.published <= found.high
    rest = {"predicted": value, "error": value / point.published - 1, "likely": likely}
    return {**kept, "gpus": point.request.gpus, **rest}


def show(found: dict[str, Any]) -> None:
    names = f"{'rate':>8}{'ranks':>6}{'MiB':>6}  {'method':<12}"
    print(f"{names}{'measured ms':>12}{'p10..p90':>16}{'predicted':>11}{'error':>8}")
    for point in found["points"]:
        place = f"{point['rate']:>8}{point['world_size']:>6}{point['mib']:>6g}  {point['method']:<12}"
        spread = f"{1e3 * point['p10']:.0f}..{1e3 * point['p90']:.0f}"
        times = f"{1e3 * point['seconds']:>12.1f}{spread:>16}{1e3 * point['predicted']:>11.1f}"
        print(f"{place}{times}{point['error']:>+8.1%}")
    worst, within = found["worst"], found["within_15_percent"]
    place = f"{worst['method']}, {worst['world_size']} ranks, {worst['rate']}"
    for name, half in found["of_halves"].items():
        print(f"{half['points']} published points of the {name} half: {half['within_15_percent']:.0%} within 15 %, "
              f"{half['likely_holds']:.0%} inside the bars")  # fmt: skip
    print(f"{within:.0%} of {len(found['points'])} points within 15 %; worst: {worst['error']:+.1%}, {place}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--allreduce", type=Path, default=RESULTS / "allreduce.json", help="from bench_allreduce.py")
    parser.add_argument("--rounds", type=int, default=11, help="of each measurement")
    parser.add_argument("--published", action="store_true", help="rewrite what others published in --json, no more")
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--mib", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        found = measure_rank(arguments.gradients, arguments.mib, arguments.rounds)
        if dist.get_rank() == 0:
            print(json.dumps(found), flush=True)
        dist.barrier()
        dist.destroy_process_group()
        return 0
    if arguments.published:
        if arguments.json is None:
            parser.error("--published needs --json")
        kept = json.loads(arguments.json.read_text())
        arguments.json.write_text(json.dumps({**kept, **published()}, indent=1) + "\n")
        return 0
    document = json.loads(arguments.allreduce.read_text())
    load = os.getloadavg()
    found = check(document, arguments.rounds)
    show(found)
    if arguments.json:
        header = {"torch": torch.__version__, "cores": os.cpu_count(), "load": load}
        header |= {"load_of_allreduce": document["load"]}
        arguments.json.write_text(json.dumps({**header, "rounds": arguments.rounds, **found}, indent=1) + "\n")
    return 0 if found["within_15_percent"] >= NEEDED else 1


if __name__ == "__main__":
    sys.exit(main())
