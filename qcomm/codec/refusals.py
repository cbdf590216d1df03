"""Refusals: errors for tensors that the core cannot read and for a package without the core, each with advice.

A tensor may have a shape, dtype and device and no memory behind them. Sharded, fake and wrapped tensors, transforms of
``torch.func`` and tracers are of this kind, and so are parameters whose storage FSDP has freed.
"""

import sys
from pathlib import Path

import torch
from torch.nn.parameter import is_lazy

__all__ = ["core_refusal", "dtype_refusal", "memory_refusal"]


def core_refusal(package: Path) -> ImportError:
    """Returns the error for a folder ``qcomm`` without the compiled core: the source, or a damaged installation.

    Example:
        >>> print(core_refusal(Path("/packages/qcomm")))  # doctest: +ELLIPSIS
        /packages/qcomm has no compiled core (_C) for Python 3...; install qcomm again
    """
    version = ".".join(map(str, sys.version_info[:2]))
    advice = "install qcomm again"
    if (package.parent / "csrc").is_dir():
        advice = (
            "this is the source folder, which Python finds before an installed qcomm when it starts in "
            f"{package.parent}: start it in another folder, or build the core here with `make build`"
        )
    return ImportError(f"{package} has no compiled core (_C) for Python {version}; {advice}")


def memory_refusal(name: str, tensor: torch.Tensor) -> TypeError:
    """Returns the error for a tensor whose elements do not all lie in dense memory of its own.

    Example:
        >>> print(memory_refusal("tensor", torch.eye(2).to_sparse()))
        tensor must be a dense tensor with memory of its own, got a Tensor of layout torch.sparse_coo; call .to_dense()
        first
    """
    found, advice = _described(tensor)
    return TypeError(f"{name} must be a dense tensor with memory of its own, got a {found}; {advice}")


def dtype_refusal(name: str, dtype: torch.dtype) -> TypeError:
    """Returns the error for a tensor whose dtype the codec does not know.

    Example:
        >>> print(dtype_refusal("tensor", torch.float8_e5m2))
        tensor must be float32, float16, bfloat16 or float64, got torch.float8_e5m2; call .to(torch.bfloat16) first
    """
    hint = ""
    if dtype.is_complex:
        hint = "; view it as real with torch.view_as_real"
    elif str(dtype).startswith("torch.q"):
        hint = "; call .dequantize() first"
    elif dtype.is_floating_point:
        hint = "; call .to(torch.bfloat16) first"
    return TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {dtype}{hint}")


def _described(tensor: torch.Tensor) -> tuple[str, str]:
    """Returns what a tensor is, and what to do about it."""
    kind = type(tensor).__name__
    if is_lazy(tensor):
        return f"{kind} that has no shape yet", "run the model once first"
    if tensor.is_nested:
        return (
            f"nested {kind} of layout {tensor.layout}",
            "call .to_padded_tensor(0.0) first, or pass the tensors of .unbind() one by one",
        )
    if tensor.layout != torch.strided:
        return f"{kind} of layout {tensor.layout}", "call .to_dense() first"
    if hasattr(tensor, "to_local"):
        return (
            f"{kind}, whose values are in its shards",
            "pass .to_local() for this rank's shard, or .full_tensor() for the whole",
        )
    if tensor.is_meta:
        return f"{kind} on meta, a device without values", "load them first"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"{kind} without memory", "pass the plain tensor that it wraps or stands for"
    try:
        storage_bytes = tensor.untyped_storage().nbytes()
        freed = storage_bytes < tensor.nbytes or tensor.storage_offset() > 0
    except RuntimeError:
        freed, storage_bytes = False, 0
    if freed:
        return (
            f"{kind} of {tensor.nbytes} bytes whose storage has {storage_bytes}",
            "use it while its memory is there: FSDP, for one, frees parameters between their uses",
        )
    return f"{kind} without memory", "call qcomm outside of torch.func transforms, torch.compile and torch.export"
