"""Data-parallel training of a small transformer of characters with W ranks in one process.

The text is the source of Python's standard library, which is wherever this runs; its digest is part of a result. The
ranks' gradients are computed one after the other on the same weights, each from its own characters, and averaged by an
exchange of :mod:`simulated_exchange` in one bucket, as DDP would have it.
"""

import hashlib
import math
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from simulated_exchange import Bucket, Exchange
from torch import nn
from torch.nn import functional

HELD_OUT = 0.05
EVALUATION_BATCHES, EVALUATION_BATCH = 40, 32
WARM_UP = 40
CLIP = 1.0
BETAS = 0.9, 0.99
WEIGHT_DECAY = 0.01
OPTIMIZERS = ("adamw", "abs")


@dataclass(frozen=True)
class Setting:
    """The setting of a run, all but exchange and optimizer.

    Attributes:
        ranks: number of ranks, each with ``batch`` sequences of ``context`` characters a step.
        steps: of training; the rate rises over 40 of them and follows a cosine to 0.
        rate: the largest learning rate.
        seed: determines weights and sequences.
        width, depth, heads: of the model.
    """

    ranks: int = 4
    steps: int = 1000
    rate: float = 0.002
    seed: int = 0
    batch: int = 8
    context: int = 64
    width: int = 176
    depth: int = 3
    heads: int = 4


@dataclass(frozen=True)
class Result:
    """The end of a run: losses in nats a character, the training loss averaged over the last tenth of the steps."""

    parameters: int
    held_out_loss: float
    train_loss: float
    stats: dict[str, float]
    seconds: float


class Text:
    """Characters as numbers, and where the held-out ones begin.

    Args:
        text: of ASCII characters.
    """

    def __init__(self, text: str) -> None:
        known = sorted(set(text))
        numbers = {character: number for number, character in enumerate(known)}
        self.vocabulary, self.digest = len(known), hashlib.sha256(text.encode()).hexdigest()[:16]
        data = torch.tensor([numbers[character] for character in text])
        cut = int(len(data) * (1 - HELD_OUT))
        self.train, self.held_out = data[:cut], data[cut:]


def standard_library(files: int = 120) -> Text:
    """Returns the source of the first modules of Python's standard library."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:files]
    text = "".join(path.read_text(errors="ignore") for path in paths)
    return Text("".join(character for character in text if character.isascii()))


class Block(nn.Module):
    """Attention and a layer of neurons, with the norms before them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes [batch, context, width] of the same shape."""
        batch, context, width = x.shape
        q, k, v = self.attention(self.norm_1(x)).view(batch, context, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, context, width))
        hidden: torch.Tensor = x + self.down(functional.gelu(self.up(self.norm_2(x))))
        return hidden


class Transformer(nn.Module):
    """A causal transformer of characters."""

    def __init__(self, setting: Setting, vocabulary: int) -> None:
        super().__init__()
        width = setting.width
        self.characters, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(setting.context, width)
        self.blocks = nn.Sequential(*[Block(width, setting.heads) for _ in range(setting.depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Computes logits [batch, context, vocabulary] of characters [batch, context]."""
        embedded = self.characters(x) + self.positions.weight[: x.shape[1]]
        logits: torch.Tensor = self.head(self.norm(self.blocks(embedded)))
        return logits


class AbsAdamW(torch.optim.Optimizer):
    """AdamW with ``sqrt(pi / 2) EMA|g|`` in place of ``sqrt(EMA g^2)``: equal for a normal distribution.

    The first absolute moment does not see the second quantization of an exchange: of a sparse mean with steps s,
    ``E|out| = |g|`` where ``E out^2 = s |g|``. Of the first quantization it sees a factor that does not grow with s.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes a step."""
        if closure is not None:
            raise ValueError("closure must be None")
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(parameter), size=torch.zeros_like(parameter))
                state["step"] += 1
                first, second = (1 - beta ** state["step"] for beta in BETAS)
                state["mean"].lerp_(parameter.grad, 1 - BETAS[0])
                state["size"].lerp_(parameter.grad.abs(), 1 - BETAS[1])
                divisor = state["size"].mul(math.sqrt(math.pi / 2) / second).add_(1e-8)
                parameter.mul_(1 - group["lr"] * WEIGHT_DECAY)
                parameter.addcdiv_(state["mean"], divisor, value=-group["lr"] / first)


def make_optimizer(name: str, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Returns an optimizer by its name, of OPTIMIZERS."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=BETAS, weight_decay=WEIGHT_DECAY)
    if name == "abs":
        return AbsAdamW(model.parameters(), lr=rate)
    raise ValueError(f"optimizer is {name!r}; it must be one of {OPTIMIZERS}")


def simulate(setting: Setting, text: Text, exchange: Exchange, optimizer: str) -> Result:
    """Trains one model.

    Args:
        setting: of the run.
        text: to learn.
        exchange: averages the gradients; new, without residuals.
        optimizer: of OPTIMIZERS.
    """
    begin = time.perf_counter()
    torch.manual_seed(setting.seed)
    model = Transformer(setting, text.vocabulary)
    steps = make_optimizer(optimizer, model, setting.rate)
    named = list(model.named_parameters())[::-1]  # DDP fills its buckets from the end
    bucket = Bucket(0, tuple(name for name, _ in named), tuple(parameter.shape for _, parameter in named))
    sequences = torch.Generator().manual_seed(setting.seed + 7)
    losses: list[float] = []
    for step in range(setting.steps):
        for group in steps.param_groups:
            group["lr"] = rate_at(setting, step)
        buffers, total = [], 0.0
        for _ in range(setting.ranks):
            model.zero_grad()
            loss = loss_of(model, *batch_of(text.train, setting.batch, setting.context, sequences))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item() / setting.ranks
            buffers.append(torch.cat([gradient_of(parameter).flatten() for _, parameter in named]))
        losses.append(total)
        exchange.average(bucket, buffers)
        for (_, parameter), part in zip(named, buffers[0].split(bucket.numels), strict=True):
            parameter.grad = part.view(parameter.shape)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        steps.step()
    last = losses[-max(1, setting.steps // 10) :]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - begin
    return Result(parameters, evaluate(model, text, setting), sum(last) / len(last), exchange.stats(), seconds)


def rate_at(setting: Setting, step: int) -> float:
    """Returns the learning rate of a step."""
    falling = max(0, step - WARM_UP) / max(1, setting.steps - WARM_UP)
    return setting.rate * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * falling))


def batch_of(data: torch.Tensor, count: int, context: int, generator: torch.Generator) -> tuple[Any, Any]:
    """Returns characters [count, context], and those that follow each of them."""
    starts = torch.randint(len(data) - context, (count, 1), generator=generator)
    places = starts + torch.arange(context)
    return data[places], data[places + 1]


def loss_of(model: nn.Module, given: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross-entropy in nats a character."""
    return functional.cross_entropy(model(given).flatten(0, 1), following.flatten())


def gradient_of(parameter: nn.Parameter) -> torch.Tensor:
    """Returns the gradient, which is there after backward."""
    if parameter.grad is None:
        raise ValueError("a parameter has no gradient")
    return parameter.grad


def evaluate(model: nn.Module, text: Text, setting: Setting) -> float:
    """Returns the loss on sequences of the held-out text, the same in every run."""
    generator, total = torch.Generator().manual_seed(1), 0.0
    with torch.no_grad():
        for _ in range(EVALUATION_BATCHES):
            total += float(loss_of(model, *batch_of(text.held_out, EVALUATION_BATCH, setting.context, generator)))
    return total / EVALUATION_BATCHES
