"""read_saved: whatever is wrong with the bytes is a ValueError or an OSError."""

import io
import random
import zipfile

import pytest
import torch
from damaged_files import flipped, truncated, with_other_pickles

from qcomm.saved_file import read_saved

CONTENT = {"steps": 7, "names": ["a", "b"], "residuals": {"a": (3, torch.arange(40.0)), "b": torch.ones(2, 3)}}


def saved():
    file = io.BytesIO()
    torch.save(CONTENT, file)
    return file.getvalue()


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def read_or_refused(path):
    try:
        return read_saved(path)
    except (OSError, ValueError):
        return None


class _WithOddMetadata:
    """Pickled as a tensor whose metadata are a number, at which torch's loader asserts."""

    def __reduce__(self):
        tensor = torch.ones(2)
        return torch._utils._rebuild_tensor_v2, (tensor._typed_storage(), 0, (2,), (1,), False, {}, 82)


def test_an_assertion_of_torchs_loader_is_a_value_error(tmp_path):
    path = tmp_path / "odd.pt"
    torch.save({"residual": _WithOddMetadata()}, path)
    with pytest.raises(ValueError, match=r"odd\.pt is damaged, or of another kind: AssertionError: expected dict"):
        read_saved(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:TypedStorage is deprecated")
def test_damage_is_refused_or_changes_nothing(tmp_path):
    path, whole, dice, refused = tmp_path / "saved.pt", saved(), random.Random(4), 0
    for damaged in [*flipped(whole, dice, 1000), *truncated(whole, dice, 100), *with_other_pickles(whole, dice, 1000)]:
        path.write_bytes(damaged.content)
        read = read_or_refused(path)
        refused += read is None
        assert read is None or damaged.has_checksums or same(read, CONTENT)
    assert refused > 1000


def test_what_is_no_file_of_tensors_is_named(tmp_path):
    path = tmp_path / "saved.pt"
    with pytest.raises(FileNotFoundError, match=r"saved\.pt"):
        read_saved(path)
    path.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"saved\.pt is damaged, or of another kind: BadZipFile: File is not a zip file"
    ):
        read_saved(path)
    torch.save(tmp_path, path)
    with pytest.raises(ValueError, match="UnpicklingError: Weights only load failed"):
        read_saved(path)


def test_a_compressed_archive_is_refused_before_it_takes_memory(tmp_path):
    path = tmp_path / "saved.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(ValueError, match=r"archive/data\.pkl is compressed, which torch.save does not do"):
        read_saved(path)


def test_values_that_are_marked_as_a_directory_are_refused(tmp_path):
    path, whole = tmp_path / "saved.pt", saved()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        start = archive.start_dir
    entry = whole.index(b"archive/data/0", start) - 46
    path.write_bytes(whole[: entry + 38] + b"\x10" + whole[entry + 39 :])
    with pytest.raises(ValueError, match="archive/data/0 is marked as a directory"):
        read_saved(path)
