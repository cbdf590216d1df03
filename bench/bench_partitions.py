"""Samples a second of a model in partitions on a line of hosts, against ways that keep its gradients. Linux, as root.

    python bench/bench_partitions.py --json bench/results/partitions.json      # two hosts, 100 Mb/s and 1 Gb/s
    python bench/bench_partitions.py --partitions 4 --rates 100mbit
    python bench/bench_partitions.py --rates none --batches 4 --repeats 2       # processes of this machine, no rights

Four convolutional layers on 32 x 32 images, those of `qcomm study partitions`, in equal partitions, one on each host:

    one process         backprop through the whole model on one host: nothing is sent
    backprop            each host has a partition; features go forward and their gradients back, batch after batch
    GPipe, m=4          the same with micro-batches, all forward and then all back (Huang et al., arXiv:1811.06965)
    partitions, raw     qcomm.PartitionPipeline: heads of their own, features go forward alone, as float32
    partitions, 6 bits  the same with RangeGrid(num_bits=6), its default

The first three train alike, but for rounding; the last two are another algorithm, whose accuracy stands in
docs/studies.md. Methods take turns, an epoch each. A time is that of the slowest host, bytes are those of the first.
Busy is the share of an epoch in which a host does not wait, the mean of all hosts.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from netlab import NetlabError
from ranks import RanksError, about, explain, is_rank, run_ranks, start_rank, write
from torch import Tensor, nn
from torch.nn import functional
from wan import add_wan_options, wan_from

import qcomm
from qcomm.studies.partitions import CHANNELS, STRIDES, stages

IMAGE = (1, 32, 32)
CLASSES = 10
MICRO_BATCHES = 4
METHODS = ("one process", "backprop", f"GPipe, m={MICRO_BATCHES}", "partitions, raw", "partitions, 6 bits")
RATE = 0.01  # nothing is to be learnt
Batch = tuple[Tensor, Tensor]


class Epoch(NamedTuple):
    """One epoch of one host."""

    seconds: float
    busy_seconds: float
    sent_bytes: int


class Backprop:
    """Backprop through a model whose partitions are on a line of hosts; ``micro`` batches are under way at once."""

    def __init__(self, parts: list[qcomm.LocalStage], micro: int) -> None:
        self._rank, self._ranks, self._micro = dist.get_rank(), dist.get_world_size(), micro
        self._partition = parts[self._rank].partition
        self._head = parts[self._rank].head if self._rank == self._ranks - 1 else nn.Identity()
        parameters = [*self._partition.parameters(), *self._head.parameters()]
        self._optimizer = torch.optim.SGD(parameters, lr=RATE)
        self._bytes, self._waited = 0, 0.0

    def run_epoch(self, batches: list[Batch]) -> Epoch:
        """Trains on all batches, which every host has: labels need not be sent."""
        self._bytes, self._waited, begin = 0, 0.0, time.perf_counter()
        for images, labels in batches:
            self._optimizer.zero_grad()
            under_way = [self._forward(part) for part in images.chunk(self._micro)]
            sends = [send for _, outputs in under_way if (send := self._send(outputs.detach(), 1)) is not None]
            for (inputs, outputs), wanted in zip(under_way, labels.chunk(self._micro), strict=True):
                sends += self._backward(inputs, outputs, wanted)
            self._wait(lambda sends=sends: [send.wait() for send in sends])
            self._optimizer.step()
        seconds = time.perf_counter() - begin
        return Epoch(seconds, seconds - self._waited, self._bytes)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        inputs = images
        if self._rank > 0:
            inputs = self._receive((len(images), *_features(self._rank - 1, self._ranks)), -1).requires_grad_()
        return inputs, self._partition(inputs)

    def _backward(self, inputs: Tensor, outputs: Tensor, labels: Tensor) -> list[dist.Work]:
        if self._rank == self._ranks - 1:
            (functional.cross_entropy(self._head(outputs), labels) / self._micro).backward()
        else:
            outputs.backward(self._receive(tuple(outputs.shape), 1))
        send = self._send(inputs.grad, -1) if inputs.grad is not None else None
        return [] if send is None else [send]

    def _send(self, values: Tensor, direction: int) -> dist.Work | None:
        if not 0 <= self._rank + direction < self._ranks:
            return None
        self._bytes += values.nbytes
        return dist.isend(values.contiguous(), self._rank + direction)

    def _receive(self, shape: tuple[int, ...], direction: int) -> Tensor:
        values = torch.empty(shape)
        self._wait(lambda: dist.recv(values, self._rank + direction))
        return values

    def _wait(self, action: Callable[[], object]) -> None:
        begin = time.perf_counter()
        action()
        self._waited += time.perf_counter() - begin


def _features(partition: int, partitions: int) -> tuple[int, int, int]:
    """The shape of what a partition hands over for an image."""
    layers = _cuts(partitions)[partition]
    side = IMAGE[1] // math.prod(STRIDES[:layers])
    return CHANNELS[layers - 1], side, side


def _cuts(partitions: int) -> list[int]:
    return [len(CHANNELS) * (number + 1) // partitions for number in range(partitions)]


def methods(parts: Callable[[], list[qcomm.LocalStage]]) -> dict[str, Callable[[list[Batch]], Epoch]]:
    """A function for each method that trains for an epoch. A collective."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = parts()
    model = nn.Sequential(*(part.partition for part in whole), whole[-1].head)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def alone(batches: list[Batch]) -> Epoch:
        if rank > 0:
            return Epoch(0.0, 0.0, 0)
        begin = time.perf_counter()
        for images, labels in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        seconds = time.perf_counter() - begin
        return Epoch(seconds, seconds, 0)

    def pipeline(grid: qcomm.RangeGrid | None) -> Callable[[list[Batch]], Epoch]:
        stage = parts()[rank]
        own = torch.optim.SGD(stage.parameters(), lr=RATE)
        line = qcomm.PartitionPipeline(stage, own, partitions=ranks, grid=grid)

        def run(batches: list[Batch]) -> Epoch:
            report = line.run_epoch(batches if line.is_first else None)
            return Epoch(report.seconds, report.seconds - report.waiting_seconds, report.sent_bytes)

        return run

    made = [alone, Backprop(parts(), 1).run_epoch, Backprop(parts(), MICRO_BATCHES).run_epoch]
    made += [pipeline(None), pipeline(qcomm.RangeGrid(num_bits=6))]
    return dict(zip(METHODS, made, strict=True))


def run_rank(arguments: argparse.Namespace) -> None:
    """On every rank; rank 0 prints one line of JSON."""
    rank, ranks = start_rank()

    def parts() -> list[qcomm.LocalStage]:
        torch.manual_seed(0)
        return stages(IMAGE[0], _cuts(ranks)[:-1])

    generator = torch.Generator().manual_seed(1)
    size = arguments.batch_size
    batches = [
        (torch.randn(size, *IMAGE, generator=generator), torch.randint(CLASSES, (size,), generator=generator))
        for _ in range(arguments.batches)
    ]
    ways, found = methods(parts), {name: [] for name in METHODS}
    for repeat in range(arguments.repeats + 1):
        for name, run in ways.items():
            dist.barrier()
            mine = run(batches)
            every = [torch.empty(3, dtype=torch.float64) for _ in range(ranks)]
            dist.all_gather(every, torch.tensor(mine, dtype=torch.float64))
            if repeat:  # memory and connections are new in the first
                found[name].append([each.tolist() for each in every])
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def summary(name: str, epochs: list[list[list[float]]], samples: int) -> dict[str, Any]:
    """Figures of one method on one network; ``epochs``: seconds, busy seconds and bytes by host."""
    seconds = [max(host[0] for host in epoch) for epoch in epochs]
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    working = [[host for host in epoch if host[0] > 0] for epoch in epochs]
    busy = [statistics.fmean(host[1] / host[0] for host in epoch) for epoch in working]
    return {
        "method": name,
        "epochs": len(epochs),
        "samples_per_second": samples / statistics.median(seconds),
        "p10": samples / cuts[-1],
        "p90": samples / cuts[0],
        "busy": statistics.median(busy),
        "bytes_sent": statistics.median(epoch[0][2] for epoch in epochs),
        "all_seconds": seconds,
    }


def show(row: dict[str, Any]) -> None:
    print(f"{row['rate']:>8} {row['method']:<20}{row['samples_per_second']:8.0f} samples/s ({row['p10']:.0f} .. "
          f"{row['p90']:.0f}), busy {100 * row['busy']:.0f} %, {row['bytes_sent'] / 1e6:.2f} MB an epoch",
          file=sys.stderr, flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["100mbit", "1gbit"], help="as tc writes them, or none")
    parser.add_argument("--partitions", type=int, choices=(2, 4), default=2, help="and hosts")
    parser.add_argument("--batches", type=int, default=24, help="of an epoch")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9, help="epochs of each method that count")
    add_wan_options(parser)
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    for name, least in (("batches", 1), ("batch_size", MICRO_BATCHES), ("repeats", 2)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more, got {getattr(arguments, name)}")
    if is_rank():
        run_rank(arguments)
        return 0
    names = ("partitions", "batches", "batch_size", "repeats")
    header, rows = about(wan_from(arguments), **{name: getattr(arguments, name) for name in names}), []
    options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names]
    try:
        for rate in arguments.rates:
            found = run_ranks(__file__, options, arguments.partitions, rate, wan=wan_from(arguments))
            for name, epochs in found.items():
                row = {"rate": rate, **summary(name, epochs, arguments.batches * arguments.batch_size)}
                rows.append(row)
                show(row)
    except (NetlabError, RanksError) as error:
        return explain(error, "bench_partitions", "--rates none needs no rights")
    write(arguments.json, {**header, "load_after": about()["load"], "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
