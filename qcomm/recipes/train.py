"""Data-parallel training of a residual network: the loop, its validation and its log.

The loop is plain PyTorch; the gradient exchange is registered on the DDP model and is otherwise out of sight. Every
random choice follows from ``TrainConfig.seed``, so that a resumed run continues as the original would have.
"""

import inspect
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from qcomm.allreduce import all_reduce
from qcomm.collectives import ReduceOptions
from qcomm.local_sgd import broadcast_parameters
from qcomm.recipes import checkpoint, exchange
from qcomm.recipes.config import TrainConfig, learning_rate
from qcomm.recipes.datasets import Dataset, Split, augment, augmentation_generator, load_dataset
from qcomm.recipes.errors import RecipeError
from qcomm.recipes.models import build_model
from qcomm.recipes.progress import Reporter
from qcomm.transport import KeyFile

_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_EVALUATION_BATCH = 256
# torch 2.13 renamed the option that makes rank 0 broadcast its buffers before every forward pass.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
# Counters of the exchange that are added to each line of the log, the mean over the ranks.
_LOGGED_STATS = (
    "bytes_sent",
    "bytes_received",
    "bytes_uncompressed",
    "bits_per_element",
    "bits_per_element_compressed",
    "bits_per_element_phase1",
    "bits_per_element_phase2",
    "communication_seconds",
    "encode_seconds",
    "decode_seconds",
)


@dataclass(frozen=True)
class TrainResult:
    """The end of a run, equal on all ranks.

    Attributes:
        config: configuration of the run.
        test_accuracy: accuracy after the last epoch, 0..1.
        test_images: number of images for ``test_accuracy``.
        images_per_second: training images of all ranks, validation left out.
        stats: the exchange's counters, averaged over the ranks. A resumed run counts from its resumption.
        history: one dict per epoch, as in the log.
    """

    config: TrainConfig
    test_accuracy: float
    test_images: int
    images_per_second: float
    stats: dict[str, float]
    history: list[dict[str, Any]]

    @property
    def standard_error(self) -> float:
        """Returns the binomial standard error of the accuracy."""
        return math.sqrt(self.test_accuracy * (1 - self.test_accuracy) / self.test_images)

    def to_json(self) -> dict[str, Any]:
        """Returns the result as JSON types."""
        return {
            "label": self.config.label,
            "test_accuracy": self.test_accuracy,
            "standard_error": self.standard_error,
            "test_images": self.test_images,
            "images_per_second": self.images_per_second,
            "stats": self.stats,
            "config": self.config.to_json(),
            "history": [_finite(record) for record in self.history],
        }


def check(config: TrainConfig, ranks: int) -> None:
    """Checks, before any process starts, the conditions of :func:`train`.

    Raises:
        RecipeError: no ranks, or none that form nodes as the strategy needs; a key file, a data set or a checkpoint
            that is not usable, or fewer images than one batch.
    """
    if ranks < 1:
        raise RecipeError(f"--ranks is {ranks}; it must be at least 1")
    if config.method == "qcomm":
        try:
            ReduceOptions(strategy=config.strategy, ranks_per_node=config.ranks_per_node).for_world(ranks)
        except ValueError as error:
            raise RecipeError(f"--strategy is {config.strategy}: {error}") from error
        try:
            KeyFile.of(config.secret)
        except (ValueError, OSError, RuntimeError) as error:
            raise RecipeError(f"--secret is {config.secret}: {error}") from error
    _steps_per_epoch(config, load_dataset(config.dataset, config.data_dir), ranks)
    path = checkpoint.newest(config)
    if path is not None:
        checkpoint.load(path, config, 0, ranks)


def _steps_per_epoch(config: TrainConfig, dataset: Dataset, ranks: int) -> int:
    images = min(config.train_images or len(dataset.train), len(dataset.train))
    steps = images // (ranks * config.batch_size)
    if steps == 0:
        raise RecipeError(
            f"--batch-size is {config.batch_size} on {ranks} ranks; {images} training images do not fill one step"
        )
    return steps


def train(config: TrainConfig) -> TrainResult:
    """Trains one model in the initialised process group; every rank calls it with the same configuration.

    With ``config.out`` rank 0 writes ``<label>.jsonl`` there, one object per epoch. All ranks write checkpoints to
    ``<label>/`` every ``config.checkpoint_every`` epochs.

    Args:
        config: the run.

    Returns:
        The accuracy, the speed and the exchange's counters.

    Raises:
        RecipeError: the data set or the checkpoint is not usable, or there are fewer images than one batch.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(config.seed)
    dataset = load_dataset(config.dataset, config.data_dir)
    run = _Run(config, dataset, rank, ranks)
    loaded = checkpoint.load_on_all_ranks(config)
    first_epoch = 0 if loaded is None else run.restore(*loaded)
    log = _Log(config.out / f"{config.slug}.jsonl" if config.out and rank == 0 else None, first_epoch)
    seconds = 0.0
    with Reporter(config.label, config.epochs * run.steps_per_epoch, enabled=rank == 0) as reporter:
        for epoch in range(first_epoch, config.epochs):
            record = run.epoch(epoch, reporter.step)
            seconds += record["train_seconds"]
            log.write(record)
            reporter.epoch(
                epoch + 1,
                config.epochs,
                record["train_loss"],
                record["test_accuracy"],
                record["images_per_second"],
            )
            if config.checkpoint_every and config.folder and (epoch + 1) % config.checkpoint_every == 0:
                checkpoint.save(config.folder, epoch + 1, run.shared_state(), run.rank_state())
    epochs_done = config.epochs - first_epoch
    last = log.records[-1] if log.records else {}
    accuracy = float(last["test_accuracy"]) if epochs_done else run.evaluate()[1]
    return TrainResult(
        config=config,
        test_accuracy=accuracy,
        test_images=len(dataset.test),
        images_per_second=epochs_done * run.images_per_epoch / seconds if seconds else 0.0,
        stats=run.mean_stats(),
        history=log.records,
    )


class _Run:
    """Model, optimiser, data and exchange of one run on one rank."""

    def __init__(self, config: TrainConfig, dataset: Dataset, rank: int, ranks: int) -> None:
        self.config, self.dataset, self.rank, self.ranks = config, dataset, rank, ranks
        self.training = dataset.train.first(config.train_images or len(dataset.train))
        self.model = build_model(config.model, in_channels=dataset.channels, stem_stride=config.stem_stride)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]  # torch's stub lacks this form
        # Batch statistics stay local while training; they are averaged before they are used (average_buffers).
        options: dict[str, Any] = {_SYNC_BUFFERS: False}
        if config.secret is not None:  # DDP would send the initial weights openly
            broadcast_parameters(self.model, lossless=True, secret=config.secret)
            options["init_sync"] = False
        self.ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True, **options)
        self.scaler = torch.amp.GradScaler("cpu") if config.amp == "fp16" else None
        self.optimizer = torch.optim.SGD(
            _parameter_groups(self.model, config),
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.nesterov,
        )
        self.exchange = exchange.attach(self.ddp, config, self.scaler)
        self.sampler: DistributedSampler[int] = DistributedSampler(
            range(len(self.training)),  # type: ignore[arg-type]  # only its length is asked for
            num_replicas=ranks,
            rank=rank,
            shuffle=True,
            seed=config.seed,
            drop_last=True,
        )
        self.steps_per_epoch = _steps_per_epoch(config, dataset, ranks)
        self.images_per_epoch = self.steps_per_epoch * config.batch_size * ranks
        self.steps_done = 0

    def epoch(self, epoch: int, on_step: Callable[[int], None]) -> dict[str, Any]:
        """Trains and validates one epoch; the record is equal on all ranks."""
        loss_sum = torch.zeros((), dtype=torch.float64)
        self.ddp.train()
        dist.barrier()  # the clock starts when all are there
        start = time.perf_counter()
        for images, labels in self._batches(epoch):
            loss_sum += self._step(images, labels)
            on_step(self.steps_done)
        dist.barrier()
        seconds = time.perf_counter() - start
        dist.all_reduce(loss_sum)
        test_loss, test_accuracy = self.evaluate()
        return {
            "epoch": epoch + 1,
            "step": self.steps_done,
            "train_loss": loss_sum.item() / (self.steps_per_epoch * self.ranks),
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "train_seconds": seconds,
            "images_per_second": self.images_per_epoch / seconds,
            **self.mean_stats(),
        }

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.set_epoch(epoch)
        generator = augmentation_generator(self.config.seed, epoch, self.rank)
        order = torch.tensor(list(self.sampler), dtype=torch.int64)
        for step in range(self.steps_per_epoch):
            chosen = order[step * self.config.batch_size : (step + 1) * self.config.batch_size]
            images = self.training.images[chosen]
            if self.config.augment:
                images = augment(images, self.dataset.crop_padding, self.dataset.flip, generator)
            yield self._prepare(images), self.training.labels[chosen]

    def _prepare(self, images: Tensor) -> Tensor:
        return self.dataset.normalise(images).contiguous(memory_format=self.memory_format)

    def _autocast(self) -> torch.autocast:
        dtype = _AMP_DTYPES.get(self.config.amp)
        return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def _step(self, images: Tensor, labels: Tensor) -> float:
        config = self.config
        rate = learning_rate(
            self.steps_done,
            config.epochs * self.steps_per_epoch,
            round(config.warmup_epochs * self.steps_per_epoch),
            config.learning_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = functional.cross_entropy(self.ddp(images), labels)
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.steps_done += 1
        return loss.item()

    def evaluate(self) -> tuple[float, float]:
        """Computes the mean loss and accuracy over the test images, each seen by one rank. Collective."""
        average_buffers(self.model, self.config.secret)
        self.model.eval()
        own = Split(
            self.dataset.test.images[self.rank :: self.ranks], self.dataset.test.labels[self.rank :: self.ranks]
        )
        totals = torch.zeros(3, dtype=torch.float64)  # loss, correct, images
        with torch.no_grad(), self._autocast():
            for images, labels in zip(
                torch.split(own.images, _EVALUATION_BATCH), torch.split(own.labels, _EVALUATION_BATCH), strict=True
            ):
                logits = self.model(self._prepare(images)).float()
                totals[0] += functional.cross_entropy(logits, labels, reduction="sum")
                totals[1] += (logits.argmax(1) == labels).sum()
                totals[2] += len(labels)
        dist.all_reduce(totals)
        loss, correct, count = totals.tolist()
        return loss / count, correct / count

    def mean_stats(self) -> dict[str, float]:
        """Averages the exchange's counters over the ranks. Collective."""
        own = self.exchange.stats()
        values = torch.tensor([float(own[name]) for name in _LOGGED_STATS], dtype=torch.float64)
        dist.all_reduce(values)
        return dict(zip(_LOGGED_STATS, (values / self.ranks).tolist(), strict=True))

    def shared_state(self) -> dict[str, Any]:
        """Returns the state that all ranks have in common."""
        return {
            "config": self.config.to_json(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def rank_state(self) -> dict[str, Any]:
        """Returns the state of this rank alone."""
        return {"exchange": self.exchange.state_dict()}

    def restore(self, shared: dict[str, Any], parts: list[dict[str, Any]]) -> int:
        """Continues from a checkpoint, as :func:`checkpoint.load` returns it; returns the number of finished epochs."""
        self.model.load_state_dict(shared["model"])
        self.optimizer.load_state_dict(shared["optimizer"])
        if self.scaler is not None:
            self.scaler.load_state_dict(shared["scaler"])
        is_new_rank = self.rank >= int(shared["world_size"])
        exchange.restore(self.exchange, [part["exchange"] for part in parts], is_new_rank)
        epochs_done = int(shared["epoch"])
        self.steps_done = epochs_done * self.steps_per_epoch  # with another number of ranks a step is another share
        return epochs_done


def _parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups parameters by weight decay.

    It applies to matrices and kernels, and to biases and batch normalisation only on request.
    """
    decayed = [p for p in model.parameters() if p.dim() > 1 or config.decay_norm]
    others = [p for p in model.parameters() if not (p.dim() > 1 or config.decay_norm)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def average_buffers(model: nn.Module, secret: Path | None = None) -> None:
    """Averages the floating-point buffers (running statistics of batch normalisation) over the ranks. Collective.

    With the path of a key file they are sealed.
    """
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    if secret is None:
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
    else:
        all_reduce(flat, strategy="none", secret=secret)
    for buffer, mean in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


class _Log:
    """The log, one JSON object per epoch; a resumed run keeps the lines of the epochs before it."""

    def __init__(self, path: Path | None, first_epoch: int) -> None:
        self.records: list[dict[str, Any]] = []
        self._path = path
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if first_epoch and path.is_file():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            self.records = [record for record in lines if record["epoch"] <= first_epoch]
        path.write_text("".join(_json_line(record) for record in self.records))

    def write(self, record: dict[str, Any]) -> None:
        """Appends the record of one epoch."""
        self.records.append(record)
        if self._path:
            with self._path.open("a") as stream:
                stream.write(_json_line(record))


def _json_line(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), allow_nan=False) + "\n"


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """Replaces non-finite values by None, because JSON has no NaN: a diverged loss is written as null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
