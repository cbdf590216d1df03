"""The Trainer of transformers: bytes on the wire, equal weights, and runs that resume bit for bit."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from frameworks import OPTIONS, accuracy, assert_compressed, dataset, files_of_ranks, flat, mlp
from torch import nn
from torch.utils.data import Dataset

import qcomm

pytest.importorskip("transformers", reason="transformers is not installed: make test-frameworks")
pytest.importorskip("accelerate", reason="accelerate is not installed: make test-frameworks")

from transformers import Trainer, TrainingArguments

from qcomm.integrations.transformers import QcommTrainerCallback

pytestmark = pytest.mark.world

STEPS = 8  # an epoch


class Samples(Dataset):
    def __init__(self):
        self.values, self.labels = dataset().tensors

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"values": self.values[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, values, labels):
        scores = self.net(values)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def make(folder, **options):
    model = Classifier()
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=4,
        num_train_epochs=options.pop("epochs", 2),
        save_strategy=options.pop("save_strategy", "epoch"),
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = Trainer(model, arguments, train_dataset=Samples(), optimizers=(optimizer, None))
    callback = QcommTrainerCallback(trainer, **OPTIONS)
    trainer.add_callback(callback)
    return trainer, callback


def resumes_bit_for_bit(rank, world_size, folder):
    trainer, callback = make(folder)
    trainer.train()
    assert_compressed(callback.state, trainer.model, 2 * STEPS)
    assert accuracy(trainer.model.net) > 0.98
    dist.barrier()
    saved = f"{folder}/checkpoint-{STEPS}"
    assert files_of_ranks(saved) == [f"qcomm_0_rank_{number}_of_{world_size}.pt" for number in range(world_size)]

    resumed, later = make(f"{folder}-resumed")
    resumed.train(resume_from_checkpoint=saved)
    assert later.state.stats()["steps"] == STEPS
    assert torch.equal(flat(resumed.model), flat(trainer.model))

    # The newest checkpoint of the run's own folder is the last one, so a third epoch goes on from there.
    longer, third = make(folder, epochs=3)
    longer.train(resume_from_checkpoint=True)
    assert third.state.stats()["steps"] == STEPS
    straight, _ = make(f"{folder}-straight", epochs=3)
    straight.train()
    assert torch.equal(flat(longer.model), flat(straight.model))

    if rank == 0:
        for name in files_of_ranks(saved):
            Path(saved, name).unlink()
    dist.barrier()
    without, _ = make(f"{folder}-without")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        without.train(resume_from_checkpoint=saved)
    assert any("has no state of qcomm, so its residuals begin at zero" in str(w.message) for w in caught)
    assert not torch.equal(flat(without.model), flat(trainer.model))


def test_a_run_compresses_and_resumes_bit_for_bit(ranks, tmp_path):
    ranks.run(resumes_bit_for_bit, str(tmp_path / "run"))


def accumulates(rank, world_size, folder):
    trainer, callback = make(folder, epochs=1, gradient_accumulation_steps=4, save_strategy="no")
    trainer.train()
    assert_compressed(callback.state, trainer.model, STEPS // 4)
    state = callback.state
    trainer.train()  # on the same DDP model, which can be given a hook once
    assert callback.state is state
    assert_compressed(callback.state, trainer.model, STEPS // 2)


def test_accumulated_gradients_are_exchanged_once_and_train_can_be_called_again(ranks, tmp_path):
    ranks.run(accumulates, str(tmp_path))


def only_weights(rank, world_size, folder):
    trainer, _ = make(folder, epochs=1, save_only_model=True)
    trainer.train()
    dist.barrier()
    assert not files_of_ranks(f"{folder}/checkpoint-{STEPS}")


def test_a_checkpoint_that_cannot_be_resumed_from_has_no_residuals(ranks, tmp_path):
    ranks.run(only_weights, str(tmp_path / "run"))


def refused(rank, world_size, folder):
    trainer, callback = make(folder)
    trainer.accelerator.prepare = lambda *objects: objects if len(objects) > 1 else objects[0]
    with pytest.raises(
        TypeError, match="MULTI_CPU has wrapped Classifier in none: gradients would travel uncompressed"
    ):
        trainer.train()
    assert callback.state is None
    with pytest.raises(ValueError, match="step must be at most"):
        QcommTrainerCallback(trainer, grid=qcomm.SigmaGrid(step=5.0))
    shutil.rmtree(folder, ignore_errors=True)


def test_a_trainer_without_ddp_is_refused(ranks, tmp_path):
    ranks.run(refused, str(tmp_path / "run"))
