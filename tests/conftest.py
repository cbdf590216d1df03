"""Fixtures that several files of tests share."""

from pathlib import Path

import emulated_core
import pytest

# Ranks of mpirun run it. Doctests would import it here, which fails where mpi4py is installed and no MPI is.
collect_ignore = ["mpi_cases.py"]


@pytest.fixture(scope="session")
def emulated_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels' module over their emulation, built once."""
    if reason := emulated_core.reason_to_skip():
        pytest.skip(reason)
    return emulated_core.build(tmp_path_factory.mktemp("cuda_emulation"))
