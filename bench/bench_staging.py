"""Cost of the way through host memory: means of buckets on the test device, against the same means on the CPU.

    python bench/bench_staging.py --json bench/results/staging.json     # three minutes on two idle cores
    python bench/bench_staging.py --turns 2 --elements 100000           # does it run?

One rank, and then two over loopback, average the buckets of a step, all under way at once: in turn on the CPU and on
the device of tests/device, whose memory is the host's. One rank encodes and decodes, but waits for nobody. The results
are compared first. What staging may cost is two copies of each bucket; they are timed in the same turn, between memory
of the same kinds. A ratio is that of one turn: ``(staged - copies) / cpu``. Medians with p10 and p90, of wall time and
of all ranks' processor time, which counts the work alone. ``of_least`` is the same ratio of the shortest times of all
turns, which others disturbed least: on a busy machine it says most. The device is a simulated one, so its figures are
those of the library's own work and not of a GPU. Host memory is the most that was page-locked at once, in buckets.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import about, is_rank, run_ranks, spread, start_rank, write

import qcomm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import late_device

WARM_UP, BUCKETS = 3, 4
RANKS = (1, 2)


def means(tensors: list[torch.Tensor]) -> None:
    """Averages tensors, all under way at once."""
    works = [qcomm.all_reduce(tensor, strategy="two_phase", async_op=True) for tensor in tensors]
    for work in works:
        work.wait()
    if not tensors[0].is_cpu:
        torch.accelerator.synchronize()


def copies(there: list[torch.Tensor], pinned: list[torch.Tensor]) -> None:
    """Copies tensors to the host and back. As in staging, other memory is used between the two copies of a tensor."""
    for tensor, host in zip(there, pinned, strict=True):
        host.copy_(tensor, non_blocking=True)
    torch.accelerator.synchronize()
    for tensor, host in zip(there, pinned, strict=True):
        tensor.copy_(host, non_blocking=True)
    torch.accelerator.synchronize()


def timed(action: Callable[..., None], *arguments: list[torch.Tensor]) -> tuple[float, float]:
    """Wall and processor seconds, the larger of both ranks' and their sum."""
    dist.barrier()
    begin, used = time.perf_counter(), time.process_time()
    action(*arguments)
    wall, used = time.perf_counter() - begin, time.process_time() - used
    found = torch.tensor([wall], dtype=torch.float64), torch.tensor([used], dtype=torch.float64)
    dist.all_reduce(found[0], dist.ReduceOp.MAX)
    dist.all_reduce(found[1])
    return float(found[0]), float(found[1])


def run_rank(turns: int, elements: int) -> None:
    """On every rank; rank 0 prints one line of JSON."""
    late_device.load(late_device.build())
    rank, _ = start_rank()
    values = [torch.randn(elements, generator=torch.Generator().manual_seed(10 * rank + n)) for n in range(BUCKETS)]
    here, there = [value.clone() for value in values], [value.to("late") for value in values]
    means(here)
    means(there)
    wrong = sum(int((a != b.cpu()).sum()) for a, b in zip(here, there, strict=True))
    if wrong:
        raise SystemExit(f"bench_staging: {wrong} values differ from the CPU's")
    peak = torch.ops.late.pinned_bytes()
    pinned = [torch.empty(elements, pin_memory=True) for _ in range(BUCKETS)]
    actions = {"cpu": (means, here), "staged": (means, there), "copies": (copies, there, pinned)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    for turn in range(WARM_UP + turns):
        # In both directions alternately: whatever grows warmer or busier meanwhile meets all alike.
        for name in list(actions) if turn % 2 == 0 else reversed(actions):
            for tensor, value in zip(here + there, values + values, strict=True):
                tensor.copy_(value)
            seconds = timed(*actions[name])
            if turn >= WARM_UP:
                found[name].append(seconds)
    result = {"buckets_of_host_memory": peak / (elements * values[0].itemsize), "wrong": wrong}
    for number, kind in enumerate(("wall", "processor")):
        of = {name: [pair[number] for pair in pairs] for name, pairs in found.items()}
        rows = list(zip(of["cpu"], of["staged"], of["copies"], strict=True))
        ratio = spread([(staged - copied) / cpu for cpu, staged, copied in rows])
        whole = spread([staged / cpu for cpu, staged, _ in rows])
        least = {name: min(times) for name, times in of.items()}
        result[kind] = {
            **{name: {**spread(times), "least": least[name]} for name, times in of.items()},
            "ratio": ratio,
            "with_copies": whole,
            "of_least": (least["staged"] - least["copies"]) / least["cpu"],
        }
    if rank == 0:
        print(json.dumps(result), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--elements", type=int, default=25 * 2**18, help="of each of the buckets, fp32")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    if is_rank():
        run_rank(arguments.turns, arguments.elements)
        return
    late_device.build()
    settings = {"turns": arguments.turns, "elements": arguments.elements, "buckets": BUCKETS}
    header = about(**settings, strategy="two_phase", network="loopback", device="late, on host memory")
    options = ["--turns", str(arguments.turns), "--elements", str(arguments.elements)]
    ranks = {str(number): run_ranks(__file__, options, number) for number in RANKS}
    for number, found in ranks.items():
        print(f"{number} ranks: host memory {found['buckets_of_host_memory']:.2f} buckets, wrong {found['wrong']}")
        for kind in ("wall", "processor"):
            row, ratio = found[kind], found[kind]["ratio"]
            times = ", ".join(f"{name} {1e3 * row[name]['median']:.1f} ms" for name in ("cpu", "staged", "copies"))
            print(f"{kind:<10} {times}; (staged - copies) / cpu {ratio['median']:.3f} ", end="")
            print(f"({ratio['p10']:.3f} .. {ratio['p90']:.3f}), of the least {row['of_least']:.3f}")
    write(arguments.json, {**header, "load_after": about()["load"], "ranks": ranks})


if __name__ == "__main__":
    main()
