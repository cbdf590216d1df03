"""Restarts of a killed run: one command line begins it and goes on, by hand and under torchrun."""

import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import qcomm
from qcomm.recipes import checkpoint
from qcomm.recipes.config import TrainConfig
from qcomm.recipes.errors import RecipeError
from qcomm.recipes.launch import launch
from qcomm.recipes.train import train

TINY = TrainConfig(epochs=1, train_images=64, stem_stride=2, batch_size=32)
# A resumed run has the bits of an undisturbed one where a gradient's packet does not depend on its bucket, since DDP's
# first step after a start has a single bucket. With two_phase other owners quantize the means, and small tensors that
# are quantized together have other neighbours.
TRAIN = [
    *("-m", "qcomm", "train", "--method", "qcomm", "--strategy", "all_gather", "--min-elements", "0"),
    *("--epochs", "4", "--train-images", "256", "--checkpoint-every", "1", "--resume", "auto"),
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]


@contextmanager
def started(*arguments, cwd):
    """A process of its own, whose output goes to ``log``; it is killed with its children at the end."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(qcomm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    with (cwd / "log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process):
    return process.communicate(timeout=150)[0], process.returncode


def ranks_of(process):
    """The processes of the ranks, in the order of their start."""
    found = []
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_text()
        if "resource_tracker" not in command:
            found.append(int(child))
    return found


def kill_a_rank_after_epoch(number, process):
    for line in process.stdout:
        if f"epoch {number}/" in line:
            _, rank = ranks_of(process)
            os.kill(rank, signal.SIGKILL)
            return
    raise AssertionError("the run ended before it could be killed")


def final_state(folder):
    """Weights, and residuals of both ranks."""
    last = folder / "runs" / "qcomm-k1" / "epoch-0004"
    shared = torch.load(last / "shared.pt", weights_only=True)
    residuals = []
    for rank in range(2):
        part = torch.load(last / f"rank-{rank:04d}.pt", weights_only=True)
        (state,) = part["exchange"][f"rank {rank} of 2"]
        residuals.append(state["error_feedback"])
    return [shared["model"], shared["optimizer"]["state"], residuals]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with started(*TRAIN, "--ranks", "2", cwd=folder) as process:
        output, code = finish(process)
    assert code == 0, (folder / "log").read_text()
    assert "epoch 1/4" in output
    return final_state(folder)


@pytest.mark.world
@pytest.mark.slow
def test_the_same_command_goes_on_after_a_rank_was_killed(undisturbed, tmp_path):
    command = [*TRAIN, "--ranks", "2"]
    with started(*command, cwd=tmp_path) as process:
        kill_a_rank_after_epoch(2, process)
        assert finish(process)[1] != 0
    with started(*command, cwd=tmp_path) as process:
        output, code = finish(process)
    assert code == 0, (tmp_path / "log").read_text()
    assert "epoch 1/4" not in output and "epoch 4/4" in output
    assert same(final_state(tmp_path), undisturbed)


@pytest.mark.world
@pytest.mark.slow
def test_torchrun_restarts_the_run_where_it_was(undisturbed, tmp_path):
    with started(*TORCHRUN, *TRAIN, cwd=tmp_path) as process:
        kill_a_rank_after_epoch(2, process)
        output, code = finish(process)
    assert code == 0, (tmp_path / "log").read_text()
    assert "epoch 1/4" not in output and "epoch 4/4" in output
    assert same(final_state(tmp_path), undisturbed)


def refusal(config):
    with pytest.raises(RecipeError) as caught:
        train(config)
    return str(caught.value)


def ranks_that_differ(folder):
    """On each of two ranks: a file that one rank alone cannot read, and directories that are not the same."""
    rank = dist.get_rank()
    config = replace(TINY, out=folder / "whole", checkpoint_every=1)
    train(config)
    resuming = replace(config, epochs=1, resume=config.out)
    saved = checkpoint.newest(resuming)
    assert saved == config.folder / "epoch-0001"
    assert train(resuming).history == train(replace(resuming, resume=config.folder)).history

    text = refusal(replace(resuming, resume=config.out if rank == 0 else folder / "none", out=folder / f"rank-{rank}"))
    assert f"rank 0: --resume: {folder / 'whole'} holds no checkpoint" in text, text
    own = replace(config, out=config.out if rank == 0 else folder / "empty")
    text = refusal(replace(own, resume=own.out))
    assert "rank 0 finds epoch-0001" in text and "rank 1 finds no checkpoint" in text, text

    dist.barrier()
    if rank == 0:
        damaged = saved / "rank-0001.pt"
        content = bytearray(damaged.read_bytes())
        damaged.write_bytes(content[: len(content) // 2])
    dist.barrier()
    text = refusal(resuming)
    assert text.startswith("rank 1: --resume: ") and "rank-0001.pt cannot be read" in text, text
    assert "remove epoch-0001" in text


@pytest.mark.world
@pytest.mark.slow
def test_a_checkpoint_that_not_all_ranks_can_read_is_named_on_all(tmp_path):
    launch(ranks_that_differ, 2, 1, tmp_path)


def one_full_disk(folder):
    """On each of two ranks: the disk of one is full, wherever in its file; after that it is not."""
    rank = dist.get_rank()
    shared, own = {"weights": torch.zeros(5000)}, {"residual": torch.full((5000,), float(rank))}
    checkpoint.save(folder, 1, shared, own)
    for full in range(2):
        for limit in (0, 1, 700, 20_000):
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit if rank == full else soft, hard))
            try:
                with pytest.raises(RecipeError, match=rf"rank {full} could not write .*epoch-0002"):
                    checkpoint.save(folder, 2, shared, own)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            dist.barrier()
            assert [path.name for path in folder.iterdir()] == ["epoch-0001"]
            dist.barrier()
    checkpoint.save(folder, 2, shared, own)
    assert [path.name for path in folder.iterdir()] == ["epoch-0002"]


@pytest.mark.world
def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path):
    launch(one_full_disk, 2, 1, tmp_path / "run")


class TestNewest:
    def test_the_own_output_may_be_empty_and_another_directory_may_not(self, tmp_path):
        config = replace(TINY, out=tmp_path / "runs")
        assert checkpoint.newest(config) is None
        assert checkpoint.newest(replace(config, resume=config.out)) is None
        assert checkpoint.newest(replace(config, resume=config.folder)) is None
        with pytest.raises(RecipeError, match="elsewhere holds no checkpoint"):
            checkpoint.newest(replace(config, resume=tmp_path / "elsewhere"))

    def test_an_unfinished_checkpoint_is_not_one_and_a_damaged_one_is_not_passed_over(self, tmp_path):
        config = replace(TINY, out=tmp_path, resume=tmp_path)
        for name in ("epoch-0001", "epoch-0002", "unfinished-0003", "epoch-3-notes"):
            (config.folder / name).mkdir(parents=True)
        found = checkpoint.newest(config)
        assert found == config.folder / "epoch-0002"
        with pytest.raises(RecipeError, match=r"epoch-0002/shared\.pt cannot be read"):
            checkpoint.load(found, config, 0, 1)

    def test_a_flipped_bit_is_noticed(self, tmp_path):
        path = tmp_path / "epoch-0001" / "shared.pt"
        path.parent.mkdir()
        torch.save({"format": 1, "weights": torch.zeros(4096)}, path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(RecipeError, match=r"shared\.pt cannot be read"):
            checkpoint.load(path.parent, TINY, 0, 1)
