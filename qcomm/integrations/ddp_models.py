"""The DDP model inside the wrappers of frameworks and of ``torch.compile``, and the reason where there is none."""

from torch.nn.parallel import DistributedDataParallel

__all__ = ["find_ddp"]

# Attributes that hold the wrapped model, of Fabric and of torch.compile. Fabric's is the first, because its wrapper
# also shows the attributes of the unwrapped model.
WRAPPERS = ("_forward_module", "_orig_mod")
# By how the names of strategies and distributed types begin, in lower case.
CONSEQUENCES = {
    "fsdp": "it shards the weights and reduces gradients itself, uncompressed; use DDP if the model fits on one device",
    "modelparallel": "it shards the weights and reduces gradients itself, uncompressed; use DDP if the model fits on "
    "one device",
    "deepspeed": "its engine reduces gradients itself, uncompressed; use DDP, or DeepSpeed without qcomm",
    "megatron": "its engine reduces gradients itself, uncompressed; use DDP, or Megatron-LM without qcomm",
    "single": "a single process sends no gradients; start several, or leave qcomm out",
    "dataparallel": "one process feeds several devices and sends no gradients over a network",
}


def find_ddp(model: object, kind: str, remedy: str) -> DistributedDataParallel:
    """Returns the DDP model in ``model``.

    Args:
        model: a DDP model, compiled or not, or the result of ``fabric.setup``.
        kind: name of the framework's strategy, for the error.
        remedy: what the user writes for DDP.

    Raises:
        TypeError: there is none; the message says what ``kind`` does with gradients.

    Example:
        >>> import torch
        >>> find_ddp(torch.nn.Linear(2, 2), "SingleDeviceStrategy", "Trainer(strategy='ddp', devices=2)")
        Traceback (most recent call last):
            ...
        TypeError: qcomm compresses gradients of DistributedDataParallel, and SingleDeviceStrategy has wrapped Linear in
        none: a single process sends no gradients; start several, or leave qcomm out. For DDP: Trainer(strategy='ddp',
        devices=2)
    """
    inner, wrapped = model, model
    while wrapped is not None:
        inner = wrapped
        wrapped = next((part for name in WRAPPERS if (part := getattr(inner, name, None)) is not None), None)
    if isinstance(inner, DistributedDataParallel):
        return inner
    raise TypeError(
        f"qcomm compresses gradients of DistributedDataParallel, and {kind} has wrapped {type(model).__name__} in "
        f"none: {_consequence(kind)}. For DDP: {remedy}"
    )


def _consequence(kind: str) -> str:
    """Returns what a strategy does with gradients, and what to do then."""
    name = "single" if kind == "NO" else kind.lower()  # NO is Accelerate's
    for beginning, consequence in CONSEQUENCES.items():
        if name.startswith(beginning):
            return consequence
    return "gradients would travel uncompressed"
