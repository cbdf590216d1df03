"""Lightning and Fabric: a callback for ``Trainer``, and a function for what ``fabric.setup`` returns.

``DDPStrategy(ddp_comm_hook=...)`` registers a hook on CUDA devices only, and drops it elsewhere without a word. The
callback attaches the hook itself, on every device, when the strategy has wrapped the model.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

import qcomm
from qcomm.codec import Grid, SigmaGrid
from qcomm.integrations.ddp_models import find_ddp
from qcomm.integrations.gathered_state import GatheredState

try:
    import lightning.pytorch as pl
except ImportError:
    try:
        import pytorch_lightning as pl  # the same under the name of a package of its own, which older programs import
    except ImportError as missing:
        raise ImportError(
            f"qcomm.integrations.lightning needs lightning: pip install 'qcomm[lightning]' ({missing})"
        ) from None

__all__ = ["QcommCallback", "attach"]


class QcommCallback(pl.Callback):
    """Compresses the gradients of a Trainer whose strategy is DDP.

    The checkpoints of the Trainer have the residuals of every rank: rank 0 gathers them, so that it needs 4 bytes per
    parameter and rank while it saves. A checkpoint that Lightning writes because of an exception has none, since other
    ranks may be gone.

    Args:
        grid: of the gradients.
        log: log ``qcomm/bits_per_element`` and ``qcomm/bytes_sent`` of rank 0 every ``log_every_n_steps`` steps.
        **options: of :class:`qcomm.CompressionState`. ``grad_scale`` is by default the scaler of ``precision``.

    Attributes:
        state: the hook's state, from the beginning of ``fit`` on; None before. Where the strategy starts processes by
            itself (``ddp_spawn``, ``ddp_fork``), it is in those. A later ``fit`` of the same module goes on with it.

    Raises:
        TypeError, ValueError: naming the option; in ``fit`` a TypeError if the strategy has made no DDP model.

    Example:
        >>> callback = QcommCallback(grid=SigmaGrid(step=2.0))
        >>> trainer = pl.Trainer(strategy="ddp", accelerator="cpu", devices=2, callbacks=[callback], logger=False)
    """

    def __init__(self, grid: Grid = SigmaGrid(step=1.0), *, log: bool = False, **options: Any) -> None:
        self._options = {"grid": grid, **options}
        GatheredState(**self._options)  # checks them
        self._log = log
        self.state: GatheredState | None = None
        self._module: pl.LightningModule | None = None
        self._saved: Mapping[str, Any] | None = None
        self._trainer: pl.Trainer | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forgets what an earlier run has left."""
        self._saved, self._trainer = None, trainer

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attaches the hook, which the strategy's model has to get before its first backward."""
        ddp_model = find_ddp(trainer.strategy.model, type(trainer.strategy).__name__, "Trainer(strategy='ddp')")
        if self.state is None or self._module is not pl_module:
            self.state, self._module = GatheredState(**self._options), pl_module
        grad_scale = self._options.get("grad_scale", _scale_of(trainer.precision_plugin))
        qcomm.attach(ddp_model, state=self.state, grad_scale=grad_scale)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Goes on from the checkpoint, which has been read by now."""
        saved, self._saved = self._saved, None
        if self.state is not None and saved is not None:
            self.state.load_state_dict(saved)
        elif trainer.ckpt_path and trainer.is_global_zero:
            warnings.warn(f"{trainer.ckpt_path} has no state of qcomm, so its residuals begin at zero", stacklevel=2)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Logs, if asked to."""
        interval = trainer.log_every_n_steps
        if self._log and self.state is not None and interval and trainer.global_step % interval == 0:
            stats = self.state.stats()
            for name in ("bits_per_element", "bytes_sent"):
                pl_module.log(f"qcomm/{name}", float(stats[name]), on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of all ranks on rank 0. A collective, as ``Trainer.save_checkpoint`` is."""
        if self.state is None:
            return {}
        if self._trainer is not None and self._trainer.interrupted:  # other ranks may not answer any more
            warnings.warn("a checkpoint that is saved after an exception has no residuals of qcomm", stacklevel=2)
            return {}
        return self.state.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states of all ranks until training starts."""
        self._saved = state_dict


def attach(fabric: Any, model: torch.nn.Module, **options: Any) -> GatheredState:
    """Compresses the gradients of a model that ``fabric.setup`` has returned. A collective, like ``qcomm.attach``.

    Args:
        fabric: a ``lightning.fabric.Fabric`` with the strategy DDP.
        model: what ``fabric.setup`` or ``fabric.setup_module`` has returned, compiled or not.
        **options: of :func:`qcomm.attach`. ``grad_scale`` is by default the scaler of ``precision``.

    Returns:
        The state. ``fabric.save(path, {"model": model, "hook": state})`` saves the residuals of every rank, and
        ``fabric.load`` with the same dictionary restores them.

    Raises:
        TypeError, ValueError: as of ``qcomm.attach``, and where the strategy has made no DDP model.

    Example:
        >>> from lightning.fabric import Fabric
        >>> fabric = Fabric(strategy="ddp", accelerator="cpu", devices=1)
        >>> attach(fabric, torch.nn.Linear(2, 2))
        Traceback (most recent call last):
            ...
        TypeError: qcomm compresses gradients of DistributedDataParallel, and DDPStrategy has wrapped Linear in none:
        gradients would travel uncompressed. For DDP: model = fabric.setup(model) with Fabric(strategy='ddp')
    """
    remedy = "model = fabric.setup(model) with Fabric(strategy='ddp')"
    ddp_model = find_ddp(model, type(fabric.strategy).__name__, remedy)
    grad_scale = options.pop("grad_scale", _scale_of(fabric.strategy.precision))
    state = GatheredState(**options)
    qcomm.attach(ddp_model, state=state, grad_scale=grad_scale)
    return state


def _scale_of(precision: object) -> Any:
    """Returns the function that reads the scale of a precision plugin; None where it scales nothing."""
    scaler = getattr(precision, "scaler", None)
    return None if scaler is None else scaler.get_scale
