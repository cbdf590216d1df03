"""Training recipes: configuration, schedule, tables, checkpoints, and small runs of two ranks."""

import json
import math
import secrets
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import run, run_alone
from torch.nn.parallel import distributed

from qcomm.communicator.groups import get_communicator
from qcomm.recipes import checkpoint, datasets
from qcomm.recipes.compare import comparison_configs, print_table, run_all, verdict
from qcomm.recipes.config import TrainConfig, learning_rate
from qcomm.recipes.errors import RecipeError
from qcomm.recipes.launch import launch
from qcomm.recipes.train import _LOGGED_STATS, TrainResult, _Run, train
from qcomm.transport import ConnectionOptions, KeyFile

TINY = TrainConfig(epochs=2, train_images=128, stem_stride=2, batch_size=32)
# As many steps with fewer images, since processors take 30 times as long for float16.
HALF = replace(TINY, train_images=32, batch_size=8, amp="fp16")


class TestConfig:
    def test_schedule(self):
        rates = [learning_rate(step, 100, 10, 0.4) for step in range(100)]
        assert rates[0] == pytest.approx(0.04)
        assert rates[9] == pytest.approx(0.4)
        assert rates[10] == pytest.approx(0.4)
        assert rates[55] == pytest.approx(0.2)
        assert min(rates) == rates[99] > 0
        assert learning_rate(0, 10, 0, 0.4) == pytest.approx(0.4)
        assert learning_rate(3, 4, 8, 0.4) == pytest.approx(0.2)  # a warm-up longer than the run

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model": "vgg"}, "--model is 'vgg'"),
            ({"dataset": "x"}, "--dataset"),
            ({"method": "powersgd"}, "--method"),
            ({"amp": "int8"}, "--amp"),
            ({"epochs": 0}, "--epochs is 0"),
            ({"batch_size": 0}, "--batch-size"),
            ({"learning_rate": 0.0}, "--lr is 0.0"),
            ({"learning_rate": math.nan}, "--lr is nan"),
            ({"step": -1.0}, "--step"),
            ({"momentum": 1.0}, "--momentum"),
            ({"nesterov": True, "momentum": 0.0}, "--nesterov"),
            ({"train_images": 0}, "--train-images"),
            ({"stem_stride": 4}, "--stem-stride"),
            ({"checkpoint_every": 1}, "--out"),
        ],
    )
    def test_bad_values_are_named(self, change, message):
        with pytest.raises(RecipeError, match=message):
            TrainConfig(**change)

    def test_a_resumed_run_may_write_elsewhere_but_not_differ(self, tmp_path):
        stored = TINY.to_json()
        assert replace(TINY, out=tmp_path, checkpoint_every=1).difference(stored) is None
        assert "--seed is 7 here and 0 there" in (replace(TINY, seed=7).difference(stored) or "")

    def test_verdict_uses_the_error_of_the_difference(self):
        def result(accuracy: float, **change: object) -> TrainResult:
            return TrainResult(replace(TINY, **change), accuracy, 400, 1.0, {}, [])

        text = verdict([result(0.9), result(0.95, method="qcomm"), result(0.94, method="qcomm", step=2.0)])
        # sqrt(0.9 * 0.1 / 400 + 0.95 * 0.05 / 400) = 1.85 points
        assert "qcomm k=1 is +5.00 points from fp32, outside two standard errors (3.71)" in text
        assert "qcomm k=2 is +4.00 points from fp32, outside" in text

    def test_a_diverged_loss_is_null_in_json(self):
        result = TrainResult(TINY, 0.1, 400, 1.0, {}, [{"epoch": 1, "train_loss": math.nan}])
        assert json.loads(json.dumps(result.to_json(), allow_nan=False))["history"] == [
            {"epoch": 1, "train_loss": None}
        ]

    def test_table_has_a_row_for_each_run_and_says_what_the_bytes_are(self, capsys):
        stats = dict.fromkeys(_LOGGED_STATS, 3.25e6)
        print_table([TrainResult(config, 0.9, 400, 1.0, stats, []) for config in comparison_configs(TINY)])
        lines = capsys.readouterr().out.strip().splitlines()
        assert [line.split("  ")[0] for line in lines[:5]] == ["method", "fp32", "bf16", "qcomm k=1", "qcomm k=2"]
        assert "90.00% ± 1.50%" in lines[1]
        assert "3.25" in lines[3]
        assert len({len(line) for line in lines[:5]}) == 1
        assert "handed to the collectives" in lines[5]


def records(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_and_resume(config: TrainConfig, folder: Path) -> None:
    """On each of two ranks: a run in one piece, and one that is broken off in its second epoch and resumed."""
    whole = train(replace(config, out=folder / "whole", checkpoint_every=config.epochs))
    broken = replace(config, out=folder / "broken", checkpoint_every=1)
    notes = folder / "broken" / config.slug / "epoch-by-epoch"
    notes.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "evaluate", fail_in_second_epoch(_Run.evaluate))
        with pytest.raises(KeyboardInterrupt):
            train(broken)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    saved = checkpoint.find(folder / "broken" / config.slug)
    assert saved.name == "epoch-0001"
    assert notes.is_dir()  # only checkpoints are removed
    if rank == 0:
        shutil.copytree(saved, folder / "half" / config.slug / saved.name)

    # Every rank gets its own error feedback back, bit for bit.
    run = _Run(config, datasets.load_dataset(config.dataset), rank, ranks)
    shared, parts = checkpoint.load(saved, config, rank, ranks)
    assert run.restore(shared, parts) == 1
    own_state = parts[0]["exchange"]
    assert flatten(run.exchange.state_dict()) == flatten(own_state)
    if config.method == "qcomm":
        assert run.exchange.stats()["residual_norm"] > 0

    resumed = train(replace(broken, resume=folder / "broken" / config.slug))
    finals = [
        checkpoint.load(checkpoint.find(folder / name / config.slug), config, rank, ranks)
        for name in ("whole", "broken")
    ]
    for shared, _ in finals:
        assert shared.pop("epoch") == config.epochs
        shared.pop("config")  # names the two directories
    lines = [records(folder / name / f"{config.slug}.jsonl") for name in ("whole", "broken")]
    assert [line["epoch"] for line in lines[1]] == [1, 2]
    dist.barrier()  # rank 0 has read both logs and copied the checkpoint
    if config.method == "fp32":
        assert flatten(finals[0]) == flatten(finals[1])
        assert resumed.test_accuracy == whole.test_accuracy
        for name in ("step", "train_loss", "test_loss", "test_accuracy", "learning_rate"):
            assert [line[name] for line in lines[0]] == [line[name] for line in lines[1]], name
    else:
        # Not bit for bit: DDP's first step after a start has one bucket, so that owners quantize other parts.
        assert lines[0][1]["train_loss"] == pytest.approx(lines[1][1]["train_loss"], rel=0.05)


def fail_in_second_epoch(original):
    calls = []

    def evaluate(self):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self)

    return evaluate


def flatten(value: object) -> object:
    """Nested containers with every tensor as its bytes: equal exactly if the bits are."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: flatten(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [flatten(item) for item in value]
    return value


def two_rank_cases(folder: Path) -> None:
    """All that needs two ranks, in one world: starting one costs seconds."""
    for config in (
        TINY,
        replace(TINY, method="qcomm"),
        replace(HALF, method="qcomm", grid="range", c=2.0, nesterov=True, decay_norm=True),
    ):
        train_and_resume(config, folder / config.slug)

    bf16 = train(replace(TINY, method="bf16", amp="bf16", epochs=1, channels_last=False, augment=False))
    # 2 ranks send half of the buffer twice; 2 steps of 269,434 parameters at 2 bytes
    assert bf16.stats["bytes_sent"] == 2 * 269_434 * 2
    assert bf16.stats["bits_per_element"] == 16
    assert 0 < bf16.stats["communication_seconds"] < bf16.history[0]["train_seconds"]

    with pytest.raises(RecipeError, match="do not fill one step"):
        train(replace(TINY, train_images=63))
    with pytest.raises(RecipeError, match="holds no checkpoint"):
        train(replace(TINY, resume=folder))
    with pytest.raises(RecipeError, match="belongs to another run: --lr"):
        train(replace(TINY, learning_rate=0.2, resume=folder / "fp32" / "whole" / "fp32"))

    run_all([replace(config, out=folder / "compare", epochs=1) for config in comparison_configs(TINY)])


@pytest.fixture(scope="module")
def two_rank_folder(tmp_path_factory):
    """What two ranks wrote in ``two_rank_cases``."""
    folder = tmp_path_factory.mktemp("two_ranks")
    launch(two_rank_cases, 2, 1, folder)
    return folder


@pytest.mark.world
@pytest.mark.slow
def test_comparison_of_two_ranks(two_rank_folder):
    document = json.loads((two_rank_folder / "compare" / "comparison.json").read_text())
    assert [run["label"] for run in document["runs"]] == ["fp32", "bf16", "qcomm k=1", "qcomm k=2"]
    fp32, _, one, two = (run["stats"] for run in document["runs"])
    assert fp32["bytes_sent"] == fp32["bytes_uncompressed"] == 2 * 269_434 * 4
    assert one["bits_per_element_phase1"] < 2.5
    assert two["bits_per_element_phase1"] < one["bits_per_element_phase1"]
    assert two["bytes_sent"] < one["bytes_sent"] < fp32["bytes_sent"] / 8


def read_checkpoint(config: TrainConfig, ranks_before: int) -> None:
    """What ranks that are gone still had to send goes to those that stay."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    saved = checkpoint.find(config.out / config.slug)
    shared, parts = checkpoint.load(saved, config, rank, ranks)
    assert shared["world_size"] == ranks_before
    assert len(parts) == max(1, len(range(rank, ranks_before, ranks)))
    run = _Run(config, datasets.load_dataset(config.dataset), rank, ranks)
    assert run.restore(shared, parts) == 1
    assert run.steps_done == run.steps_per_epoch
    assert (run.exchange.stats()["residual_norm"] > 0) == (rank < ranks_before)
    assert math.isfinite(run.epoch(1, lambda step: None)["train_loss"])


@pytest.mark.world
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])
def test_checkpoint_of_two_ranks_is_resumed_by(two_rank_folder, ranks):
    config = replace(TINY, method="qcomm", out=two_rank_folder / "qcomm-k1" / "half")
    launch(read_checkpoint, ranks, 1, config, 2)


def fail(kind: type[Exception]) -> None:
    if dist.get_rank() == 1:
        raise kind("no good")
    dist.barrier()  # is never joined by rank 1


@pytest.mark.world
def test_a_users_error_on_one_rank_ends_all_without_a_traceback(capfd):
    with pytest.raises(SystemExit) as caught:
        launch(fail, 2, 1, RecipeError)
    assert caught.value.code == 2
    text = capfd.readouterr().err
    assert "error (rank 1): no good" in text
    assert "Traceback" not in text


def test_damaged_checkpoint_is_named(tmp_path):
    folder = tmp_path / "epoch-0001"
    folder.mkdir()
    (folder / "shared.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(RecipeError, match=r"shared\.pt cannot be read"):
        checkpoint.load(checkpoint.find(tmp_path), TINY, 0, 1)


def one_epoch(rank: int, world_size: int, secret: Path | None) -> tuple[dict[str, Any], bool]:
    """The first record of a short run, and whether DDP has sent weights or buffers itself. The group has the secret."""
    config = replace(TINY, epochs=1, train_images=64, method="qcomm", secret=secret)
    with mock.patch.object(distributed, "_sync_module_states", wraps=distributed._sync_module_states) as synced:
        record = train(config).history[0]
    get_communicator(dist.group.WORLD, ConnectionOptions(KeyFile.of(secret)))  # is refused for another secret
    return record, synced.called


@pytest.mark.world
def test_a_sealed_run_trains_as_an_open_one(tmp_path):
    key = tmp_path / "key"
    key.write_text(secrets.token_hex(32))
    key.chmod(0o400)
    (opened, ddp_sent), (sealed, ddp_sends) = run(2, one_epoch, None)[1], run_alone(2, one_epoch, key)[1]
    assert (ddp_sent, ddp_sends) == (True, False)
    assert [sealed[name] for name in ("train_loss", "test_loss")] == [opened["train_loss"], opened["test_loss"]]
