"""The end of a process that has waited for a silent rank in vain: MPI_Finalize would wait for that rank for ever.

A rank that is only late sends a farewell when it leaves. The end of the process waits for it for a moment, and MPI is
then finalized as usual. Otherwise MPI_Abort ends the job with a code other than 0, the silent rank included.
"""

import atexit
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from qcomm.transport.polling import poll_until

__all__ = ["expect_before_exit"]

EXIT_SECONDS = 2.0  # maximum wait at the end of the process


class _Expected(NamedTuple):
    mpi: Any
    process: int
    missing: Callable[[], str]


_expected: list[_Expected] = []


def expect_before_exit(mpi: Any, missing: Callable[[], str]) -> None:
    """Has the end of this process abort the job unless nothing is missing by then.

    Args:
        mpi: the module ``mpi4py.MPI``.
        missing: names the ranks without which MPI cannot be finalized; "" if all have come.
    """
    _expected.append(_Expected(mpi, os.getpid(), missing))


def _abort_without_them() -> None:
    for mpi, process, missing in _expected:
        # A forked child must not use its parent's MPI.
        if process == os.getpid() and not mpi.Is_finalized():
            _abort_unless_they_come(mpi, missing)


def _abort_unless_they_come(mpi: Any, missing: Callable[[], str]) -> None:
    if poll_until(lambda: not missing(), EXIT_SECONDS):
        return
    print(
        f"rank {mpi.COMM_WORLD.Get_rank()}: MPI_Finalize would wait for ever for {missing()}, silent for the timeout "
        "and since; MPI_Abort ends the job",
        file=sys.stderr,
        flush=True,
    )
    mpi.COMM_WORLD.Abort(1)


atexit.register(_abort_without_them)
