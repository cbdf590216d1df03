"""Lightning and Fabric: bytes on the wire, equal weights, and runs that resume bit for bit from their checkpoints."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from distributed import gathered
from frameworks import BUCKET_MB, OPTIONS, accuracy, assert_compressed, dataset, flat, mlp
from torch.utils.data import DataLoader

import qcomm

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed: make test-frameworks")

from lightning.fabric import Fabric  # noqa: E402
from lightning.fabric.strategies import DDPStrategy as FabricDDP  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.plugins.environments import TorchElasticEnvironment  # noqa: E402
from lightning.pytorch.strategies import DDPStrategy  # noqa: E402

from qcomm.integrations.lightning import QcommCallback, attach  # noqa: E402

pytestmark = pytest.mark.world

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
STEPS = 8  # an epoch


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(dataset(), batch_size=4)


class Failing(Classifier):
    def training_step(self, batch, batch_idx):
        if self.global_step == 3:
            raise KeyError("planted")
        return super().training_step(batch, batch_idx)


def trainer(callback, epochs, callbacks=(), **options):
    options.setdefault("strategy", DDPStrategy(bucket_cap_mb=BUCKET_MB))
    options.setdefault("enable_checkpointing", bool(callbacks))
    return pl.Trainer(
        accelerator="cpu",
        devices=2,
        max_epochs=epochs,
        plugins=[TorchElasticEnvironment(), *options.pop("plugins", ())],
        callbacks=[callback, *callbacks],
        **QUIET | options,
    )


def fit(epochs, folder=None, resume=None, module=None, **options):
    """Trains, and returns module and callback."""
    module, callback = module or Classifier(), QcommCallback(**OPTIONS)
    kept = [ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)] if folder else []
    trainer(callback, epochs, kept, **options).fit(module, ckpt_path=resume)
    return module, callback


def resumes_bit_for_bit(rank, world_size, folder):
    module, callback = fit(2, folder)
    assert_compressed(callback.state, module, 2 * STEPS)
    assert accuracy(module.net) > 0.98
    saved = f"{folder}/epoch=0.ckpt"
    resumed, later = fit(2, resume=saved)
    assert later.state.stats()["steps"] == STEPS
    assert later.state.state_dict()["steps" if rank else f"rank 0 of {world_size}"]
    assert torch.equal(flat(resumed), flat(module))
    # Without the other rank's residuals the run would be another one.
    checkpoint = torch.load(saved, weights_only=False)
    assert list(checkpoint["callbacks"]["QcommCallback"]) == ["rank 0 of 2", "rank 1 of 2"]
    parts = [part["error_feedback"]["local"] for (part,) in checkpoint["callbacks"]["QcommCallback"].values()]
    assert any(not torch.equal(parts[0][name], parts[1][name]) for name in parts[0])
    del checkpoint["callbacks"]["QcommCallback"]
    if rank == 0:
        torch.save(checkpoint, f"{folder}/without.ckpt")
    dist.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bare, _ = fit(2, resume=f"{folder}/without.ckpt")
    assert any("has no state of qcomm" in str(warning.message) for warning in caught) == (rank == 0)
    assert not torch.equal(flat(bare), flat(module))


def test_a_run_compresses_and_resumes_bit_for_bit(ranks, tmp_path):
    ranks.run(resumes_bit_for_bit, str(tmp_path))


def goes_on(rank, world_size):
    module, callback = Classifier(), QcommCallback(**OPTIONS)
    trainer(callback, 1).fit(module)
    state = callback.state
    trainer(callback, 1).fit(module)
    assert callback.state is state
    assert state.stats()["steps"] == 2 * STEPS
    other = Classifier()
    trainer(callback, 1).fit(other)
    assert callback.state is not state
    assert_compressed(callback.state, other, STEPS)


def test_a_second_fit_goes_on_with_the_same_module_and_begins_with_another(ranks):
    ranks.run(goes_on)


def accumulates(rank, world_size):
    module, callback = fit(1, accumulate_grad_batches=4)
    assert_compressed(callback.state, module, STEPS // 4)


def test_accumulated_gradients_are_exchanged_once(ranks):
    ranks.run(accumulates)


def scales(rank, world_size):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module, callback = fit(1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert callback.state.grad_scale == scaler.get_scale
    assert_compressed(callback.state, module, STEPS)
    assert callback.state.stats()["residual_norm"] < 10  # without the factor of 1024
    _, callback = fit(1)
    assert callback.state.grad_scale is None


def test_the_scale_of_the_precision_plugin_is_known(ranks):
    ranks.run(scales)


def logs(rank, world_size):
    callback = QcommCallback(log=True, **OPTIONS)
    running = trainer(callback, 1, log_every_n_steps=2)
    running.fit(Classifier())
    assert running.logged_metrics["qcomm/bytes_sent"] == callback.state.stats()["bytes_sent"]
    assert 1 < running.logged_metrics["qcomm/bits_per_element"] < 4


def test_bits_and_bytes_are_logged_if_asked_for(ranks):
    ranks.run(logs)


def fails(rank, world_size, folder):
    callback = QcommCallback(**OPTIONS)
    running = trainer(callback, 1, [OnExceptionCheckpoint(folder)])
    with pytest.warns(UserWarning, match="after an exception has no residuals"), pytest.raises(KeyError):
        running.fit(Failing())
    checkpoint = torch.load(f"{folder}/on_exception.ckpt", weights_only=False)
    assert "QcommCallback" not in checkpoint["callbacks"]
    module, callback = fit(1, resume=f"{folder}/on_exception.ckpt")
    assert_compressed(callback.state, module, STEPS - 3)


def test_a_checkpoint_of_an_exception_has_no_residuals(ranks, tmp_path):
    ranks.run(fails, str(tmp_path))


def refused(rank, world_size):
    callback = QcommCallback(**OPTIONS)
    with pytest.raises(TypeError, match=r"SingleDeviceStrategy has wrapped Classifier in none: a single process sends"):
        pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, callbacks=[callback], **QUIET).fit(Classifier())
    assert callback.state is None


def test_a_single_device_is_refused(ranks):
    ranks.run(refused)


def test_options_are_checked_at_once():
    with pytest.raises(ValueError, match="step must be at most"):
        QcommCallback(grid=qcomm.SigmaGrid(step=5.0))


def fabric_run(steps, path=None, resume=None, compiled=False, accumulate=1):
    # The compiler of DDP models wants a first bucket of torch's size, 1 MiB, to be the smallest.
    strategy = FabricDDP() if compiled else FabricDDP(bucket_cap_mb=BUCKET_MB)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=TorchElasticEnvironment())
    fabric.launch()
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    model, optimizer = fabric.setup(torch.compile(net, backend="eager") if compiled else net, optimizer)
    state = attach(fabric, model, **OPTIONS)
    everything = {"model": model, "optimizer": optimizer, "hook": state}
    if resume:
        fabric.load(resume, everything)
    values, labels = dataset().tensors
    for step in steps:
        if step == 5 and path:
            fabric.save(path, everything)
        for part in range(accumulate):
            with fabric.no_backward_sync(model, enabled=part < accumulate - 1):
                batch = slice(4 * step, 4 * step + 4)
                mine = torch.nn.functional.cross_entropy(model(values[batch]), labels[batch] ^ fabric.global_rank)
                fabric.backward(mine)
        optimizer.step()
        optimizer.zero_grad()
    return net, state


def fabric_resumes(rank, world_size, path):
    net, state = fabric_run(range(10), path)
    assert_compressed(state, net, 10)
    resumed, state = fabric_run(range(5, 10), resume=path)
    assert torch.equal(flat(resumed), flat(net))
    assert list(torch.load(path, weights_only=True)["hook"]) == ["rank 0 of 2", "rank 1 of 2"]


def test_fabric_compresses_and_resumes_bit_for_bit(ranks, tmp_path):
    ranks.run(fabric_resumes, str(tmp_path / "state.ckpt"))


def fabric_compiles(rank, world_size):
    net, state = fabric_run(range(4), compiled=True)
    assert_compressed(state, net, 4)
    net, state = fabric_run(range(4), accumulate=2)
    assert_compressed(state, net, 4)


def test_fabric_with_a_compiled_model_and_with_accumulation(ranks):
    ranks.run(fabric_compiles)


def fabric_refuses(rank, world_size):
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(copy.deepcopy(mlp()))
    with pytest.raises(TypeError, match="SingleDeviceStrategy has wrapped _FabricModule in none: a single process"):
        attach(fabric, model)


def test_fabric_on_a_single_device_is_refused(ranks):
    ranks.run(fabric_refuses)


def count(rank, world_size):
    return gathered(rank)


def test_the_world_is_whole_at_the_end(ranks):
    assert ranks.run(count) == [[0, 1], [0, 1]]
