"""Cost of sealed messages: the time of a mean with ``secret=``, against the same mean without, in turns.

    python bench/bench_sealed.py --json bench/results/sealed.json     # as root; five minutes on two idle cores
    python bench/bench_sealed.py --rates none --mib 1 --pairs 3       # does it run?

ResNet-18's gradients with error feedback, as the hook sends them, between two hosts of netlab.py, or over loopback
(rate "none", which needs no rights), the fastest network that there is. A pair is one mean of each kind, one after the
other, the first of them alternately; its ratio is the sealed one's time over the open one's. Medians, with p10 and p90
of the ratios, and the two-sided 95 % interval of the geometric mean of ratios. Pairs scatter more than the cost, so the
processor time of sealing and opening is measured by itself as well, and given as a share of the median open mean. The
results have to be the same bits. With strategy "none" an open mean is torch's own all-reduce, and a sealed one a ring
of sealed messages.
"""

import argparse
import json
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import gradient_data
import torch
import torch.distributed as dist
from allreduce_methods import COARSE_GRIDS, GRIDS, Compressed, timed
from allreduce_pairs import summarise
from netlab import NetlabError
from ranks import RanksError, about, explain, is_rank, run_ranks, start_rank, write
from wan import add_wan_options, wan_from

from qcomm.transport.sealed import Direction

METHODS = {
    "k=1": (GRIDS["qcomm k=1"], "two_phase"),
    "k=3.4": (COARSE_GRIDS["qcomm k=3.4"], "two_phase"),
    "none": (GRIDS["qcomm k=1"], "none"),
}
WARM_UP = 4  # the bypass begins after the second
FEWER = 6  # times as few pairs of means without compression, which take longer by as much and more


class Clock:
    """Processor seconds of this thread in sealing and opening."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns ``function``, whose time is counted."""

        def timed_call(*arguments: object, **options: object) -> Any:
            begin = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.thread_time() - begin

        return timed_call


def check_equal(sealed: Compressed, plain: Compressed, values: torch.Tensor) -> None:
    """Raises unless both give the same bits; neither has averaged before, as residuals would differ."""
    results = []
    for method in (sealed, plain):
        buffer = values.clone()
        method(buffer)
        results.append(buffer)
    if not torch.equal(*results):
        raise ValueError("sealed messages gave another mean than open ones")


def run_rank(arguments: argparse.Namespace) -> None:
    """On every rank; rank 0 prints one line of JSON."""
    rank, _ = start_rank()
    bucket = gradient_data.bucket(gradient_data.load(arguments.gradients, rank), int(arguments.mib * 2**20 / 4))
    groups, found = [dist.new_group(), dist.new_group()], {}
    for name, (grid, strategy) in METHODS.items():
        sealed, plain = (
            Compressed(grid, bucket, strategy, error_feedback=True, group=group, secret=secret)
            for group, secret in zip(groups, (arguments.secret, None), strict=True)
        )
        check_equal(sealed, plain, bucket.values)
        for method in (sealed, plain) * WARM_UP:
            timed(method, bucket.values)
        count, pairs = arguments.pairs if strategy != "none" else max(2, arguments.pairs // FEWER), []
        for number in range(count):
            order = [sealed, plain] if number % 2 else [plain, sealed]
            taken = [timed(method, bucket.values) for method in order]
            pairs.append(taken if number % 2 else taken[::-1])
        clock = Clock()
        with (
            mock.patch.object(Direction, "seal", clock.around(Direction.seal)),
            mock.patch.object(Direction, "open", clock.around(Direction.open)),
        ):
            for _ in range(count):
                timed(sealed, bucket.values)
        found[name] = {"pairs": pairs, "sealing": clock.seconds / count}
    if rank == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def summary(name: str, pairs: list[list[float]], sealing: float) -> dict[str, Any]:
    """Figures of one method on one network."""
    ratios = [mine / other for mine, other in pairs]
    mean, lower, upper, median, _ = summarise(ratios)
    cuts = statistics.quantiles(ratios, n=10)
    sealed, plain = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "method": name,
        "pairs": len(pairs),
        "seconds": sealed,
        "seconds_open": plain,
        "ratio": median,
        "p10": cuts[0],
        "p90": cuts[-1],
        "geometric_mean": mean,
        "lower": lower,
        "upper": upper,
        "sealing_seconds": sealing,
        "sealing_share": sealing / plain,
    }


def show(row: dict[str, Any]) -> None:
    print(f"{row['rate']:>8} {row['method']:<6} {1e3 * row['seconds']:8.1f} ms, open {1e3 * row['seconds_open']:8.1f}, "
          f"ratio {row['ratio']:.4f} ({row['p10']:.3f} .. {row['p90']:.3f}), mean {row['geometric_mean']:.4f} "
          f"({row['lower']:.4f} .. {row['upper']:.4f}), sealing {1e3 * row['sealing_seconds']:.2f} ms, "
          f"{100 * row['sealing_share']:.2f} %", flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["none", "1gbit", "100mbit"], help="as tc writes them, or none")
    parser.add_argument("--mib", type=float, default=25.0, help="of the buffer")
    parser.add_argument("--pairs", type=int, default=60, help="of each method, on each network")
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--secret", type=Path, help=argparse.SUPPRESS)
    add_wan_options(parser)
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()
    if is_rank():
        run_rank(arguments)
        return 0
    header, rows = about(wan_from(arguments), mib=arguments.mib, cipher="AES-256-GCM", world_size=2), []
    try:
        for folder, rate, world_size in gradient_data.worlds(arguments.rates, [2]):
            with tempfile.TemporaryDirectory(prefix="qcomm-key-") as place:
                key = Path(place) / "key"
                key.touch(mode=0o600)
                key.write_text(secrets.token_hex(32))
                options = {"mib": arguments.mib, "pairs": arguments.pairs, "gradients": folder, "secret": key}
                texts = [text for name, value in options.items() for text in (f"--{name}", str(value))]
                found = run_ranks(__file__, texts, world_size, rate, wan=wan_from(arguments))
            for name, figures in found.items():
                row = {"rate": rate, **summary(name, **figures)}
                rows.append(row)
                show(row)
    except (NetlabError, RanksError) as error:
        return explain(error, "bench_sealed", "--rates none needs no rights")
    write(arguments.json, {**header, "load_after": about()["load"], "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
