"""The material of training recipes: models, image files, data sets, augmentation."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from qcomm.recipes import datasets
from qcomm.recipes.errors import RecipeError
from qcomm.recipes.image_files import read_cifar_batch, read_idx
from qcomm.recipes.models import MODEL_NAMES, build_model, count_parameters

# Parameters with 1,000 classes: those that the papers' networks are known to have.
IMAGENET_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


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
            (gzip.compress(good, mtime=0)[:-9], "damaged gzip"),
            (gzip.compress(good, mtime=0)[:-6] + b"\0" * 6, "damaged gzip"),
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
