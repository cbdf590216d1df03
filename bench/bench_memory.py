"""Memory of the hook: what a rank's process holds beyond that of DDP's plain all-reduce, in bytes a parameter.

    python bench/bench_memory.py --json bench/results/memory.json     # five minutes
    python bench/bench_memory.py --layers 4 --steps 4 --repeats 1     # does it run?

Every method trains the same stack of linear layers in fresh processes over loopback, with gradients as views of DDP's
buckets and an optimizer that keeps nothing. ``kept`` is resident memory between steps, ``peak`` the largest that the
process ever had, both as the kernel counts them, of the rank that has more, minus those of fp32. PowerSGD needs all
gradients in one bucket, and is compared with fp32 in one bucket. Allocators differ from run to run: medians, and the
range of all runs. "Of tensors" are the
residuals that the hook's own state holds, which are the part that a checkpoint has as well.
"""

import argparse
import gc
import json
import resource
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import about, is_rank, run_ranks, start_rank, write
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import qcomm

PLAIN = "fp32"
ONE_BUCKET = "fp32, one bucket"
METHODS = (
    *(PLAIN, "fp16", "qcomm none", "qcomm k=1", "qcomm k=3.4", "qcomm k=1, no feedback"),
    *(ONE_BUCKET, "powersgd r=2", "powersgd r=4"),
)
WIDTH, BATCH = 1024, 4
POWER_START = 2


def attach(model: DistributedDataParallel, method: str) -> qcomm.CompressionState | None:
    """Registers the hook of a method; returns qcomm's state."""
    if method.startswith("qcomm "):
        name, _, feedback = method.removeprefix("qcomm ").partition(", ")
        if name == "none":
            return qcomm.attach(model, strategy="none")
        grid = qcomm.SigmaGrid(float(name.removeprefix("k=")))
        return qcomm.attach(model, grid=grid, strategy="two_phase", error_feedback=not feedback)
    if method.startswith("powersgd r="):
        rank = int(method.removeprefix("powersgd r="))
        state = PowerSGDState(None, rank, start_powerSGD_iter=POWER_START)
        model.register_comm_hook(state, powerSGD_hook)
        return None
    hook = default_hooks.fp16_compress_hook if method == "fp16" else default_hooks.allreduce_hook
    model.register_comm_hook(None, hook)
    return None


def resident() -> int:
    """Bytes of this process's memory that are in RAM now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def residuals(state: qcomm.CompressionState | None) -> int:
    """Bytes of the tensors in a hook's state dict."""
    if state is None:
        return 0
    found, left = 0, [state.state_dict()]
    while left:
        value: Any = left.pop()
        if isinstance(value, torch.Tensor):
            found += value.nbytes
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple)):
            left += value
    return found


def run_rank(method: str, layers: int, steps: int) -> None:
    """On every rank; rank 0 prints one line of JSON."""
    rank, _ = start_rank()
    torch.manual_seed(0)
    stack = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)])
    # The hooks of torch start collectives from callbacks, which on gloo have no common order for several buckets.
    cap = 1000.0 if method == ONE_BUCKET or method.startswith("powersgd") else 25.0
    model = DistributedDataParallel(stack, gradient_as_bucket_view=True, bucket_cap_mb=cap)
    state = attach(model, method)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        model(torch.randn(BATCH, WIDTH, generator=generator)).square().mean().backward()
        optimizer.step()
    gc.collect()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = torch.tensor([resident(), peak], dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if rank == 0:
        kept, highest = (int(value) for value in found.tolist())
        elements = sum(weight.numel() for weight in model.parameters())
        print(
            json.dumps({"elements": elements, "kept": kept, "peak": highest, "tensors": residuals(state)}), flush=True
        )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24, help="of 2^20 weights each (default %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="(default %(default)s)")
    parser.add_argument("--world", type=int, default=2, help="number of ranks (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    if is_rank():
        run_rank(arguments.method, arguments.layers, arguments.steps)
        return
    command = shlex.join(["python", "bench/bench_memory.py", *sys.argv[1:]])
    header = about(command=command, layers=arguments.layers, steps=arguments.steps, world_size=arguments.world)
    options = ["--layers", str(arguments.layers), "--steps", str(arguments.steps)]
    found: dict[str, list[dict[str, int]]] = {method: [] for method in METHODS}
    for turn in range(arguments.repeats):
        print(f"# {turn + 1} of {arguments.repeats}", flush=True)
        for method in METHODS:
            found[method].append(run_ranks(__file__, [*options, "--method", method], arguments.world))
    rows = [summarise(method, found) for method in METHODS]
    print(f"{'method':<24}{'kept':>8}{'range':>16}{'peak':>8}{'range':>16}{'of tensors':>12}   bytes a parameter")
    for row in rows:
        cells = "".join(
            f"{row[name]['median']:>8.2f}{row[name]['least']:>8.2f} ..{row[name]['most']:>5.2f}"
            for name in ("kept", "peak")
        )
        print(f"{row['method']:<24}{cells}{row['tensors']:>12.2f}")
    write(arguments.json, {**header, "unit": "bytes a parameter beyond fp32", "rows": rows})


def summarise(method: str, found: Mapping[str, Sequence[Mapping[str, int]]]) -> dict[str, Any]:
    """Returns median and range of a method's memory, less the median of its plain all-reduce, in bytes a parameter."""
    one_bucket = method == ONE_BUCKET or method.startswith("powersgd")
    plain, elements = found[ONE_BUCKET if one_bucket else PLAIN], found[method][0]["elements"]
    row: dict[str, Any] = {"method": method, "elements": elements, "tensors": found[method][0]["tensors"] / elements}
    for name in ("kept", "peak"):
        base = statistics.median(run[name] for run in plain)
        values = [(run[name] - base) / elements for run in found[method]]
        row[name] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return row


if __name__ == "__main__":
    main()
