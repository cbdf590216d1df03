"""Time that training waits for DiLoCo's exchanges over slow links, and how much of it ``delay`` hides. Linux, as root.

    python bench/bench_diloco_wan.py --json bench/results/diloco_wan.json   # 4 hosts, 10 Mb/s, 10 ms one way: minutes
    python bench/bench_diloco_wan.py --rate none --steps 4 --turns 2 --width 64 --step-seconds 0.01   # does it run?

A step is a movement of every weight and ``--step-seconds`` in which the process sleeps, as where a device computes. The
scenes take turns of one period each, which begin with the step that begins an exchange: without any exchange, and with
each method, once without delay and once with ``--delay`` steps. A turn's time is that of the slowest rank, and a scene
waits for what its turns take beyond those without exchange. Hidden is the share of a method's wait that its delay takes
away. Bytes are those that rank 0 sends. The anchors of all ranks are compared at the end.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from netlab import NetlabError
from ranks import RanksError, about, explain, is_rank, run_ranks, spread, start_rank, write
from wan import add_wan_options, wan_from

import qcomm

LAYERS = 3
METHODS: dict[str, dict[str, Any]] = {
    "fp32": {"strategy": "none"},
    "k=1": {"strategy": "two_phase", "grid": qcomm.SigmaGrid(1.0)},
    "k=2": {"strategy": "two_phase", "grid": qcomm.SigmaGrid(2.0)},
}
NO_EXCHANGE = "no exchange"
MOVEMENT = 1e-3  # of a weight in a step


class Scene:
    """A model that trains on this rank, with DiLoCo or without."""

    def __init__(self, method: str, delay: int, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(arguments.width, arguments.width) for _ in range(LAYERS)]
        self.model, self.method, self.delay = torch.nn.Sequential(*layers), method, delay
        generator = torch.Generator().manual_seed(dist.get_rank())
        self._movements = [MOVEMENT * torch.randn(p.shape, generator=generator) for p in self.model.parameters()]
        self._step_seconds, self._period = arguments.step_seconds, arguments.steps
        self.diloco = None
        if method != NO_EXCHANGE:
            self.diloco = qcomm.DiLoCo(self.model, period=arguments.steps, delay=delay, **METHODS[method])
        self.seconds: list[float] = []
        for _ in range(self._period - 1):
            self._step(0.0)

    def turn(self) -> None:
        """Trains the steps from the begin of one exchange to the next. A collective."""
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(self._period):
            self._step(self._step_seconds)
        self.seconds.append(time.perf_counter() - begin)

    @torch.no_grad()
    def _step(self, seconds: float) -> None:
        for parameter, movement in zip(self.model.parameters(), self._movements, strict=True):
            parameter.add_(movement)
        time.sleep(seconds)
        if self.diloco is not None:
            self.diloco.step()

    def sent(self) -> float:
        """Returns the bytes that this rank has sent."""
        return 0.0 if self.diloco is None else float(self.diloco.stats()["bytes_sent"])


def compare_anchors(scene: Scene) -> None:
    """Raises RanksError unless the weights of all ranks are the same bits after the last exchange. A collective."""
    if scene.diloco is None:
        return
    scene.diloco.finish()
    weights = torch.nn.utils.parameters_to_vector(scene.model.parameters()).detach()
    everywhere = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, weights)
    if not all(torch.equal(weights, other) for other in everywhere):
        raise RanksError(f"{scene.method}, delay {scene.delay}: the ranks' weights differ after the last exchange")


def run_rank(arguments: argparse.Namespace) -> None:
    """On every rank; rank 0 prints one line of JSON."""
    rank, _ = start_rank()
    chosen = [(NO_EXCHANGE, 0), *((method, delay) for method in arguments.methods for delay in (0, arguments.delay))]
    scenes = [Scene(method, delay, arguments) for method, delay in chosen]
    for turn in range(arguments.turns + 1):  # the first is not counted: connections begin
        for scene in scenes:
            before = scene.sent()
            scene.turn()
            if rank == 0:
                print(f"turn {turn}: {scene.method}, delay {scene.delay}: {scene.seconds[-1]:.3f} s, "
                      f"{(scene.sent() - before) / 1e6:.3f} MB", file=sys.stderr, flush=True)  # fmt: skip
    rows = [row_of(scene, arguments) for scene in scenes]
    for scene in scenes:
        compare_anchors(scene)
    if rank == 0:
        print(json.dumps(rows), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def row_of(scene: Scene, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of a scene, the same on all ranks but for the bytes. A collective."""
    seconds = torch.tensor(scene.seconds[1:], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    parameters = sum(parameter.numel() for parameter in scene.model.parameters())
    exchanges = arguments.turns + 1
    return {
        "method": scene.method,
        "delay": scene.delay,
        "parameters": parameters,
        "turn_seconds": spread(seconds.tolist()),
        "bits_sent": 8 * scene.sent() / exchanges / arguments.steps / parameters,
        "all_seconds": seconds.tolist(),
    }


def add_waits(rows: list[dict[str, Any]]) -> None:
    """Adds each scene's wait, the median of what its turns take beyond those without exchange, and what is hidden.

    Example:
        >>> times = {"no exchange": [1.0, 1.0], "k=1": [3.0, 3.2], "k=1 later": [1.1, 1.1]}
        >>> rows = [{"method": name.split(" l")[0], "all_seconds": own} for name, own in times.items()]
        >>> add_waits(rows)
        >>> rows[2]["hidden"]
        0.952...
    """
    base = rows[0]["all_seconds"]
    for row in rows:
        row["waits"] = statistics.median(own - bare for own, bare in zip(row["all_seconds"], base, strict=True))
    for at_once, later in zip(rows[1::2], rows[2::2], strict=True):
        later["hidden"] = 1 - later["waits"] / at_once["waits"]


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        hidden = f"{row['hidden']:>9.1%}" if "hidden" in row else ""
        turn = row["turn_seconds"]
        print(f"{row['method']:<12} delay {row['delay']:>3}  a period {turn['median']:.3f} s "
              f"({turn['p10']:.3f} .. {turn['p90']:.3f}), waits {row['waits']:.3f} s, "
              f"{row['bits_sent']:.4f} bits sent a parameter and step{hidden}")  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--rate", default="10mbit", help="of every host's link, as tc writes it (default %(default)s)")
    parser.add_argument("--width", type=int, default=1150, help="of the three layers (default %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of a period (default %(default)s)")
    parser.add_argument("--step-seconds", type=float, default=0.05, help="of computing (default %(default)s)")
    parser.add_argument("--delay", type=int, default=60, help="steps that hide an exchange (default %(default)s)")
    parser.add_argument("--turns", type=int, default=9, help="that are counted, of each scene (default %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["k=1", "k=2"])
    add_wan_options(parser)
    parser.set_defaults(delay_ms=10.0)
    parser.add_argument("--json", type=Path, help="where the figures go")
    return parser


def main() -> int:
    parser = make_parser()
    arguments = parser.parse_args()
    for name, least in (("turns", 2), ("steps", 2), ("width", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(arguments, name)}")
    if not 0 < arguments.delay < arguments.steps:
        parser.error(f"--delay must be from 1 to --steps - 1 = {arguments.steps - 1}, got {arguments.delay}")
    if is_rank():
        run_rank(arguments)
        return 0
    names = ("hosts", "rate", "width", "steps", "step_seconds", "delay", "turns")
    wan = None if arguments.rate == "none" else wan_from(arguments)
    header = about(wan, **{name: getattr(arguments, name) for name in names})
    options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names[2:]]
    try:
        rows = run_ranks(
            __file__, [*options, "--methods", *arguments.methods], arguments.hosts, arguments.rate, wan=wan
        )
    except (NetlabError, RanksError) as error:
        return explain(error, "bench_diloco_wan", "--rate none needs no rights")
    add_waits(rows)
    show(rows)
    write(arguments.json, {**header, "load_after": about()["load"], "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
