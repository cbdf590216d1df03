"""Training recipes: models, image files, data sets, schedule, checkpoints, and small runs of two ranks."""

import gzip
import json
import math
import pickle
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from qcomm.recipes import checkpoint, datasets
from qcomm.recipes.compare import comparison_configs, print_table, run_all, verdict
from qcomm.recipes.config import TrainConfig, learning_rate
from qcomm.recipes.errors import RecipeError
from qcomm.recipes.image_files import read_cifar_batch, read_idx
from qcomm.recipes.launch import launch
from qcomm.recipes.models import MODEL_NAMES, build_model, count_parameters
from qcomm.recipes.train import _LOGGED_STATS, TrainResult, _Run, train

# Parameters with 1,000 classes: those that the papers' networks are known to have.
IMAGENET_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
TINY = TrainConfig(epochs=2, train_images=128, stem_stride=2, batch_size=32)


class TestModels:
    @pytest.mark.parametrize("name", IMAGENET_PARAMETERS)
    def test_parameter_count(self, name):
        with torch.device("meta"):  # counts need no weights
            model = build_model(name, image_size=224, num_classes=1000)
        assert count_parameters(model) == IMAGENET_PARAMETERS[name]

    def test_resnet20_parameter_count(self):
        assert count_parameters(build_model("resnet20")) == 269_722  # He et al., table 6: 0.27M

    @pytest.mark.parametrize("name", MODEL_NAMES)
    @pytest.mark.parametrize("channels", [1, 3])
    def test_logits_shape(self, name, channels):
        with torch.device("meta"):
            model = build_model(name, in_channels=channels, num_classes=7)
            assert model(torch.empty(2, channels, 32, 32)).shape == (2, 7)

    def test_large_images_shrink_32_fold_before_pooling(self):
        with torch.device("meta"):
            model = build_model("resnet18", image_size=224)
            assert model.stages(model.stem(torch.empty(1, 3, 224, 224))).shape == (1, 512, 7, 7)

    def test_stem_stride_halves_the_maps(self):
        with torch.device("meta"):
            images = torch.empty(1, 3, 32, 32)
            assert build_model("resnet20").stem(images).shape[-1] == 32
            assert build_model("resnet20", stem_stride=2).stem(images).shape[-1] == 16

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"name": "resnet19"}, "resnet20, resnet18"),
            ({"name": "resnet20", "image_size": 224}, "image_size is 224"),
            ({"name": "resnet18", "image_size": 64}, "32 or 224"),
            ({"name": "resnet18", "in_channels": 2}, "in_channels is 2"),
            ({"name": "resnet18", "num_classes": 1}, "num_classes is 1"),
            ({"name": "resnet18", "stem_stride": 3}, "stem_stride is 3"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(RecipeError, match=message):
            build_model(**arguments)


def idx_bytes(values: torch.Tensor) -> bytes:
    return bytes([0, 0, 8, values.dim()]) + struct.pack(f">{values.dim()}I", *values.shape) + values.numpy().tobytes()


class TestIdx:
    @pytest.mark.parametrize("shape", [(5,), (3, 4, 2), (0, 2)])
    @pytest.mark.parametrize("compress", [bytes, gzip.compress])
    def test_round_trip(self, tmp_path, shape, compress):
        values = torch.randint(0, 256, shape, dtype=torch.uint8)
        path = tmp_path / "values"
        path.write_bytes(compress(idx_bytes(values)))
        assert torch.equal(read_idx(path), values)

    good = idx_bytes(torch.arange(12, dtype=torch.uint8).view(3, 4))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "starts with nothing"),
            (b"\x89PNG" + good, "not an idx file"),
            (b"\0\0\x0d\2" + good[4:], "not an idx file"),  # floats
            (b"\0\0\x08\0", "not an idx file"),  # no dimension
            (good[:9], "ends inside its header"),
            (good[:-1], "holds 11 bytes"),
            (good + b"\0", "holds more"),
            (b"\0\0\x08\3" + b"\xff" * 12, "is refused"),
            (gzip.compress(good)[:-9], "damaged gzip"),
            (gzip.compress(good)[:-6] + b"\0" * 6, "damaged gzip"),
        ],
    )
    def test_corrupt_files_are_refused(self, tmp_path, content, message):
        path = tmp_path / "broken"
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=message) as caught:
            read_idx(path)
        assert str(path) in str(caught.value)

    def test_missing_file(self, tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            read_idx(tmp_path / "absent")


class Malicious:
    def __reduce__(self):
        return print, ("this must not be printed",)


def cifar_batch(count: int, **changes: object) -> dict[bytes, object]:
    images = np.arange(count * 3072, dtype=np.uint8).reshape(count, 3072)
    return {b"data": images, b"labels": [i % 10 for i in range(count)], b"batch_label": b"test", **changes}


class TestCifar:
    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_reads_a_batch(self, tmp_path, protocol):
        path = tmp_path / "batch"
        path.write_bytes(pickle.dumps(cifar_batch(11), protocol=protocol))
        images, labels = read_cifar_batch(path)
        assert torch.equal(images.reshape(11, 3072), torch.from_numpy(cifar_batch(11)[b"data"]))
        assert labels.tolist() == [*range(10), 0]

    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_a_pickle_that_names_a_function_runs_nothing(self, tmp_path, capsys, protocol):
        path = tmp_path / "batch"
        path.write_bytes(pickle.dumps({b"data": Malicious()}, protocol=protocol))
        with pytest.raises(RecipeError, match=r"names \w+\.print"):
            read_cifar_batch(path)
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "not a CIFAR-10 batch"),
            (b"\x80\x04garbage", "not a CIFAR-10 batch"),
            (pickle.dumps([1, 2], 2), "holds a list"),
            (pickle.dumps({b"labels": [1]}, 2), "'data' is not"),
            (pickle.dumps({b"data": b"x" * 3072, b"labels": [1]}, 2), "'data' is not"),
            (pickle.dumps(cifar_batch(2) | {b"data": np.zeros((2, 3072), np.int32)}, 2), "'data' is not"),
            (pickle.dumps(cifar_batch(2) | {b"data": np.zeros((2, 3071), np.uint8)}, 2), "'data' is not"),
            (pickle.dumps(cifar_batch(2) | {b"labels": [1, 10]}, 2), "'labels' is not"),
            (pickle.dumps(cifar_batch(2) | {b"labels": [1]}, 2), "'labels' is not"),
            (pickle.dumps(cifar_batch(2), 2)[:-700], "not a CIFAR-10 batch"),
        ],
    )
    def test_anything_else_is_refused(self, tmp_path, content, message):
        path = tmp_path / "batch"
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=message):
            read_cifar_batch(path)

    @pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
    def test_loads_the_directory(self, tmp_path, inside):
        (tmp_path / inside).mkdir(exist_ok=True)
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
            (tmp_path / inside / name).write_bytes(pickle.dumps(cifar_batch(4), 2))
        loaded = datasets.load_cifar10(tmp_path)
        assert loaded.train.images.shape == (20, 3, 32, 32)
        assert len(loaded.test) == 4


def write_idx_dataset(folder: Path, shape: tuple[int, ...] = (6, 28, 28)) -> None:
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(torch.full(shape, 9).byte())))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(torch.arange(6).byte()))


class TestDatasets:
    def test_digits_are_split_the_same_way_every_time(self):
        digits = datasets.load_digits()
        assert len(digits.train) + len(digits.test) == 1797
        shares = torch.bincount(digits.test.labels) / torch.bincount(
            torch.cat([digits.train.labels, digits.test.labels])
        )
        assert shares.min() > 0.24
        assert shares.max() < 0.26
        assert torch.equal(digits.test.images, datasets.load_digits().test.images)

    def test_normalised_training_images_have_mean_zero_and_deviation_one(self):
        digits = datasets.load_digits()
        images = digits.normalise(digits.train.images)
        assert images.mean().item() == pytest.approx(0, abs=1e-4)
        assert images.std().item() == pytest.approx(1, abs=1e-4)

    @pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
    def test_idx_data_is_padded_to_32(self, tmp_path, name):
        write_idx_dataset(tmp_path)
        loaded = datasets.load_dataset(name, tmp_path)
        assert loaded.train.images.shape == (6, 1, 32, 32)
        assert loaded.train.images[:, :, 2:30, 2:30].eq(9).all()
        assert loaded.train.images.sum() == 6 * 28 * 28 * 9
        assert loaded.flip == (name == "fashion-mnist")

    def test_images_of_another_size_are_refused(self, tmp_path):
        write_idx_dataset(tmp_path, (6, 28, 27))
        with pytest.raises(RecipeError, match="28 x 28"):
            datasets.load_mnist(tmp_path)

    def test_labels_that_do_not_fit_are_refused(self, tmp_path):
        write_idx_dataset(tmp_path, (5, 28, 28))
        with pytest.raises(RecipeError, match="the labels that belong to"):
            datasets.load_mnist(tmp_path)

    @pytest.mark.parametrize(
        ("name", "file", "source"),
        [
            ("mnist", "t10k-labels-idx1-ubyte", "ossci-datasets"),
            ("fashion-mnist", "train-images-idx3-ubyte", "apt install dataset-fashion-mnist"),
            ("cifar10", "data_batch_3", "cs.toronto.edu"),
        ],
    )
    def test_missing_files_are_named_with_their_place_and_source(self, tmp_path, name, file, source):
        with pytest.raises(RecipeError) as caught:
            datasets.load_dataset(name, tmp_path)
        for part in (file, str(tmp_path), source):
            assert part in str(caught.value)

    @pytest.mark.parametrize("name", ["mnist", "cifar10"])
    def test_a_missing_directory_is_asked_for(self, name):
        with pytest.raises(RecipeError, match="--data-dir"):
            datasets.load_dataset(name)

    def test_unknown_name(self):
        with pytest.raises(RecipeError, match="digits, mnist, fashion-mnist, cifar10"):
            datasets.load_dataset("imagenet")


class TestAugmentation:
    def test_every_result_is_a_shifted_and_perhaps_mirrored_original(self):
        images = torch.randint(1, 256, (64, 3, 8, 8), dtype=torch.uint8)
        result = datasets.augment(images, 2, True, torch.Generator().manual_seed(1))
        padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
        seen = set()
        for original, augmented in zip(padded, result, strict=True):
            places = [
                (y, x, mirrored)
                for y in range(5)
                for x in range(5)
                for mirrored in (False, True)
                for window in [original[:, y : y + 8, x : x + 8]]
                if torch.equal(augmented, window.flip(-1) if mirrored else window)
            ]
            assert len(places) == 1
            seen.update(places)
        assert len({place[:2] for place in seen}) > 15  # of 25 shifts
        assert {place[2] for place in seen} == {False, True}

    def test_without_flip_and_padding_nothing_changes(self):
        images = torch.randint(0, 256, (5, 1, 6, 7), dtype=torch.uint8)
        assert torch.equal(datasets.augment(images, 0, False, torch.Generator()), images)

    def test_seed_epoch_and_rank_each_change_the_numbers(self):
        def numbers(*key):
            return torch.rand(4, generator=datasets.augmentation_generator(*key)).tolist()

        keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
        assert len({tuple(numbers(*key)) for key in keys}) == 4
        assert numbers(3, 2, 1) == numbers(3, 2, 1)


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
    assert run.resume(saved) == 1
    own_state = checkpoint.load(saved, config, rank, ranks)[1][0]["exchange"]
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
        replace(TINY, method="qcomm", grid="range", c=2.0, amp="fp16", nesterov=True, decay_norm=True),
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
    assert run.resume(saved) == 1
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
