"""The claims of bench_allreduce about a method: bytes, errors, and above all #wrong, which has to find any fault."""

import argparse
import math
import sys
from pathlib import Path

import pytest
import torch
from distributed import gathered, world

BENCH = str(Path(__file__).parents[2] / "bench")


@pytest.fixture
def bench(monkeypatch):
    """The bench's modules, which import each other by name."""
    pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    pytest.importorskip("scipy", reason="SciPy is not installed")
    monkeypatch.syspath_prepend(BENCH)
    import allreduce_pairs
    import bench_allreduce
    import gradient_data

    return argparse.Namespace(pairs=allreduce_pairs, allreduce=bench_allreduce, data=gradient_data)


def make_bucket(rank, elements=40_000):
    if BENCH not in sys.path:
        sys.path.insert(0, BENCH)
    import gradient_data

    generator = torch.Generator().manual_seed(rank)
    shapes = (64, 32, 3, 3), (64,), (10, 64), (128, 64, 3, 3)
    return gradient_data.bucket([1e-3 * torch.randn(shape, generator=generator) for shape in shapes], elements)


@world(2, 3)
@pytest.mark.usefixtures("bench")
def test_methods_are_right_and_what_is_wrong_is_counted(rank, world_size):
    bucket = make_bucket(rank)
    import allreduce_methods
    import bench_allreduce

    values = bucket.values
    mean = torch.stack(gathered(values)).double().mean(0)
    methods = allreduce_methods.make_methods(bucket, ["two_phase", "auto", "all_gather"], False, 1)
    found = {name: bench_allreduce.check(name, method, values, mean) for name, method in methods.items()}
    sent = {name: method(values.clone()) for name, method in methods.items()}
    assert all(wrong == 0 for _, wrong, _ in found.values()), found
    assert {name for name, (*_, bounded) in found.items() if not bounded} == {f"powersgd r={r}" for r in (1, 2, 4)}
    for name, low, high in (
        ("fp32", 0, 1e-6), ("fp16", 1e-5, 1e-3), ("bf16", 1e-4, 1e-2), ("int8", 1e-3, 0.02),
        ("qcomm k=1", 0.1, 0.6), ("qcomm range c=6", 1e-3, 0.05), ("powersgd r=1", 0.1, 1.0),
    ):  # fmt: skip
        assert low <= found[name][0] <= high, (name, found[name])
    fp32 = 2 * (world_size - 1) * values.nbytes // world_size
    assert (sent["fp32"], sent["bf16"]) == (fp32, 2 * (world_size - 1) * values.nbytes // 2 // world_size)
    # Both phases send int8 and a scale for 512 values.
    chunk = math.ceil(values.numel() / world_size / 512) * 516
    assert sent["int8"] == 2 * (world_size - 1) * chunk
    assert sent["qcomm k=2"] < sent["qcomm k=1"] < sent["qcomm range c=6"] < fp32 / 2

    # One bit on one rank, what no rank has right, and what is no number.
    for name in ("fp32", "bf16", "int8", "qcomm k=1", "qcomm k=2 all_gather", "powersgd r=1"):
        result = values.clone()
        methods[name](result)
        allowed = allreduce_methods.allowed_error(name, methods[name], values, mean.float())
        assert bench_allreduce.count_wrong(result, mean, allowed) == 0
        if rank == world_size - 1:
            result[77] = torch.nextafter(result[77], torch.tensor(torch.inf))
        assert bench_allreduce.count_wrong(result, mean, allowed) == 1
        result = mean.float()
        if allowed is not None:
            assert float(allowed.min()) > 0 and float(allowed.max()) < float(values.abs().max())
            result[100:103] += 1.5 * allowed[100:103]
            assert bench_allreduce.count_wrong(result, mean, allowed) == 3 * world_size
        result[200:202] = torch.nan
        assert bench_allreduce.count_wrong(result, mean, allowed) >= 2 * world_size


@world(2)
@pytest.mark.usefixtures("bench")
def test_pairs(rank, world_size):
    bucket = make_bucket(rank)
    import allreduce_pairs

    rows = allreduce_pairs.run_pairs(bucket, bucket.values.nbytes / 2**20, 6, True, 1)
    assert [(row.way, row.base) for row in rows] == [
        (way, base) for way in ("hook", "all_reduce") for base in ("fp32", "bf16")
    ]
    assert all(row.wrong == 0 for row in rows)
    assert gathered([row.geometric_mean for row in rows]) == [[row.geometric_mean for row in rows]] * world_size
    for row in rows:
        assert row.chosen in {"none", "bf16", "all_gather", "two_phase"}
        assert 0 < row.lower <= row.geometric_mean <= row.upper and row.median_lower <= row.median


def test_the_bounds_of_pairs_hold_as_often_as_they_say(bench):
    generator = torch.Generator().manual_seed(0)
    trials, inside, above = 400, 0, 0
    for _ in range(trials):
        ratios = (0.1 * torch.randn(60, generator=generator, dtype=torch.float64)).exp().mul(1.1).tolist()
        _, lower, upper, _, median_lower = bench.pairs.summarise(ratios)
        inside += lower <= 1.1 <= upper
        above += median_lower <= 1.1
    # Binomial, p = 0.95: within four standard errors.
    assert abs(inside / trials - 0.95) < 0.044
    assert above / trials > 0.95 - 0.044


def test_a_bucket_has_layers_and_every_element_once(bench):
    parts = [torch.arange(12.0).view(4, 3), torch.arange(12.0, 17.0)]
    bucket = bench.data.bucket(parts, 25)
    assert [tuple(shape) for shape in bucket.shapes] == [(4, 3), (5,), (2, 3), (2,)]
    assert bucket.values.tolist() == [*range(17), *range(8)]
    assert [(spec.offset, spec.numel) for spec in bucket.specs] == [(0, 12), (12, 5), (17, 6), (23, 2)]


@pytest.mark.parametrize(("text", "mib"), [("64K", 1 / 16), ("25M", 25), ("1.5m", 1.5), ("1G", 1024)])
def test_sizes(bench, text, mib):
    assert bench.allreduce.size_in_mib(text) == mib


@pytest.mark.parametrize("text", ["", "25", "M", "-1M", "0K", "0.001K", "nanM", "1T"])
def test_nonsense_is_no_size(bench, text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a size such as 64K"):
        bench.allreduce.size_in_mib(text)
