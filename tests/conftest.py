"""Fixtures that several files of tests share, and which examples hypothesis tries."""

from collections.abc import Iterator
from pathlib import Path

import emulated_core
import pytest
import torch
from hypothesis import settings

# The same examples each time, so that a failure comes from the change at hand; others with
# --hypothesis-profile=explore. A loaded machine makes single examples slow.
settings.register_profile("steady", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("steady")

# Programs, which doctests would import: launchers start them. The first fails where mpi4py is installed and no MPI is.
PROGRAMS = ("mpi_cases", "soak_ranks", "soak_minutes", "framework_script", "torchft_replicas")
collect_ignore = ["soak.py", *(f"support/{name}.py" for name in PROGRAMS)]


@pytest.fixture(scope="session")
def emulated_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels' module over their emulation, built once."""
    if reason := emulated_core.reason_to_skip():
        pytest.skip(reason)
    return emulated_core.build(tmp_path_factory.mktemp("cuda_emulation"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For the test torch has one thread, as in each process of a run: the number shows in the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
