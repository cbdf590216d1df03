"""Tensors that have a shape and no memory of their own: every entrance to the core refuses them, and none crashes."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor
from torch.nn.parameter import UninitializedParameter
from torch.testing._internal.two_tensor import TwoTensor

import qcomm
from qcomm.codec import _native, checks, encode, measure, plan
from qcomm.codec.huffman import code_lengths
from qcomm.codec.packet import Segment, decode_into
from qcomm.codec.quantize import Quantizer, dequantize, quantize
from qcomm.collectives import ErrorFeedback
from qcomm.local_sgd.parameters import check_writable

COUNT = 64
GRID = qcomm.SigmaGrid(1.0)
STATISTICS = measure(torch.randn(COUNT))


def with_storage(nbytes: int, dtype: torch.dtype = torch.float32, first: int = 0, step: int = 1) -> torch.Tensor:
    """A tensor whose storage was resized, as FSDP does it."""
    tensor = torch.ones(COUNT, dtype=dtype)[first::step]
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(COUNT)


STRANGERS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "freed": (lambda: with_storage(0), "whose storage has 0"),
    "short": (lambda: with_storage(4 * COUNT - 1), "whose storage has 255"),
    "short and strided": (lambda: with_storage(4 * COUNT - 1, first=1, step=2), "whose storage has 255"),
    "fake": (fake, "FakeTensor without memory; pass the plain tensor"),
    "wrapper": (lambda: TwoTensor(torch.ones(COUNT), torch.ones(COUNT)), "TwoTensor without memory"),
    "masked": (lambda: masked_tensor(torch.ones(COUNT), torch.ones(COUNT) > 0), "MaskedTensor without memory"),
    "functional": (lambda: torch._to_functional_tensor(torch.ones(COUNT)), "outside of torch.func"),
    "sparse": (lambda: torch.eye(8).to_sparse(), r"call .to_dense\(\) first"),
    "sparse rows": (lambda: torch.eye(8).to_sparse_csr(), r"call .to_dense\(\) first"),
    "opaque": (lambda: torch.ones(8, 8).to_mkldnn(), r"call .to_dense\(\) first"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(61)]), r"call .to_padded_tensor\(0.0\)"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(61)], layout=torch.jagged),
        r"\.unbind\(\)",
    ),
    "lazy": (UninitializedParameter, "run the model once first"),
}
DTYPES: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(COUNT), 0.1, 0, torch.qint8),
        r"call .dequantize\(\) first",
    ),
    "float8": (lambda: torch.ones(COUNT).to(torch.float8_e4m3fn), r"call .to\(torch.bfloat16\) first"),
    "complex": (lambda: torch.ones(COUNT, dtype=torch.complex64), "view_as_real"),
}
FLOAT_ENTRANCES: dict[str, Callable[[torch.Tensor], object]] = {
    "compress": qcomm.compress,
    "estimate_entropy": qcomm.estimate_entropy,
    "quantize": lambda tensor: quantize(tensor, GRID),
    "measure": measure,
    "encode": lambda tensor: encode([Segment(tensor, Quantizer.raw())]),
    "decode_into": lambda tensor: decode_into(qcomm.compress(torch.randn(COUNT)), tensor),
    "plan": lambda tensor: plan(STATISTICS, GRID, tensor),
}


@pytest.mark.parametrize("entrance", FLOAT_ENTRANCES)
@pytest.mark.parametrize("kind", STRANGERS | DTYPES)
def test_values_without_memory_are_refused_with_advice(kind: str, entrance: str) -> None:
    make, advice = (STRANGERS | DTYPES)[kind]
    if (kind, entrance) == ("lazy", "encode"):
        pytest.skip("torch's own error, with the same advice, comes first")
    with pytest.raises(TypeError, match=rf"(tensor|values|out) must be .*{advice}"):
        FLOAT_ENTRANCES[entrance](make())


@pytest.mark.parametrize("kind", [kind for kind in STRANGERS if kind != "lazy"])
def test_what_is_stored_or_kept_is_refused_with_its_name(kind: str) -> None:
    make, advice = STRANGERS[kind]
    with pytest.raises(TypeError, match=rf"state_dict\['w'\] must be a dense tensor.*{advice}"):
        qcomm.save({"w": make()}, "/nowhere/file")
    with pytest.raises(TypeError, match=f"'w' must be a dense tensor.*{advice}"):
        check_writable("w", make())
    if make().dim() == 1:
        state = ErrorFeedback().state_dict() | {"local": {"w": make()}, "world_size": 1}
        with pytest.raises(TypeError, match=f"the residual of 'w' must be a dense tensor.*{advice}"):
            ErrorFeedback().load_state_dict(state)


def test_residuals_and_samples_have_memory() -> None:
    values, residual = torch.randn(COUNT), with_storage(0)
    with pytest.raises(TypeError, match="residual must be a dense tensor"):
        measure(values, residual)
    sample = torch.zeros(_native.SAMPLE_NUMBERS, dtype=torch.float64)
    sample.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="sample must be a dense tensor"):
        encode([Segment(values, Quantizer.raw(), None, sample)])


@pytest.mark.parametrize("entrance", [qcomm.decompress, qcomm.inspect, lambda p: decode_into(p, torch.ones(COUNT))])
def test_packets_have_memory(entrance: Callable[[torch.Tensor], object]) -> None:
    packet = qcomm.compress(torch.randn(COUNT))
    with pytest.raises(TypeError, match="packet must be a dense tensor with memory of its own, got a FakeTensor"):
        entrance(FakeTensorMode().from_tensor(packet))
    packet.untyped_storage().resize_(packet.numel() - 1)
    with pytest.raises(TypeError, match=r"packet must be a dense tensor .* whose storage has"):
        entrance(packet)


def test_symbols_and_counts_have_memory() -> None:
    _, quantizer = quantize(torch.randn(COUNT), GRID)
    with pytest.raises(TypeError, match="symbols must be a dense tensor"):
        dequantize(with_storage(0, torch.int32), quantizer)
    with pytest.raises(TypeError, match="counts must be a dense tensor"):
        code_lengths(with_storage(0, torch.int64))


def test_transforms_and_fake_allocations_are_refused() -> None:
    with pytest.raises(TypeError, match=r"outside of torch\.func"):
        torch.func.vmap(qcomm.compress)(torch.randn(4, COUNT))
    with pytest.raises(TypeError, match=r"outside of torch\.func"):
        torch.func.grad(lambda values: qcomm.decompress(qcomm.compress(values)).sum())(torch.randn(COUNT))
    packet = qcomm.compress(torch.randn(COUNT))
    with FakeTensorMode(), pytest.raises(TypeError, match="out must be a dense tensor"):
        qcomm.decompress(packet)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.nn.Parameter(torch.randn(COUNT)),
        torch.randn(8, 8).t(),
        torch.randn(1).expand(COUNT),
        torch.randn(4 * COUNT)[3::4],
        torch.empty(0),
        with_storage(0)[:0],
        torch.randn(COUNT).as_subclass(type("Named", (torch.Tensor,), {})),
    ],
    ids=["parameter", "transposed", "expanded", "strided", "empty", "empty of freed", "subclass with memory"],
)
def test_memory_counts_and_not_the_type(tensor: torch.Tensor) -> None:
    restored = qcomm.decompress(qcomm.compress(tensor, qcomm.SigmaGrid(2**-12)))
    assert restored.shape == tensor.shape
    assert torch.allclose(restored, tensor.detach().as_subclass(torch.Tensor), atol=0.01)


def test_no_address_reaches_the_core_past_the_gate() -> None:
    trees = [ast.parse(Path(module.__file__).read_text()) for module in (_native, checks)]
    callers = {
        function.name
        for tree in trees
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr == "data_ptr"
    }
    assert callers == {"memory_address"}


def test_a_claim_above_the_limit_is_refused_before_memory_is_asked_for() -> None:
    packet = qcomm.compress(torch.full((1000, 3), 2.5))
    with pytest.raises(qcomm.PacketError, match=r"shape \(1000, 3\), 12000 bytes, more than max_bytes=11999"):
        qcomm.decompress(packet, max_bytes=11999)
    assert qcomm.decompress(packet, max_bytes=12000).shape == (1000, 3)
    assert qcomm.decompress(qcomm.compress(torch.empty(0)), max_bytes=0).numel() == 0
    for wrong, error in ((-1, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="max_bytes must be"):
            qcomm.decompress(packet, max_bytes=wrong)  # type: ignore[arg-type]
