"""Allocations do not depend on the program's default dtype and device: each says its own.

``torch.set_default_dtype`` and ``torch.set_default_device`` belong to the program that uses the library.
"""

import ast
from pathlib import Path

import pytest
import torch
from distributed import world
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import qcomm

PACKAGE = Path(qcomm.__file__).parent
MAKERS = (
    *("arange", "asarray", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal"),
    *("ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"),
)
# Rooms that own their process, and the specification, which tests call: nobody else's default device reaches them.
OWN_DEVICE = ("__main__.py", "cli", "paper", "planner", "recipes", "reference")


def allocations(source: str) -> list[tuple[int, set[str | None]]]:
    """Line and keywords of each call that makes a tensor of no other one."""
    return [
        (node.lineno, {keyword.arg for keyword in node.keywords})
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in MAKERS
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
    ]


def test_every_allocation_says_its_dtype_and_device() -> None:
    silent = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        needed = {"dtype"} if room in OWN_DEVICE else {"dtype", "device"}
        for line, keywords in allocations(path.read_text()):
            silent += [f"{path.relative_to(PACKAGE)}:{line} without {name}" for name in needed - keywords]
    assert not silent, "\n".join(silent)


def test_silent_allocations_are_found() -> None:
    assert allocations("a = torch.zeros(3)\nb = torch.rand(2, dtype=t, device=d)") == [
        (1, set()),
        (2, {"dtype", "device"}),
    ]


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16, "meta"], ids=str)
def default(request):
    """The program's default dtype, or its default device."""
    return request.param


class Defaults:
    """A program with other defaults, as long as the ``with`` block lasts."""

    def __init__(self, default):
        self.default = default

    def __enter__(self):
        if self.default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(self.default)

    def __exit__(self, *_):
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def test_the_codec_works_under_other_defaults(default, tmp_path) -> None:
    tensor = torch.randn(5000)
    packet, entropy = qcomm.compress(tensor), qcomm.estimate_entropy(tensor)
    with Defaults(default):
        assert torch.equal(qcomm.compress(tensor), packet)
        assert qcomm.estimate_entropy(tensor) == entropy
        restored, described = qcomm.decompress(packet), qcomm.inspect(packet)
        qcomm.save({"w": tensor, "i": restored}, tmp_path / "file", qcomm.SigmaGrid(1.0))
        loaded = qcomm.load(tmp_path / "file")
    assert torch.equal(restored, qcomm.decompress(packet)) and described == qcomm.inspect(packet)
    assert restored.device.type == loaded["w"].device.type == "cpu" and restored.dtype == torch.float32
    assert torch.equal(loaded["w"], restored)


@world(2)
def test_collectives_work_under_other_defaults(rank, world_size, default):
    generator = torch.Generator().manual_seed(rank)
    values = torch.randn(5000, generator=generator)
    inputs = torch.randn(8, 40, generator=generator)
    strategies = ("two_phase", "all_gather", "exact_sum", "hierarchical", "none", "bf16")
    results = []
    for defaults in (torch.float32, default):
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(40, 200), nn.Linear(200, 10)) for _ in strategies]
        buckets = [values.clone() for _ in strategies]
        with Defaults(defaults):
            for strategy, model, bucket in zip(strategies, layers, buckets, strict=True):
                qcomm.all_reduce(bucket, qcomm.SigmaGrid(3.0), strategy=strategy, ranks_per_node=1)
                ddp = DistributedDataParallel(model)
                qcomm.attach(ddp, grid=qcomm.SigmaGrid(3.0), strategy=strategy, ranks_per_node=1)
                for _ in range(3):
                    ddp(inputs).square().mean().backward()
            averager = qcomm.CompressedModelAverager(1)
            averager.average_parameters(layers[0].parameters())
            averager.average_parameters(layers[0].parameters())
            qcomm.broadcast_parameters(layers[0])
        results.append([*buckets, *(p.grad for model in layers for p in model.parameters()), *layers[0].parameters()])
    assert all(torch.equal(found, expected) for expected, found in zip(*results, strict=True))
