"""Checkpoints on a disk on which names cannot be removed or given: a whole checkpoint is always found."""

import errno
import os
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed import world

from qcomm.recipes import checkpoint
from qcomm.recipes.errors import RecipeError


def save(folder, epoch, value):
    checkpoint.save(folder, epoch, {"value": value}, {"residual": torch.full((9,), float(value))})


def names(folder):
    """Of what is in the folder; no rank goes on before all have seen it."""
    dist.barrier()
    found = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    return found


def value_of(folder, rank):
    """Of the checkpoint that a run would go on from."""
    found = checkpoint.find(folder)
    shared, own = (torch.load(found / name, weights_only=True) for name in ("shared.pt", f"rank-{rank:04d}.pt"))
    assert own["residual"].tolist() == [float(shared["value"])] * 9
    return shared["value"]


@contextmanager
def nothing_can_be_removed():
    """As on NFS, where a directory holds files that a process has open."""
    error = OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    with mock.patch.object(shutil, "rmtree", side_effect=error):
        yield


@contextmanager
def cannot_be_renamed(name):
    original = Path.replace

    def replace(path, target):
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(path, target)

    with mock.patch.object(Path, "replace", replace):
        yield


@contextmanager
def warnings_of_rank_0(rank, *what):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == (len(what) if rank == 0 else 0), texts
    assert all(part in text for part, text in zip(what, texts, strict=False)), texts


@world(2)
def test_a_replaced_checkpoint_that_cannot_be_removed_is_a_warning(rank, world_size, tmp_path):
    save(tmp_path, 1, 1)
    dist.barrier()
    with nothing_can_be_removed(), warnings_of_rank_0(rank, "unfinished-0001-removed-"):
        save(tmp_path, 1, 2)
    assert names(tmp_path)[0] == "epoch-0001" and len(names(tmp_path)) == 2
    assert value_of(tmp_path, rank) == 2
    # It is in nobody's way, and gone as soon as it can be.
    with nothing_can_be_removed(), warnings_of_rank_0(rank, "unfinished-0001", "unfinished-0001"):
        save(tmp_path, 1, 3)
    assert value_of(tmp_path, rank) == 3
    save(tmp_path, 2, 4)
    assert names(tmp_path) == ["epoch-0002"] and value_of(tmp_path, rank) == 4


@world(2)
@pytest.mark.parametrize("how", ["removed", "renamed"])
def test_an_older_checkpoint_that_cannot_be_removed_is_a_warning(rank, world_size, tmp_path, how):
    save(tmp_path, 1, 1)
    dist.barrier()
    disk = nothing_can_be_removed() if how == "removed" else cannot_be_renamed("epoch-0001")
    with disk, warnings_of_rank_0(rank, f"could not remove {tmp_path}/epoch-0001: OSError: "):
        save(tmp_path, 2, 2)
    assert "epoch-0002" in names(tmp_path) and value_of(tmp_path, rank) == 2
    save(tmp_path, 3, 3)
    assert names(tmp_path) == ["epoch-0003"]


@world(2)
@pytest.mark.parametrize("name", ["unfinished-0001", "epoch-0001"])
def test_a_checkpoint_that_gets_no_name_leaves_the_one_before(rank, world_size, tmp_path, name):
    save(tmp_path, 1, 1)
    dist.barrier()
    with (
        cannot_be_renamed(name),
        warnings_of_rank_0(rank),
        pytest.raises(RecipeError, match=r"rank 0 could not write .*epoch-0001: OSError.*; the last whole"),
    ):
        save(tmp_path, 1, 2)
    assert names(tmp_path) == ["epoch-0001", "unfinished-0001"]  # complete, too, and nothing is lost
    assert value_of(tmp_path, rank) == 1
    save(tmp_path, 1, 3)
    assert names(tmp_path) == ["epoch-0001"] and value_of(tmp_path, rank) == 3
