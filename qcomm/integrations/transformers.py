"""The Trainer of transformers: a callback that attaches the hook when training begins.

Events of a Trainer show callbacks the bare model, and neither the DDP model around it nor the checkpoint to resume
from. The callback therefore keeps the Trainer, and notes the argument of its ``train``.
"""

import functools
import warnings
from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel

import qcomm
from qcomm.codec import Grid, SigmaGrid
from qcomm.ddp import CompressionState
from qcomm.integrations import rank_files
from qcomm.integrations.ddp_models import find_ddp

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as missing:
    raise ImportError(
        f"qcomm.integrations.transformers needs transformers: pip install 'qcomm[transformers]' ({missing})"
    ) from None

__all__ = ["QcommTrainerCallback"]


class QcommTrainerCallback(TrainerCallback):
    """Compresses the gradients of a Trainer that runs with DDP.

    Every rank writes its residuals into a file ``qcomm_0_rank_<rank>_of_<ranks>.pt`` in each checkpoint that can be
    resumed from, and ``trainer.train(resume_from_checkpoint=...)`` reads them, also on another number of ranks.

    Args:
        trainer: to which the callback is added: ``trainer.add_callback(QcommTrainerCallback(trainer))``.
        grid: of the gradients. The default optimizer of a Trainer is AdamW, for which a step of 0.5 is advised.
        **options: of :class:`qcomm.CompressionState`. ``grad_scale`` is by default the scaler of ``fp16=True``.

    Attributes:
        state: the hook's state, once training has begun; None before.

    Warns:
        UserWarning: when it resumes from a checkpoint without files of qcomm, so that residuals begin at zero.

    Raises:
        TypeError, ValueError: naming the option; in ``train`` a TypeError if the Trainer has made no DDP model.

    Example:
        >>> import tempfile
        >>> import torch
        >>> trainer = Trainer(torch.nn.Linear(2, 2), TrainingArguments(tempfile.mkdtemp(), use_cpu=True))
        >>> trainer.add_callback(QcommTrainerCallback(trainer, grid=SigmaGrid(step=0.5)))
    """

    def __init__(self, trainer: Trainer, grid: Grid = SigmaGrid(step=1.0), **options: Any) -> None:
        self._options = {"grid": grid, **options}
        CompressionState(**self._options)  # checks them
        self.state: CompressionState | None = None
        self._trainer = trainer
        self._ddp_model: DistributedDataParallel | None = None
        self._resume_from: str | bool | None = None
        self._note_argument_of_train(trainer)

    def _note_argument_of_train(self, trainer: Trainer) -> None:
        train = trainer.train

        @functools.wraps(train)
        def noting(resume_from_checkpoint: str | bool | None = None, *arguments: Any, **keywords: Any) -> Any:
            self._resume_from = resume_from_checkpoint
            return train(resume_from_checkpoint, *arguments, **keywords)

        trainer.train = noting

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Attaches the hook to the DDP model, unless an earlier ``train`` did, and goes on from the checkpoint."""
        accelerator = self._trainer.accelerator
        kind = str(accelerator.distributed_type.value)
        ddp_model = find_ddp(self._trainer.model_wrapped, kind, "torchrun --nproc_per_node=2 train.py")
        if self.state is None or ddp_model is not self._ddp_model:
            options = dict(self._options)
            if accelerator.scaler is not None:
                options.setdefault("grad_scale", accelerator.scaler.get_scale)
            self.state, self._ddp_model = qcomm.attach(ddp_model, **options), ddp_model
        folder = get_last_checkpoint(args.output_dir) if self._resume_from is True else self._resume_from
        if folder and not rank_files.load(folder, self.state):
            warnings.warn(f"{folder} has no state of qcomm, so its residuals begin at zero", stacklevel=2)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Adds this rank's residuals to a checkpoint that can be resumed from."""
        if self.state is None or args.save_only_model or state.is_hyper_param_search:
            return
        rank_files.save(Path(args.output_dir, f"checkpoint-{state.global_step}"), self.state)
