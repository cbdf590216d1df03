"""The state of the communication hook: its options, residuals and counters, kept over pickling and checkpoints."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import Unpack

from qcomm.codec import Grid, SigmaGrid
from qcomm.collectives import (
    ErrorFeedback,
    GradScale,
    ReduceKeywords,
    ReduceOptions,
    Telemetry,
    check_hook_options,
)
from qcomm.communicator import Group
from qcomm.ddp.buckets import BucketTable
from qcomm.ddp.checkpoint import StateDict, check, note_origin, restore, save
from qcomm.ddp.gradient_noise import GradientNoise
from qcomm.ddp.reducer import Reducer
from qcomm.ddp.warm_up import WarmUp

__all__ = ["CompressionState"]


class CompressionState:
    """Options, error feedback and counters of the hook. Each model has one on each rank.

    Every rank passes the same options except ``num_threads`` and the path of ``secret``. Where they differ, every rank
    gets a ConfigMismatchError that names the option, at the first bucket. DDP raises it as a RuntimeError with its
    text; ``exception()`` returns the object.

    Args:
        process_group: the group to average over; by default the model's with :func:`attach`, otherwise the default one.
            A :class:`qcomm.MpiGroup` sends the gradients over MPI.
        grid: of the quantization of gradients, ``SigmaGrid`` or ``RangeGrid``. Means are quantized once more, see
            ``mean_step``.
        error_feedback: keep the quantization error and add it to the next gradient: 4 bytes per parameter, and 4 / W
            for the means. It needs steps of at most 3.4, see docs/guide.md. A step that fails, or that GradScaler
            skips, loses at most its own gradient and that feedback.
        warmup_steps: number of initial steps whose gradients are exchanged uncompressed.
        warmup_step: a ``step`` for warm-up in place of uncompressed gradients: a SigmaGrid begins with it and coarsens
            towards its own step in four stages.
        exclude: patterns (``fnmatch``) of the names of parameters that travel uncompressed. They need :func:`attach`,
            which knows the names.
        grad_scale: the factor of the loss, with AMP: ``scaler.get_scale``, a 0-dim tensor, or a number. It is read
            once per step, with ``device_codec`` a tensor on a CUDA device without waiting for it. Error feedback is
            kept without the factor, so that a residual stays right when the scale changes.
        noise: a :class:`qcomm.GradientNoise` that measures the noise of the gradients, for ``stats()["noise"]``. Each
            rank may have one or not.
        **options: ``mean_step``, ``small_step``, ``min_elements``, ``strategy``, ``ranks_per_node``, ``link_rates``,
            ``num_threads``, ``profile``, ``verify``, ``secret``, ``connections`` and ``device_codec`` of
            :class:`qcomm.collectives.ReduceOptions`.
            ``stats()["strategies"]`` has the strategy that ``"auto"`` took for each bucket. A named strategy also runs
            in a world of one rank, where ``"auto"`` does nothing.

    Raises:
        TypeError, ValueError: naming the argument.
        OSError: the profile or the key file cannot be read.
        RuntimeError: the package that seals messages is missing.

    Example:
        >>> state = CompressionState(grid=SigmaGrid(step=2.0), exclude=["*.bias"], strategy="two_phase")
        >>> state.stats()["bytes_sent"]
        0
    """

    def __init__(
        self,
        process_group: Group | None = None,
        grid: Grid = SigmaGrid(step=1.0),
        error_feedback: bool = True,
        *,
        warmup_steps: int = 0,
        warmup_step: float | None = None,
        exclude: Sequence[str] = (),
        grad_scale: GradScale = None,
        noise: GradientNoise | None = None,
        **options: Unpack[ReduceKeywords],
    ) -> None:
        self.options = ReduceOptions(grid, **options)
        check_hook_options(error_feedback, exclude, grad_scale)
        if noise is not None and not isinstance(noise, GradientNoise):
            raise TypeError(f"noise must be a qcomm.GradientNoise or None, got {type(noise).__name__}")
        self._warm_up = WarmUp(warmup_steps, warmup_step)
        self._warm_up.check(self.options)
        if error_feedback:
            self.options.check_feedback()
        self.given_group = process_group
        self.telemetry = Telemetry()
        described = {
            "error_feedback": str(error_feedback),
            **self._warm_up.describe(),
            "exclude": str(list(exclude)),
        }
        self._table = BucketTable(self.options, described, exclude, self._warm_up, error_feedback)
        self._feedback = ErrorFeedback() if error_feedback else None
        self._noise = noise
        self.reducer = Reducer(
            self.options, self._warm_up, self._table, self._feedback, self.telemetry, grad_scale, noise
        )
        self.reducer.group = process_group

    @property
    def process_group(self) -> Group | None:
        """Returns the given group, otherwise the model's; None, for the default group, before :func:`attach`."""
        return self.reducer.group

    @property
    def grad_scale(self) -> GradScale:
        """Returns the factor of the gradients, see the class; it may be replaced between steps."""
        return self.reducer.grad_scale

    @grad_scale.setter
    def grad_scale(self, grad_scale: GradScale) -> None:
        self.reducer.grad_scale = grad_scale

    @property
    def error_feedback(self) -> ErrorFeedback | None:
        """Returns the residuals, which must not be used during backward; None where error feedback is off."""
        return self._feedback

    @property
    def noise(self) -> GradientNoise | None:
        """Returns what measures the gradients' noise; None where nobody asked for it."""
        return self._noise

    @property
    def warmup_steps(self) -> int:
        """Number of initial steps that differ, see the class; fixed."""
        return self._warm_up.steps

    @property
    def grid(self) -> Grid:
        """The grid of gradients; :meth:`reconfigure` changes it."""
        return self.options.grid

    @property
    def strategy(self) -> str:
        """The strategy of the mean; :meth:`reconfigure` changes it."""
        return self.options.strategy

    @property
    def num_threads(self) -> int:
        """Maximum number of threads of the codec; :meth:`reconfigure` changes it, on one rank or on several."""
        return self.options.num_threads

    def stats(self) -> dict[str, Any]:
        """Returns the counters of this rank since its start or since ``reset_stats``.

        Returns:
            ``steps``, ``buckets``, ``elements``, ``elements_compressed``;
            ``bytes_sent``, ``bytes_received``: all bytes handed to sends and receives, and the same by kind as
            ``..._phase1`` (values to the owners of chunks), ``..._phase2`` (means to all ranks), ``..._inside``
            (uncompressed values inside a node) and ``..._overhead`` (headers that announce sizes). An uncompressed
            all-reduce of the process group counts as a ring: 2 (W - 1) / W times the summed bytes;
            ``bytes_uncompressed``: of the gradients, once;
            ``bits_per_element``: of all elements, the mean of both phases (strategy all_gather has one), from all bytes
            of packets sent to owners, and of all means;
            ``bits_per_element_phase1``, ``bits_per_element_phase2`` and their mean ``bits_per_element_compressed``: the
            same for compressed parameters alone;
            ``encode_seconds``, ``decode_seconds`` and ``communication_seconds`` (waiting for slower ranks included) of
            the worker thread, and of all-reduces that bypass it (docs/collective.md), side by side where buckets are;
            ``wait_seconds``, from the last bucket's gradient to its mean;
            ``copy_seconds``, for which the worker thread waited for gradients on a device to be copied to the host;
            ``nonfinite_tensors``: number of times that a tensor held NaN or infinity;
            ``dropped_values``: number of values sent as zeros because a slot was full, and kept in the residuals (with
            ``device_codec`` only, where bytes sent and received are those of whole slots, seconds are not measured, and
            this call waits for the device);
            ``strategies``: for each bucket the strategy of its last mean;
            ``tensors``: for each compressed parameter the last ``grid``, ``coding``, ``num_bits`` and ``step``;
            ``residual_norm``: of the residuals;
            ``noise``: with the option of that name, a :class:`qcomm.NoiseEstimate` as a dictionary, of the whole
            gradient (``total``) and of each parameter (``tensors``).
        """
        self.reducer.flush()
        residual_norm = self._feedback.norm() if self._feedback is not None else 0.0
        noise = {} if self._noise is None else {"noise": self._noise.stats()}
        return {**self.telemetry.stats(), "residual_norm": residual_norm, **noise}

    def reset_stats(self) -> None:
        """Sets the counters to zero and forgets measured noise; error feedback and the number of steps stay."""
        self.reducer.flush()
        self.telemetry.reset()
        if self._noise is not None:
            self._noise.reset()

    def exception(self) -> Exception | None:
        """Returns the error that ended the last failed step, as an object; DDP raises its text."""
        return self.reducer.steps.failures.last.error

    def state_dict(self) -> dict[str, Any]:
        """Returns the state to resume this rank from: number of steps, residuals, and noise where it is measured.

        Every rank has to save its own state, between steps: in a file of its own with ``torch.save``, or as part of a
        checkpoint of ``torch.distributed.checkpoint``, which keeps the ranks' states apart (docs/guide.md).
        """
        return save(self.reducer.steps, self._table, self._feedback, self._noise)

    def load_state_dict(self, state_dict: StateDict | Sequence[StateDict]) -> None:
        """Resumes from a result of ``state_dict`` on this rank; the number of ranks may have changed.

        Args:
            state_dict: this rank's. When W ranks resume as fewer, W', rank r passes a list of those of ranks r, r + W',
                r + 2W', ... Its own alone also works, but loses part of the residuals. A new rank passes rank 0's with
                ``"error_feedback"`` set to None.

        Raises:
            ValueError: of another format, damaged, of another model, or not of one run; nothing has changed then. Ranks
                that resume from states of different runs, steps or numbers of ranks get a ConfigMismatchError in the
                next exchange.
        """
        restore(state_dict, self.reducer.steps, self._table, self._feedback, self._noise)

    def check_state_dict(self, state_dict: StateDict | Sequence[StateDict]) -> None:
        """Raises the errors that :meth:`load_state_dict` would raise, and changes nothing.

        With it ranks can agree that all have a state to resume from, before any of them does.
        """
        check(state_dict, self._table)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without the objects of this process: group, identities of parameters, ``grad_scale``.

        A copy of a ``grad_scale`` that is a function or a tensor would not follow the GradScaler.
        """
        warnings.warn(
            "a pickled CompressionState has no process group and no grad_scale that is not a number: "
            "attach(ddp_model, state=state, grad_scale=...) gives it both, and a copied DDP model its hook",
            stacklevel=2,
        )
        self.reducer.flush()
        # A copy of the reducer has no group either; a copied state must not share this one's.
        return {**self.__dict__, "given_group": None, "reducer": copy.copy(self.reducer)}

    def reconfigure(self, **changes: Any) -> None:
        """Changes options of the mean between two steps, on every rank alike; ``num_threads`` on any rank.

        Args:
            **changes: ``grid`` and the options that :class:`qcomm.collectives.ReduceOptions` has.

        Raises:
            TypeError, ValueError: naming the option; nothing has changed then.

        Example:
            >>> state = CompressionState(strategy="two_phase")
            >>> state.reconfigure(grid=SigmaGrid(step=2.0))
            >>> state.options.grid.step
            2.0
        """
        options = replace(self.options, **changes)
        self._warm_up.check(options)
        if self._feedback is not None:
            options.check_feedback()
        self.options = options
        self._table.reconfigure(self.options)
        self.reducer.reconfigure(self.options)

    def bind(self, model: torch.nn.Module, process_group: Group) -> None:
        """Learns the names of a model's parameters and its process group.

        Raises:
            ValueError: another model uses this state, or its residuals do not fit the model; nothing has changed then.
        """
        if self._feedback is not None:
            self._feedback.check_fits({name: parameter.numel() for name, parameter in model.named_parameters()})
        self._table.bind(model)
        note_origin(self.reducer.steps, self._table, self._feedback)
        self.reducer.group = self.given_group or process_group
        self.reducer.forget_agreements()
