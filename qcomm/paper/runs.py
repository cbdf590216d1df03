"""Execution of the missing runs, several at a time, each in a process with one thread."""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qcomm.paper.results import Cells
from qcomm.paper.settings import Settings
from qcomm.recipes import launch

Measurement = Callable[[Settings, bool], dict[str, Any]]


def run_missing(
    kind: str, measurement: Measurement, wanted: Sequence[Settings], folder: Path, jobs: int, in_processes: bool
) -> list[dict[str, Any]]:
    """Returns every wanted run, from its file or made now.

    Args:
        kind: kind of the runs' files.
        measurement: function that is importable by name; called with the settings and ``in_processes``.
        wanted: settings of the runs.
        folder: directory of the files; each is written as soon as its run is done.
        jobs: number of concurrent runs.
        in_processes: whether a run's workers are processes that exchange over gloo.

    Returns:
        The stored runs, in the order of ``wanted``.

    Raises:
        RecipeError: a stored run is of other settings, or a run raised a user error.
    """
    cells = Cells(folder)
    missing = [settings for settings in wanted if cells.find(kind, settings) is None]
    with _Report(kind, len(wanted), len(wanted) - len(missing)) as report:
        if jobs == 1 or len(missing) <= 1:
            for settings in missing:
                _run(kind, measurement, settings, folder, in_processes)
                report.done(settings)
        else:
            _run_parallel(kind, measurement, missing, folder, jobs, in_processes, report)
    stored = [cells.find(kind, settings) for settings in wanted]
    return [run for run in stored if run is not None]


def _run_parallel(
    kind: str,
    measurement: Measurement,
    missing: Sequence[Settings],
    folder: Path,
    jobs: int,
    in_processes: bool,
    report: "_Report",
) -> None:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=context) as pool:
        futures: dict[Future[None], Settings] = {
            pool.submit(_run, kind, measurement, settings, folder, in_processes): settings for settings in missing
        }
        waiting = set(futures)
        try:
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    report.done(futures[future])
        except BaseException:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, only runs that have begun are finished
            raise


def _run(kind: str, measurement: Measurement, settings: Settings, folder: Path, in_processes: bool) -> None:
    """Makes one run and writes its file.

    It uses one thread: two do not speed up such small matrices, and the number of threads would change the last bits.
    """
    if in_processes:
        launch(_rank_main, settings.workers, 1, kind, measurement, settings, folder)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        Cells(folder).store(kind, settings, measurement(settings, False))
    finally:
        torch.set_num_threads(threads)


def _rank_main(kind: str, measurement: Measurement, settings: Settings, folder: Path) -> None:
    result = measurement(settings, True)
    if dist.get_rank() == 0:
        Cells(folder).store(kind, settings, result)


class _Report:
    """A progress bar on a terminal, a line per run elsewhere."""

    def __init__(self, label: str, total: int, done: int) -> None:
        self._count, self._total = done, total
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task(label, total=total, completed=done)
        elif done:
            print(f"{label}: {done} of {total} runs are stored", flush=True)

    def __enter__(self) -> "_Report":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._progress:
            self._progress.stop()

    def done(self, settings: Settings) -> None:
        """Reports that one more run is stored."""
        self._count += 1
        if self._progress:
            self._progress.advance(self._task)
        else:
            print(f"{self._count}/{self._total} {settings.slug}", flush=True)
