"""Path of one collective through the package: files, functions, calls, and moves between files.

    python tools/trace_path.py                                    all three cases
    python tools/trace_path.py bucket --strategy exact_sum        a bucket in another strategy
    python tools/trace_path.py compress --list                    the path itself, a line for each move
    python tools/trace_path.py bucket bypass --json counts.json   the counts in a file

The cases:

- ``bucket``: one DDP bucket on rank 0 of two CPU ranks over gloo, at a steady step. SigmaGrid(1.0), error feedback.
- ``bypass``: the same bucket in strategy ``none``, at a step that passes without a handshake.
- ``compress``: ``qcomm.compress`` of 100000 normal values.

The definitions, which hold for each thread by itself and are then added:

- A call is an entry of a Python function defined under the package's directory. Every resumption of a generator is
  one. So is a comprehension where Python gives it a frame: generator expressions always, the others before Python 3.12.
- A file counts if one of its functions is entered; a function is a file and a qualified name.
- A move is a call whose file is not the file of the thread's call before it. A thread's first call is a move as well,
  into the package. A return alone is no move, because nothing is read there.

The counts do not depend on the timing of threads. The other rank starts only after rank 0's hook has returned, so no
wait is ever over before it begins. Recording ends after a barrier behind the step, so the worker thread is done. gloo's
own threads run callbacks of the bypass and are not counted. Python 3.11 or newer is needed.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import qcomm

CASES = ("bucket", "bypass", "compress")
PACKAGE = Path(qcomm.__file__).resolve().parent
WIDTH = 1024  # of a linear layer: a weight of two slices and a bias, both compressed
COMPRESSED_VALUES = 100_000
# Steps before the traced one: DDP rebuilds its buckets after the first, and the bypass makes its memory in the third.
WARM_UP_STEPS = 5
TIMEOUT = timedelta(seconds=120)


class Call(NamedTuple):
    """An entry of a function, ``depth`` calls of the package below the first one on its thread."""

    file: str
    function: str
    depth: int


class Recorder:
    """A profile function that keeps the package's calls by thread while ``recording`` is set.

    Args:
        hook_returned: is called whenever ``qcomm.compression_hook`` returns.
    """

    def __init__(self, hook_returned: Callable[[], None] | None = None) -> None:
        self.recording = False
        self.calls: dict[str, list[Call]] = {}
        self._depths: dict[str, int] = {}
        self._files: dict[str, str | None] = {}
        self._hook_returned = hook_returned

    def install(self) -> None:
        """Profiles this thread and all threads that it starts from now on."""
        threading.setprofile(self)
        sys.setprofile(self)

    def uninstall(self) -> None:
        """Ends the profile of this thread."""
        sys.setprofile(None)
        threading.setprofile(None)

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Notes a call or a return."""
        if event not in ("call", "return"):
            return
        if self.recording and (file := self._file(frame.f_code.co_filename)) is not None:
            thread = threading.current_thread().name
            depth = self._depths.get(thread, 0)
            if event == "call":
                self.calls.setdefault(thread, []).append(Call(file, frame.f_code.co_qualname, depth))
            self._depths[thread] = max(0, depth + (1 if event == "call" else -1))
        if event == "return" and frame.f_code is qcomm.compression_hook.__code__ and self._hook_returned is not None:
            self._hook_returned()

    def _file(self, name: str) -> str | None:
        if name not in self._files:
            path = Path(name).resolve()
            self._files[name] = str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else None
        return self._files[name]


def moves(calls: Sequence[Call]) -> list[Call]:
    """Returns the calls of one thread that enter another file than the call before them."""
    files = [None, *(call.file for call in calls)]
    return [call for call, before in zip(calls, files, strict=False) if call.file != before]


def count(path: dict[str, list[Call]]) -> dict[str, int]:
    """Returns files, functions, calls and moves of all threads."""
    calls = [call for thread in path.values() for call in thread]
    return {
        "files": len({call.file for call in calls}),
        "functions": len({(call.file, call.function) for call in calls}),
        "calls": len(calls),
        "moves": sum(len(moves(thread)) for thread in path.values()),
    }


def trace_compress() -> dict[str, list[Call]]:
    """Returns the calls of a second ``qcomm.compress``, after everything that is made once."""
    values, grid, recorder = torch.randn(COMPRESSED_VALUES), qcomm.SigmaGrid(1.0), Recorder()
    qcomm.compress(values, grid=grid)
    recorder.install()
    recorder.recording = True
    qcomm.compress(values, grid=grid)
    recorder.recording = False
    recorder.uninstall()
    return recorder.calls


def trace_bucket(strategy: str, width: int) -> dict[str, list[Call]]:
    """Returns rank 0's calls in a step of a model with one bucket, from two new processes."""
    context = multiprocessing.get_context("spawn")
    hook_returned, (ours, theirs) = context.Event(), context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="qcomm-trace-") as folder:
        arguments = (folder, strategy, width, hook_returned, theirs)
        ranks = [context.Process(target=_train, args=(rank, *arguments), daemon=True) for rank in range(2)]
        for process in ranks:
            process.start()
        theirs.close()
        try:
            path = ours.recv()
        except EOFError:
            path = None
        for process in ranks:
            process.join()
    if path is None or any(process.exitcode for process in ranks):
        raise SystemExit(f"trace_path: the ranks ended with exit codes {[process.exitcode for process in ranks]}")
    return path


def _train(rank: int, folder: str, strategy: str, width: int, hook_returned: Event, result: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    recorder = Recorder(hook_returned.set)
    if rank == 0:
        recorder.install()  # before the communicator's thread starts
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=TIMEOUT)
    model = DistributedDataParallel(torch.nn.Linear(width, width), bucket_cap_mb=1000)
    state = qcomm.attach(model, grid=qcomm.SigmaGrid(1.0), error_feedback=True, strategy=strategy)
    for step in range(WARM_UP_STEPS + 1):
        if step == WARM_UP_STEPS:
            state.reset_stats()
        loss = model(torch.randn(16, width)).square().mean()
        dist.barrier()
        if rank != 0:
            if not hook_returned.wait(TIMEOUT.total_seconds()):
                raise TimeoutError("rank 0's hook was not called")
            hook_returned.clear()
        recorder.recording = step == WARM_UP_STEPS
        loss.backward()
        dist.barrier()
        recorder.recording = False
    recorder.uninstall()
    stats = state.stats()
    if stats["buckets"] != 1 or stats["strategies"] != {0: strategy}:
        raise RuntimeError(f"the step had {stats['buckets']} buckets, averaged by {stats['strategies']}")
    if rank == 0:
        result.send(recorder.calls)
    dist.destroy_process_group()


def trace(case: str, strategy: str, width: int) -> dict[str, list[Call]]:
    """Returns the calls of a case by thread."""
    if case == "compress":
        return trace_compress()
    if case == "bucket":
        return trace_bucket(strategy, width)
    path = trace_bucket("none", width)
    if len(path) != 1:
        raise SystemExit(f"trace_path: the step did not pass by: it ran on the threads {sorted(path)}")
    return path


def show(path: dict[str, list[Call]]) -> None:
    """Prints a line for each move."""
    for thread, calls in path.items():
        print(f"\n  {thread}")
        for call in moves(calls):
            print(f"    {'  ' * call.depth}{call.file}: {call.function}")


def main() -> None:
    summary, examples = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="case", help=f"any of {', '.join(CASES)}; all by default")
    parser.add_argument("--strategy", default="two_phase", help="of the bucket (default: two_phase)")
    parser.add_argument(
        "--width", type=int, default=WIDTH, help=f"of the model's linear layer (default: {WIDTH}; 316 is one slice)"
    )
    parser.add_argument("--list", action="store_true", help="print the path: a line for each move, indented by depth")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts of each case")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.cases).difference(CASES)):
        parser.error(f"case must be one of {', '.join(CASES)}, got {', '.join(unknown)}")
    counts = {}
    for case in arguments.cases or CASES:
        path = trace(case, arguments.strategy, arguments.width)
        counts[case] = count(path)
        print(f"{case}: {', '.join(f'{number} {name}' for name, number in counts[case].items())}", flush=True)
        if arguments.list:
            show(path)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(counts, indent=2) + "\n")


if __name__ == "__main__":
    main()
