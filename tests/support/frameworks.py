"""Training inside of frameworks: worlds as torchrun would start them, a small task, and checks of every integration."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from distributed import World, assert_same_on_all_ranks
from torch import nn
from torch.utils.data import TensorDataset

# Buckets of 2 KB, so that a step has several.
BUCKET_MB = 0.002
OPTIONS = {"strategy": "two_phase", "min_elements": 100}


@contextmanager
def started_world(world_size: int) -> Iterator[World]:
    """Processes of their own: frameworks keep state in the process."""
    world = World(world_size)
    try:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world.run(set_environment, port)
        yield world
    finally:
        world.close()


def set_environment(rank: int, world_size: int, port: int) -> None:
    """Sets what torchrun sets. Frameworks find the process group, too, which is there already."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        TORCHELASTIC_RUN_ID="test",
    )


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(48, 48), nn.Tanh())], nn.Linear(48, 4))


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes that lie apart, so that two epochs are enough."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (256,), generator=generator)
    centers = torch.randn(4, 48, generator=generator)
    return centers[labels] + 0.5 * torch.randn(256, 48, generator=generator), labels


def dataset() -> TensorDataset:
    """The first 64 samples, for training."""
    return TensorDataset(*(tensor[:64] for tensor in samples()))


def accuracy(model: nn.Module) -> float:
    """The share of right answers on the samples that were not trained on."""
    values, labels = (tensor[64:] for tensor in samples())
    with torch.no_grad():
        return float((model(values).argmax(1) == labels).float().mean())


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).clone()


def files_of_ranks(folder: str) -> list[str]:
    """The names of qcomm's files in a checkpoint."""
    return sorted(path.name for path in Path(folder).glob("*qcomm*"))


def assert_compressed(state, model: nn.Module, steps: int) -> None:
    """Bytes were sent, and far fewer than uncompressed gradients have; ranks have equal weights."""
    stats = state.stats()
    assert stats["steps"] == steps
    assert stats["bytes_uncompressed"] == steps * 4 * sum(parameter.numel() for parameter in model.parameters())
    assert 0 < stats["bytes_sent"] < stats["bytes_uncompressed"] / 5, stats["bytes_sent"]
    assert 1 < stats["bits_per_element"] < 4
    assert stats["residual_norm"] > 0
    assert_same_on_all_ranks(flat(model))
