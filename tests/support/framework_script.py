"""A user's program for each framework: python framework_script.py KIND FOLDER, under the launcher that it needs.

Every rank writes what it sent, and its weights, into the folder.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

# In Lightning's spawned processes this module has another name, and is imported again.
KIND, FOLDER = sys.argv[1], Path(sys.argv[2])
OPTIONS = {"strategy": "two_phase"}


def report(state, model):
    stats = state.stats()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    shown = {name: stats[name] for name in ("steps", "bytes_sent", "bytes_uncompressed")}
    text = json.dumps({**shown, "weights": weights.tolist()})
    (FOLDER / f"{dist.get_rank()}.json").write_text(text)


def samples():
    return torch.randn(32, 64, generator=torch.Generator().manual_seed(1))


class Items(list):
    """Samples as the Trainer of transformers wants them."""

    def __init__(self):
        super().__init__({"values": row} for row in samples())


class Net(nn.Linear):
    def forward(self, values):
        return {"loss": super().forward(values).square().mean()}


def with_lightning():
    callback = Reporting(**OPTIONS)
    trainer = pl.Trainer(
        strategy=KIND,
        accelerator="cpu",
        devices=2,
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(LightningNet())


def with_accelerate():
    from accelerate import Accelerator

    from qcomm.integrations.accelerate import attach

    accelerator, net = Accelerator(cpu=True), Net(64, 64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model, optimizer, data = accelerator.prepare(net, optimizer, DataLoader(samples(), batch_size=4))
    state = attach(accelerator, model, **OPTIONS)
    for values in data:
        accelerator.backward(model(values)["loss"])
        optimizer.step()
        optimizer.zero_grad()
    report(state, net)


def with_transformers():
    from transformers import Trainer, TrainingArguments

    from qcomm.integrations.transformers import QcommTrainerCallback

    arguments = TrainingArguments(
        str(FOLDER / "out"), use_cpu=True, per_device_train_batch_size=4, num_train_epochs=1, report_to="none"
    )
    trainer = Trainer(Net(64, 64), arguments, train_dataset=Items())
    callback = QcommTrainerCallback(trainer, **OPTIONS)
    trainer.add_callback(callback)
    trainer.train()
    report(callback.state, trainer.model)


if KIND.startswith("ddp"):
    import lightning.pytorch as pl

    from qcomm.integrations.lightning import QcommCallback

    class LightningNet(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net(64, 64)

        def training_step(self, batch, batch_idx):
            return self.net(batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            return DataLoader(samples(), batch_size=4)

    class Reporting(QcommCallback):
        def on_train_end(self, trainer, pl_module):
            report(self.state, pl_module)


if __name__ == "__main__":
    {"accelerate": with_accelerate, "transformers": with_transformers}.get(KIND, with_lightning)()
