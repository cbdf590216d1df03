"""The MPI library of mpi4py: imported without starting MPI, and compared with the launcher.

An MPI library that another one's mpirun started takes itself for a job of one rank, or ends the process with an error
of its own. Its name is known before MPI_Init, and the launcher's from the environment.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["MpiMismatchError", "check_launcher", "import_mpi"]


class MpiMismatchError(RuntimeError):
    """The process was started by the mpirun of another MPI than mpi4py uses."""


def import_mpi(start: bool) -> Any:
    """Returns the module ``mpi4py.MPI``. Unless MPI has started, its library and the launcher are compared before.

    Args:
        start: whether MPI is then initialised as ``mpi4py.rc`` says; it is never if False.

    Raises:
        ImportError: there is no mpi4py.
        MpiMismatchError: the library is not that of the launcher.
        RuntimeError: mpi4py finds no library.
    """
    import mpi4py

    first = "mpi4py.MPI" not in sys.modules
    start = start and first and mpi4py.rc.initialize
    if first:
        if start and mpi4py.rc.finalize is None:
            mpi4py.rc.finalize = True
        mpi4py.rc.initialize = False
    from mpi4py import MPI

    if not MPI.Is_initialized():
        check_launcher(MPI.Get_library_version(), os.environ)
    if start and not MPI.Is_initialized():
        level = mpi4py.rc.thread_level if mpi4py.rc.threads else "single"
        MPI.Init_thread(getattr(MPI, f"THREAD_{level.upper()}"))
    return MPI


def check_launcher(library: str, environment: Mapping[str, str]) -> None:
    """Raises MpiMismatchError if the environment is that of another MPI's mpirun.

    Args:
        library: result of ``MPI.Get_library_version()``.
        environment: of this process.

    Example:
        >>> check_launcher("MPICH Version: 5.0", {"MPI_LOCALNRANKS": "2"})
        >>> check_launcher("MPICH Version: 5.0", {"OMPI_COMM_WORLD_SIZE": "2"})
        Traceback (most recent call last):
        ...
        qcomm.transport.mpi_library.MpiMismatchError: mpirun is that of Open MPI, and the MPI library of mpi4py is
        'MPICH Version: 5.0': start the program with the mpirun of that library, or have mpi4py use Open MPI
    """
    name = " ".join(library.splitlines()[0].split())
    if "OMPI_COMM_WORLD_SIZE" in environment:
        # Spectrum MPI is one of Open MPI's family, and a library with PMIx understands its launcher.
        others = ("MPICH", "Intel", "MVAPICH")
        launcher, fits = "Open MPI", not name.startswith(others) or "pmix" in library.lower()
    elif "MPI_LOCALNRANKS" in environment:  # Hydra's own. PMI_SIZE is also set by srun, Flux and PALS, for every MPI
        launcher, fits = "MPICH or Intel MPI", not name.startswith("Open MPI")
    else:
        return
    if not fits:
        raise MpiMismatchError(
            f"mpirun is that of {launcher}, and the MPI library of mpi4py is {name!r}: start the program with the "
            f"mpirun of that library, or have mpi4py use {launcher}"
        )
