"""Common parts of the microbenchmarks: their data, and the facts that make a result comparable between machines."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qcomm


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Adds versions and threads to what pytest-benchmark writes about the machine."""
    machine_info.update(qcomm=qcomm.__version__, torch=torch.__version__, torch_threads=torch.get_num_threads())


@pytest.fixture
def throughput(benchmark: Any) -> Callable[..., None]:
    """``throughput(nbytes, **more)`` after measuring puts GB/s of uncompressed values and ``more`` into the JSON."""

    def add(nbytes: int, **more: float | str) -> None:
        benchmark.extra_info.update(more, uncompressed_bytes=nbytes)
        if benchmark.stats is not None:  # None under --benchmark-disable
            benchmark.extra_info["gb_per_s"] = nbytes / benchmark.stats.stats.median / 1e9

    return add
