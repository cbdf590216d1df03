"""Training of small sharded models (FSDP2), with torch's collectives or with qcomm's, on ranks that are processes.

Two tasks: ResNet-20 on images with SGD and momentum, and a transformer of characters
(:mod:`transformer_training`) with AdamW. A step has ``batch`` samples of all ranks together, the same for every number
of ranks and every method. Models are evaluated in fp32 with the exact weights of all shards.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformer_training import CLIP, Text, Transformer, batch_of, evaluate, make_optimizer, rate_at
from transformer_training import Setting as TextSetting

import qcomm
import qcomm.fsdp
from qcomm.recipes.config import learning_rate
from qcomm.recipes.datasets import Dataset
from qcomm.recipes.models import ResNet, build_model
from qcomm.recipes.train import average_buffers

FP32, BF16 = "fp32", "bf16"  # torch's own collectives; all others compute in fp32
WEIGHTS = " weights"  # the end of a method that compresses weights, too
WEIGHT_GRID = qcomm.RangeGrid(num_bits=8)
TASKS = ("resnet20", "gpt")
WARM_UP = 0.1  # of the steps of resnet20
RATES = {"resnet20": 0.1, "gpt": 0.004}
EVALUATION_BATCH = 250  # images
BLOCKS_OF_UNIT = 3  # of ResNet-20, which has nine small ones


@dataclass(frozen=True)
class Setting:
    """The setting of a run, all but the method.

    Attributes:
        task: one of TASKS.
        ranks: number of ranks that share the model.
        steps: of training, at a rate that rises and then follows a cosine to 0.
        seed: determines weights and samples.
        batch: images or sequences of all ranks together in a step; a multiple of ``ranks``.
        images: number of training images; ``resnet20`` alone.
        context, width, depth: of the transformer.
    """

    task: str = "resnet20"
    ranks: int = 2
    steps: int = 600
    seed: int = 0
    batch: int = 64
    images: int = 10_000
    context: int = 64
    width: int = 64
    depth: int = 2


def options_of(method: str) -> dict[str, Any] | None:
    """Returns the options of ``qcomm.fsdp.attach``, None for torch's own; raises ValueError if there is no such method.

    Example:
        >>> options_of("k=3.2 weights")["weights"].num_bits, options_of("k=1")["weights"], options_of("bf16")
        (8, None, None)
    """
    if method in (FP32, BF16):
        return None
    step = method.removesuffix(WEIGHTS)
    if not step.startswith("k="):
        raise ValueError(f"method is {method!r}; it must be fp32, bf16, k=K or k=K weights")
    gradients = qcomm.SigmaGrid(float(step.removeprefix("k=")))
    return {"gradients": gradients, "weights": WEIGHT_GRID if method.endswith(WEIGHTS) else None}


def shard(
    model: nn.Module, parts: Sequence[nn.Module], method: str, of_bf16: MixedPrecisionPolicy
) -> "qcomm.fsdp.ShardedState | None":
    """Shards the parts and the rest of a model over all ranks. A collective.

    Returns:
        qcomm's state; None with torch's own collectives.
    """
    options = options_of(method)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = of_bf16 if method == BF16 else MixedPrecisionPolicy()
    for part in [*parts, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return None if options is None else qcomm.fsdp.attach(model, **options)


def make_whole(model: nn.Module, empty: nn.Module) -> nn.Module:
    """Fills a model that is not sharded with the weights of all shards. A collective."""
    whole = {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }
    empty.load_state_dict(whole)
    return empty


class Images:
    """ResNet-20, with a stem of stride 2, and its images.

    torch's BatchNorm takes no weights of bf16 beside statistics of fp32. So bf16 is autocast here, and gradients are
    reduced in bf16, but weights are gathered in fp32.
    """

    def __init__(self, setting: Setting, method: str, data: Dataset) -> None:
        self._setting, self._data, self._training = setting, data, data.train.first(setting.images)
        torch.manual_seed(setting.seed)
        self.model = self._build()
        self.state = shard(
            self.model, list(self.model.stages), method, MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
        )
        self._amp = method == BF16
        decayed, others = ([p for p in self.model.parameters() if (p.dim() > 1) is big] for big in (True, False))
        groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, foreach=True)
        self._order = torch.Generator().manual_seed(setting.seed + 1)
        self._left = torch.empty(0, dtype=torch.int64)

    def _build(self) -> ResNet:
        model = build_model("resnet20", in_channels=self._data.channels, stem_stride=2)
        blocks = list(model.stages)
        groups = [nn.Sequential(*blocks[i : i + BLOCKS_OF_UNIT]) for i in range(0, len(blocks), BLOCKS_OF_UNIT)]
        model.stages = nn.Sequential(*groups)
        return model

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        steps = self._setting.steps
        return learning_rate(step, steps, int(WARM_UP * steps), RATES["resnet20"])

    def loss(self) -> torch.Tensor:
        """Computes the loss of this rank's next images."""
        setting = self._setting
        if len(self._left) < setting.batch:
            self._left = torch.randperm(len(self._training), generator=self._order)
        chosen, self._left = self._left[: setting.batch], self._left[setting.batch :]
        chosen = chosen[dist.get_rank() :: setting.ranks]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._amp):
            logits = self.model(self._data.normalise(self._training.images[chosen]))
        return functional.cross_entropy(logits.float(), self._training.labels[chosen])

    def before_step(self) -> None:
        """Gradients are taken as they are."""

    def evaluate(self) -> float:
        """Returns the test accuracy in percent. A collective."""
        average_buffers(self.model)
        whole, test = make_whole(self.model, self._build()).eval(), self._data.test
        mine, totals = torch.arange(dist.get_rank(), len(test), dist.get_world_size()), torch.zeros(2)
        with torch.no_grad():
            for chosen in mine.split(EVALUATION_BATCH):
                right = whole(self._data.normalise(test.images[chosen])).argmax(1) == test.labels[chosen]
                totals += torch.tensor([int(right.sum()), len(chosen)])
        dist.all_reduce(totals)
        return 100 * float(totals[0] / totals[1])


class Characters:
    """The transformer and its text."""

    def __init__(self, setting: Setting, method: str, text: Text) -> None:
        self._text, self._ranks = text, setting.ranks
        self._setting = TextSetting(
            setting.ranks, setting.steps, RATES["gpt"], setting.seed, setting.batch, setting.context, setting.width,
            setting.depth,
        )  # fmt: skip
        torch.manual_seed(setting.seed)
        self.model: nn.Module = Transformer(self._setting, text.vocabulary)
        self.state = shard(
            self.model, list(self.model.blocks), method, MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        )
        self.optimizer = make_optimizer("adamw", self.model, RATES["gpt"])
        self.optimizer.defaults["foreach"] = True
        for group in self.optimizer.param_groups:
            group["foreach"] = True
        self._sequences = torch.Generator().manual_seed(setting.seed + 7)

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step."""
        return rate_at(self._setting, step)

    def loss(self) -> torch.Tensor:
        """Computes the loss of this rank's next sequences."""
        setting = self._setting
        given, following = batch_of(self._text.train, setting.batch, setting.context, self._sequences)
        mine = slice(dist.get_rank(), None, self._ranks)
        return functional.cross_entropy(self.model(given[mine]).float().flatten(0, 1), following[mine].flatten())

    def before_step(self) -> None:
        """Clips the gradient of all ranks."""
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)

    def evaluate(self) -> float:
        """Returns the loss on the held-out text in nats a character on rank 0, and 0 elsewhere. A collective."""
        whole = make_whole(self.model, Transformer(self._setting, self._text.vocabulary))
        return 0.0 if dist.get_rank() else evaluate(whole, self._text, self._setting)


def train(setting: Setting, method: str, data: Dataset | Text) -> dict[str, Any]:
    """Trains a sharded model. A collective of ``setting.ranks`` ranks.

    Args:
        setting: of the run.
        method: ``fp32`` or ``bf16`` with torch's own collectives, ``k=K`` with gradients compressed on SigmaGrid(K) and
            error feedback, ``k=K weights`` with weights of 8 bits as well.
        data: images for ``resnet20``, a text for ``gpt``.

    Returns:
        ``result`` (accuracy in percent, or nats a character, on rank 0), ``train_loss`` of the last tenth of the steps,
        and ``stats`` of this rank.
    """
    begin = time.perf_counter()
    make: Callable[..., Any] = Images if setting.task == "resnet20" else Characters
    task, losses = make(setting, method, data), []
    for step in range(setting.steps):
        for group in task.optimizer.param_groups:
            group["lr"] = task.rate(step)
        task.optimizer.zero_grad()
        loss = task.loss()
        loss.backward()
        losses.append(loss.item())
        task.before_step()
        task.optimizer.step()
    result, last = task.evaluate(), losses[-max(1, setting.steps // 10) :]
    if not math.isfinite(result):
        raise ValueError(f"{setting.task}, {method}, seed {setting.seed}: the result is {result}")
    return {
        "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
        "result": result,
        "train_loss": sum(last) / len(last),
        "stats": {} if task.state is None else counters(task.state.stats()),
        "seconds": time.perf_counter() - begin,
    }


def counters(stats: dict[str, Any]) -> dict[str, float]:
    """Returns the bytes that qcomm has sent, and the bits of gradients and weights (0 where torch gathers them)."""
    return {
        "bytes_of_gradients": stats["bytes_sent"],
        "bytes_of_weights": stats["weights"]["bytes_sent"],
        "bits_of_gradients": stats["bits_per_element_phase1"],
        "bits_of_weights": stats["weights"]["bits_per_element_phase2"],
    }
