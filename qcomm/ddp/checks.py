"""Checks of a DDP model, made before the hook is registered, because a hook cannot be removed."""

import torch
from torch.nn.parallel import DistributedDataParallel

from qcomm.codec import DTYPE_NUMBERS, check_memory
from qcomm.staging import check_device

__all__ = ["check_model"]


def check_model(ddp_model: object) -> None:
    """Raises TypeError, ValueError or RuntimeError, naming the reason, for a model that the hook cannot serve.

    Example:
        >>> check_model(torch.nn.Linear(2, 2))
        Traceback (most recent call last):
            ...
        TypeError: ddp_model must be a torch.nn.parallel.DistributedDataParallel, got Linear
    """
    if not isinstance(ddp_model, DistributedDataParallel):
        # By its name, since torch.distributed.fsdp takes long to import.
        is_sharded = any(base.__name__ == "FSDPModule" for base in type(ddp_model).__mro__)
        raise TypeError(
            f"ddp_model must be a torch.nn.parallel.DistributedDataParallel, got {type(ddp_model).__name__}"
            + ("; for models that fully_shard has sharded there is qcomm.fsdp.attach" if is_sharded else "")
        )
    _check_mode(ddp_model)
    for name, parameter in ddp_model.module.named_parameters():
        if parameter.requires_grad:
            _check_parameter(name, parameter)
    for name, module in ddp_model.module.named_modules():
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and module.sparse:
            raise ValueError(
                f"module {name!r} makes sparse gradients, which cannot be compressed; make it with sparse=False"
            )


def _check_mode(ddp_model: DistributedDataParallel) -> None:
    # These attributes belong to DDP. A version that lacks one also lacks the mode.
    if getattr(ddp_model, "mixed_precision", None) is not None:
        raise ValueError(
            "ddp_model uses DDP's mixed_precision, which is a communication hook itself; use torch.autocast instead"
        )
    if getattr(ddp_model, "_use_python_reducer", False):
        raise ValueError(
            "ddp_model uses optimize_ddp='python_reducer', which ignores what hooks return; set it to 'ddp_optimizer'"
        )
    hooks = getattr(ddp_model, "_comm_hooks", [])
    if hooks:
        name = getattr(hooks[0][0], "__qualname__", hooks[0][0])
        raise RuntimeError(
            f"ddp_model has a communication hook already ({name}), or is a copy of a model that had one; "
            "DDP allows one, for good: wrap the module anew"
        )
    if getattr(ddp_model, "reducer", None) is None:
        raise ValueError("ddp_model delays the all-reduce of all its parameters and calls no communication hook")


def _check_parameter(name: str, parameter: torch.nn.Parameter) -> None:
    if parameter.is_complex():
        raise TypeError(
            f"parameter {name!r} is complex; keep it as a real tensor and use torch.view_as_complex in forward"
        )
    if parameter.dtype not in DTYPE_NUMBERS:
        raise TypeError(
            f"parameter {name!r} is {parameter.dtype}; float32, float16, bfloat16 and float64 are supported"
        )
    check_device(f"parameter {name!r}", parameter.device)
    check_memory(f"parameter {name!r}", parameter)
    if hasattr(parameter, "_in_backward_optimizers"):
        raise ValueError(
            f"parameter {name!r} has an optimizer that runs in backward, for which DDP needs the hook itself"
        )
