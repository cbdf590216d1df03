"""Time and bytes of a training step of a sharded transformer (FSDP2), by exchange and rate of the links.

    python bench/bench_fsdp.py --worlds 2                              # processes of this machine
    python bench/bench_fsdp.py --rates 1gbit 100mbit --worlds 2 4      # netlab: hosts of their own; root
    python bench/bench_fsdp.py --small --steps 2                       # does it run?

`bf16` is torch's own FSDP2, which gathers weights and reduces gradients in bfloat16. The others have the same mixed
precision and the same model; they compress gradients, or weights as well. Steps of all methods run in turn, so that the
machine's moods meet all alike. Bytes are those that the interface of a rank has sent in a step, whoever sent them; on
the loopback device, where ranks have one interface, they are those of all ranks. `of qcomm` are the bytes that a rank
hands to qcomm's own connections, by a counter between both.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from netlab import NetlabError
from ranks import LOOPBACK, RanksError, about, explain, run_ranks, spread, start_rank, write
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional
from transformer_training import Setting, Transformer

import qcomm
import qcomm.fsdp
from qcomm.transport.launchers import find_place

METHODS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "gradients k=1": {"gradients": qcomm.SigmaGrid(1.0)},
    "gradients k=2": {"gradients": qcomm.SigmaGrid(2.0)},
    "gradients k=1, weights": {"gradients": qcomm.SigmaGrid(1.0), "weights": qcomm.RangeGrid()},
}
WARM_UP = 2  # steps before any is counted
VOCABULARY = 96
BATCH = 2  # sequences a rank
INTERFACES = Path("/sys/class/net")


@dataclass
class Row:
    """Medians over the steps of the slowest rank's seconds, and bytes that rank 0 sends in a step."""

    method: str
    ranks: int
    parameters: int
    seconds: float
    p10: float
    p90: float
    bytes_of_interface: float
    bytes_of_qcomm: float
    seconds_to_bf16: float = 1.0
    bytes_to_bf16: float = 1.0


class CountingGloo:
    """Stands between qcomm and the gloo connections of its channel, and counts what is sent."""

    def __init__(self, gloo: Any) -> None:
        self._gloo, self.sent = gloo, 0

    def send(self, tensors: list[torch.Tensor], target: int, tag: int) -> Any:
        """Counts and sends."""
        self.sent += sum(tensor.nbytes for tensor in tensors)
        return self._gloo.send(tensors, target, tag)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Any:
        """Receives."""
        return self._gloo.recv(tensors, source, tag)


class Sharded:
    """A model that is sharded over all ranks, and the bytes of its steps."""

    def __init__(self, method: str, setting: Setting) -> None:
        torch.manual_seed(0)
        self.model = Transformer(setting, VOCABULARY)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for block in self.model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(self.model, mp_policy=policy)
        self.counter: CountingGloo | None = None
        options = METHODS[method]
        if options is not None:
            state = qcomm.fsdp.attach(self.model, **options)
            transport = state._exchanges.shards._transport
            self.counter = transport._gloo = CountingGloo(transport._gloo)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.seconds: list[float] = []
        self.interface_bytes: list[int] = []
        self.qcomm_bytes: list[int] = []

    def step(self, batch: torch.Tensor) -> None:
        """Trains a step. A collective."""
        dist.barrier()
        sent, own = sent_bytes(), self.counter.sent if self.counter is not None else 0
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        logits = self.model(batch[:, :-1]).float()
        functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - begin)
        dist.barrier()
        self.interface_bytes.append(sent_bytes() - sent)
        self.qcomm_bytes.append(0 if self.counter is None else self.counter.sent - own)

    def gradient(self, batch: torch.Tensor) -> torch.Tensor:
        """The gradient of all parameters, on every rank, from the present weights."""
        self.optimizer.zero_grad()
        logits = self.model(batch[:, :-1]).float()
        functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        return torch.cat([parameter.grad.full_tensor().flatten() for parameter in self.model.parameters()])


def sent_bytes() -> int:
    """What the interface of this rank's connections has sent since it exists."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return int((INTERFACES / name / "statistics" / "tx_bytes").read_text())


def verify(models: dict[str, Sharded], batch: torch.Tensor) -> None:
    """Raises RanksError unless compressed gradients are as near to those of bf16 as the grids allow."""
    expected = models["bf16"].gradient(batch)
    for method, model in models.items():
        error = float((model.gradient(batch) - expected).norm() / expected.norm())
        if not error < 1.0:
            raise RanksError(f"{method}: the first gradient differs by {error:.2f} of its norm from bf16's")


def slowest(seconds: Sequence[float]) -> list[float]:
    """Seconds of each step, of the slowest rank. A collective."""
    own = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(own, dist.ReduceOp.MAX)
    return own.tolist()


def run_rank(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """On every rank: all methods. Rank 0 has the rows."""
    rank, world_size = start_rank()
    setting = setting_of(arguments)
    models = {method: Sharded(method, setting) for method in METHODS}
    numbers = torch.Generator().manual_seed(rank)
    batches = [
        torch.randint(VOCABULARY, (BATCH, setting.context + 1), generator=numbers)
        for _ in range(WARM_UP + arguments.steps)
    ]
    verify(models, batches[0])
    for batch in batches:
        for model in models.values():
            model.step(batch)
    rows = []
    for method, model in models.items():
        seconds = slowest(model.seconds[WARM_UP:])
        found = spread(seconds) if len(seconds) > 1 else dict.fromkeys(("median", "p10", "p90"), seconds[0])
        sent = [statistics.median(counts[WARM_UP:]) for counts in (model.interface_bytes, model.qcomm_bytes)]
        rows.append(Row(method, world_size, model.parameters, found["median"], found["p10"], found["p90"], *sent))
    for row in rows:
        row.seconds_to_bf16 = row.seconds / rows[0].seconds
        row.bytes_to_bf16 = row.bytes_of_interface / rows[0].bytes_of_interface
    dist.barrier()
    dist.destroy_process_group()
    return [asdict(row) for row in rows] if rank == 0 else []


def setting_of(arguments: argparse.Namespace) -> Setting:
    """What is trained."""
    if arguments.small:
        return Setting(width=64, depth=2, context=16)
    return Setting(width=arguments.width, depth=arguments.depth, context=arguments.context)


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(f"{'rate':>8}{'ranks':>6}{'parameters':>12}  {'method':<24}{'ms':>9}{'p10..p90':>18}{'MB sent':>9}"
          f"{'of qcomm':>10}{'time/bf16':>11}{'bytes/bf16':>12}")  # fmt: skip
    for row in rows:
        around = f"{1e3 * row['p10']:.0f}..{1e3 * row['p90']:.0f}"
        print(f"{row['rate']:>8}{row['ranks']:>6}{row['parameters']:>12}  {row['method']:<24}"
              f"{1e3 * row['seconds']:>9.1f}{around:>18}{row['bytes_of_interface'] / 1e6:>9.2f}"
              f"{row['bytes_of_qcomm'] / 1e6:>10.2f}{row['seconds_to_bf16']:>11.2f}{row['bytes_to_bf16']:>12.2f}",
              flush=True)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=[LOOPBACK], help="as tc writes them, of hosts of their own")
    parser.add_argument("--worlds", nargs="+", type=int, default=[2], help="numbers of ranks to start")
    parser.add_argument("--width", type=int, default=512, help="of the transformer")
    parser.add_argument("--depth", type=int, default=4, help="of the transformer: units besides the rest")
    parser.add_argument("--context", type=int, default=32, help="characters of a sequence")
    parser.add_argument("--steps", type=int, default=10, help="that are counted, of each method")
    parser.add_argument("--small", action="store_true", help="two narrow blocks: does it run?")
    parser.add_argument("--json", type=Path, help="where the figures go")
    return parser


def main() -> int:
    arguments = make_parser().parse_args()
    if find_place() is not None:
        if found := run_rank(arguments):
            print(json.dumps(found), flush=True)
        return 0
    options = ["--width", str(arguments.width), "--depth", str(arguments.depth), "--context", str(arguments.context)]
    options += ["--steps", str(arguments.steps), *(["--small"] if arguments.small else [])]
    header = about(setting=asdict(setting_of(arguments)), batch=BATCH, steps=arguments.steps)
    rows: list[dict[str, Any]] = []
    try:
        for rate in arguments.rates:
            for world_size in arguments.worlds:
                found = [{"rate": rate, **row} for row in run_ranks(__file__, options, world_size, rate)]
                show(found)
                rows += found
    except (NetlabError, RanksError) as error:
        return explain(error, "bench_fsdp", "without --rates it needs no rights")
    write(arguments.json, {**header, "load_after": about()["load"], "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
