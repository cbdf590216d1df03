"""Accelerate: bytes on the wire, equal weights, and runs that resume bit for bit from ``save_state``."""

import gc
import shutil
import warnings

import pytest
import torch
import torch.distributed as dist
from frameworks import (
    BUCKET_MB,
    OPTIONS,
    accuracy,
    assert_compressed,
    dataset,
    files_of_ranks,
    flat,
    mlp,
)
from torch.utils.data import DataLoader

import qcomm

pytest.importorskip("accelerate", reason="accelerate is not installed: make test-frameworks")

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, TorchDynamoPlugin

from qcomm.integrations.accelerate import attach

pytestmark = pytest.mark.world

STEPS = 8  # an epoch


class Run:
    """A prepared model with its optimizer and data."""

    def __init__(self, accelerator=None, scaler=None, **options):
        small = DistributedDataParallelKwargs(bucket_cap_mb=BUCKET_MB)
        self.accelerator = accelerator or Accelerator(cpu=True, kwargs_handlers=[small], **options)
        self.accelerator.scaler = scaler
        self.net = mlp()
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        self.model, self.optimizer, self.data = self.accelerator.prepare(
            self.net, optimizer, DataLoader(dataset(), batch_size=4)
        )
        self.state = attach(self.accelerator, self.model, **OPTIONS)

    def epoch(self):
        for values, labels in self.data:
            with self.accelerator.accumulate(self.model):
                loss = torch.nn.functional.cross_entropy(self.model(values), labels)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()


def resumes_bit_for_bit(rank, world_size, folder):
    run = Run()
    run.epoch()
    run.accelerator.save_state(folder)
    dist.barrier()
    assert files_of_ranks(folder) == [f"qcomm_0_rank_{number}_of_{world_size}.pt" for number in range(world_size)]
    run.epoch()
    assert_compressed(run.state, run.net, 2 * STEPS)
    assert accuracy(run.net) > 0.98

    resumed = Run()
    resumed.accelerator.load_state(folder)
    resumed.epoch()
    assert resumed.state.stats()["steps"] == STEPS
    assert torch.equal(flat(resumed.net), flat(run.net))

    # A checkpoint without qcomm is loaded with a warning, and goes on otherwise.
    bare = f"{folder}-bare"
    if rank == 0:
        shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("qcomm*"))
    dist.barrier()
    without = Run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        without.accelerator.load_state(bare)
    assert any("has no state of qcomm, so its residuals begin at zero" in str(w.message) for w in caught)
    without.epoch()
    assert not torch.equal(flat(without.net), flat(run.net))


def test_a_run_compresses_and_resumes_bit_for_bit(ranks, tmp_path):
    ranks.run(resumes_bit_for_bit, str(tmp_path / "state"))


def accumulates(rank, world_size):
    run = Run(gradient_accumulation_steps=4)
    run.epoch()
    assert_compressed(run.state, run.net, STEPS // 4)


def test_accumulated_gradients_are_exchanged_once(ranks):
    ranks.run(accumulates)


def scales(rank, world_size):
    run = Run(scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert run.state.grad_scale == run.accelerator.scaler.get_scale
    run.epoch()
    assert_compressed(run.state, run.net, STEPS)
    assert run.state.stats()["residual_norm"] < 10  # without the factor of 1024


def test_the_accelerators_scaler_is_known(ranks):
    ranks.run(scales)


def compiles(rank, world_size):
    AcceleratorState._reset_state()  # which remembers that the models before were not compiled
    accelerator = Accelerator(cpu=True, dynamo_plugin=TorchDynamoPlugin(backend="eager"))
    run = Run(accelerator)
    assert type(run.model).__name__ == "OptimizedModule"
    run.epoch()
    assert_compressed(run.state, run.net, STEPS)
    AcceleratorState._reset_state()


def test_a_compiled_model(ranks):
    ranks.run(compiles)


def two_models(rank, world_size, folder):
    accelerator = Accelerator(cpu=True)
    first, second = Run(accelerator), Run(accelerator)
    first.epoch()
    accelerator.save_state(folder)
    dist.barrier()
    norms = [run.state.stats()["residual_norm"] for run in (first, second)]
    assert norms[0] > 0 == norms[1]
    assert files_of_ranks(folder) == [
        f"qcomm_{index}_rank_{number}_of_2.pt" for index in range(2) for number in range(2)
    ]
    first.epoch()
    accelerator.load_state(folder)
    assert [run.state.stats()["residual_norm"] for run in (first, second)] == norms
    # A model that is gone leaves its place to the next one.
    del first
    accelerator.free_memory()
    gc.collect()
    third = Run(accelerator)
    third.epoch()
    accelerator.save_state(folder)
    dist.barrier()
    residuals = torch.load(f"{folder}/qcomm_0_rank_{rank}_of_2.pt", weights_only=True)
    assert residuals[f"rank {rank} of 2"][0]["steps"] == STEPS


def test_two_models_of_an_accelerator(ranks, tmp_path):
    ranks.run(two_models, str(tmp_path / "state"))


def refused(rank, world_size):
    accelerator = Accelerator(cpu=True)
    with pytest.raises(
        TypeError, match=r"MULTI_CPU has wrapped Sequential in none: gradients would travel uncompressed"
    ):
        attach(accelerator, mlp())
    hooked = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[hooked])
    with pytest.raises(RuntimeError, match="has a communication hook already"):
        attach(accelerator, accelerator.prepare(mlp()))
    with pytest.raises(ValueError, match="step must be at most"):
        attach(accelerator, Accelerator(cpu=True).prepare(mlp()), grid=qcomm.SigmaGrid(step=5.0))


def test_models_without_ddp_and_with_another_hook_are_refused(ranks):
    ranks.run(refused)
