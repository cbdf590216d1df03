"""Time that a training step waits for its gradients' exchange between distant hosts. Linux, as root.

    python bench/bench_wan.py --json bench/results/wan.json       # 4 hosts, 100 Mb/s, 50 ms one way: three minutes
    python bench/bench_wan.py --rate 1gbit --delay-ms 20 --loss 0.1% --methods "qcomm k=1" bf16 --steps 21
    python bench/bench_wan.py --width 520 --json bench/results/wan_small.json
    python bench/bench_wan.py --host-rates 100mbit 100mbit 100mbit 20mbit --delay-ms 0 --shares equal measured
    python bench/bench_wan.py --hosts 2 --buckets 3 --strategies two_phase none --methods "qcomm k=1"
    python bench/bench_wan.py --hosts 2 --delay-ms 40 --loss 0.1% --control cubic --connections 1 8 auto

The model is a chain of linear layers, each of whose gradients, 5.3 MB, is a bucket of DDP. It has next to nothing to
compute, so that a step is its exchange. With `--width 520`, 1.1 MB a bucket, processors and rates matter less still,
and the exposed time over the delay tells how many messages follow each other.

The ranks begin each step at one moment of their common clock. The exchange is exposed from the time when a rank has
computed its last gradient until its backward returns. Figures are of the slowest rank in each step, bytes of rank 0: of
qcomm those handed to the transport, of torch's all-reduces those of a ring.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from allreduce_methods import DTYPES, ring_bytes
from netlab import NetlabError
from ranks import RanksError, about, explain, is_rank, run_ranks, start_rank, write
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from training import RecordedHook, grid_of
from wan import add_wan_options, wan_from

import qcomm
from qcomm.collectives.options import STRATEGIES
from qcomm.collectives.telemetry import Event
from qcomm.communicator import find_communicator
from qcomm.transport import AUTO

TORCH_HOOKS = {
    "fp32": default_hooks.allreduce_hook,
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": default_hooks.bf16_compress_hook,
}
QCOMM = ("qcomm k=0.5", "qcomm k=1", "qcomm k=2", "qcomm k=3.2", "qcomm k=3.4")
SHARES = ("equal", "measured")  # of the buffer: alike for all ranks, or by what their links are measured to carry
WIDTH = 1150  # of a layer: 5.3 MB of gradients
SMALLEST_WIDTH = 513  # DDP's first bucket holds at least 1 MiB
BATCH = 8
WARM_UP = 4  # steps: DDP rebuilds its buckets after the first, and residuals come to rest
BEGIN_SECONDS = 0.05  # from the agreement on a step's begin until then, beyond the delays


class Scene:
    """The model under DDP on one rank, with one exchange. A collective.

    Args:
        method: of TORCH_HOOKS or QCOMM.
        strategy, connections, shares: of qcomm; shares are one of SHARES.
        buckets: of DDP.
        width: of a layer.
        group: of all ranks, that nothing else uses.
    """

    def __init__(
        self,
        method: str,
        strategy: str,
        connections: int | str,
        shares: str,
        buckets: int,
        width: int,
        group: dist.ProcessGroup,
    ) -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(width, width, bias=False) for _ in range(buckets)]
        bucket_mb = layers[0].weight.nbytes / 2**20
        # A layer fills a bucket, so that a second one does not fit.
        self.ddp = DistributedDataParallel(
            torch.nn.Sequential(*layers),
            process_group=group,
            bucket_cap_mb=bucket_mb,
            gradient_as_bucket_view=True,
            init_sync=False,  # the weights are alike, and sending them takes minutes where packets are lost
        )
        self.timeline: list[Event] = []
        self.state: qcomm.CompressionState | None = None
        self.link_rates: tuple[float, ...] | None = None
        self._ring_bytes = 0
        if method in TORCH_HOOKS:
            self.ddp.register_comm_hook(None, RecordedHook(TORCH_HOOKS[method], self.timeline).hook)
            gradients = torch.empty(buckets * width * width, dtype=DTYPES[method], device="meta")
            self._ring_bytes = ring_bytes(gradients.nbytes)
        else:
            self.link_rates = None if shares == "equal" else qcomm.measure_link_rates(group, connections=connections)
            self.state = qcomm.attach(
                self.ddp,
                grid=grid_of(method),
                strategy=strategy,
                connections=connections,
                link_rates=self.link_rates,
            )
            self.state.telemetry.timeline = self.timeline
        torch.manual_seed(1 + dist.get_rank())
        self.inputs = torch.randn(BATCH, width)

    def step(self, margin: float) -> tuple[float, float, int]:
        """(seconds of backward, exposed seconds, buckets) of this rank."""
        self.timeline.clear()
        loss = self.ddp(self.inputs).square().mean()
        wait_for_all(margin)
        begin = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        ready = [at for _, event, at in self.timeline if event == "ready"]
        return end - begin, end - max(ready), len(ready)

    def bytes_sent(self, steps: int) -> int:
        """Of so many steps, which are all that there were."""
        return self._ring_bytes * steps if self.state is None else int(self.state.stats()["bytes_sent"])


def wait_for_all(margin: float) -> None:
    """Returns on every rank at one moment, ``margin`` seconds after the last rank has come. A collective."""
    begin = torch.tensor(time.perf_counter() + margin, dtype=torch.float64)
    dist.all_reduce(begin, dist.ReduceOp.MAX)
    time.sleep(max(0.0, float(begin) - time.perf_counter()))


def measure(
    method: str, strategy: str, connections: int | str, shares: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    """On every rank: a row of the results."""
    group = dist.new_group()  # a group's connections are alike for all its uses
    scene = Scene(method, strategy, connections, shares, arguments.buckets, arguments.width, group)
    # The agreement on a begin takes a tree's or a ring's messages, one after another.
    margin = BEGIN_SECONDS + 2 * dist.get_world_size() * arguments.delay_ms / 1e3
    for _ in range(WARM_UP):
        scene.step(margin)
    before, times = scene.bytes_sent(WARM_UP), []
    for _ in range(arguments.steps):
        *seconds, buckets = scene.step(margin)
        if buckets != arguments.buckets:
            raise ValueError(f"DDP made {buckets} buckets in place of {arguments.buckets}")
        times.append(seconds)
    sent = scene.bytes_sent(WARM_UP + arguments.steps) - before
    slowest = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    backward, exposed = slowest.T.tolist()
    cuts = statistics.quantiles(exposed, n=10, method="inclusive")
    communicator = find_communicator(group)  # None for torch's all-reduces
    return {
        "method": method,
        "strategy": strategy,
        "connections": connections,
        "connections_made": 1 if communicator is None else communicator.connections,
        "shares": shares,
        "link_rates": scene.link_rates,
        "exposed_seconds": statistics.median(exposed),
        "p10": cuts[0],
        "p90": cuts[-1],
        "backward_seconds": statistics.median(backward),
        "bytes_sent": sent / arguments.steps,
        "all_exposed": exposed,
    }


def run_rank(arguments: argparse.Namespace) -> None:
    """On every rank; rank 0 prints one line of JSON."""
    rank, _ = start_rank()
    rows = []
    for method in arguments.methods:
        of_qcomm = arguments.strategies, arguments.connections, arguments.shares
        for choice in itertools.product(*of_qcomm) if method in QCOMM else [("", 1, "equal")]:
            rows.append(measure(method, *choice, arguments))
            if rank == 0:
                show(rows[-1])
    if rank == 0:
        print(json.dumps(rows), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def number_or_auto(text: str) -> int | str:
    return text if text == AUTO else int(text)


def show(row: dict[str, Any]) -> None:
    print(f"{row['method']:<12}{row['strategy']:<12}"
          f"{row['connections']:>4} ({row['connections_made']}) {row['shares']:<9}"
          f"exposed {row['exposed_seconds']:.3f} s ({row['p10']:.3f} .. {row['p90']:.3f}), "
          f"backward {row['backward_seconds']:.3f} s, {row['bytes_sent'] / 1e6:.3f} MB a step",
          file=sys.stderr, flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", default="100mbit", help="of every host's link, as tc writes it")
    parser.add_argument("--host-rates", nargs="+", default=[], help="of each host's link, in their place")
    parser.add_argument("--buckets", type=int, default=5, help="that DDP exchanges in a step")
    parser.add_argument("--width", type=int, default=WIDTH, help="of a layer, whose gradients are a bucket")
    parser.add_argument("--methods", nargs="+", choices=(*TORCH_HOOKS, *QCOMM), default=["qcomm k=1", "fp32"])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=["two_phase"], help="of qcomm")
    parser.add_argument(
        "--connections", nargs="+", type=number_or_auto, default=[1], help="of qcomm to each host and channel, or auto"
    )
    parser.add_argument("--shares", nargs="+", choices=SHARES, default=["equal"], help="of qcomm's owners")
    parser.add_argument("--steps", type=int, default=9, help="that are counted, of each method")
    add_wan_options(parser)
    parser.set_defaults(delay_ms=50.0)
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    for name, least in (("steps", 2), ("buckets", 1), ("width", SMALLEST_WIDTH)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(arguments, name)}")
    if is_rank():
        run_rank(arguments)
        return 0
    hosts = len(arguments.host_rates) or arguments.hosts
    wan = wan_from(arguments)
    names = ("rate", "host_rates", "buckets", "width", "steps")
    header = about(wan, hosts=hosts, **{name: getattr(arguments, name) for name in names})
    options = [f"--{name}={getattr(arguments, name)}" for name in ("buckets", "width", "steps")]
    options += ["--methods", *arguments.methods]
    options += ["--strategies", *arguments.strategies, "--delay-ms", str(arguments.delay_ms)]
    options += ["--connections", *map(str, arguments.connections), "--shares", *arguments.shares]
    try:
        rows = run_ranks(__file__, options, hosts, arguments.rate, wan=wan)
    except (NetlabError, RanksError) as error:
        return explain(error, "bench_wan", "--rate none --delay-ms 0 needs no rights")
    write(arguments.json, {**header, "load_after": about()["load"], "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
