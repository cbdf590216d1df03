"""Error feedback: the loss of compression is kept as a residual and sent later.

With error feedback a rank sends ``Q(u)``, ``u = g + e``, and keeps ``e = u - Q(u)``. The owner of a chunk does the
same with the mean and its owner residual ``o``. So nothing is lost for good:
``sum_t out_t = sum_t mean(g_t) - (mean_i(e_i) + o)``.

Rounding to nearest spreads ``e`` evenly over one step s of the grid, so its mean square is ``s^2 / 12`` whatever the
gradient is. A step of k times the RMS of u therefore comes to rest at ``s = k g / sqrt(1 - k^2 / 12)`` for gradients of
RMS g. From ``k = sqrt(12)`` on there is no such s: step and residual grow for ever.

F. Seide et al., "1-bit stochastic gradient descent", Interspeech 2014; in both directions: H. Tang et al.,
"DoubleSqueeze", ICML 2019.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch

from qcomm.codec import CPU, Grid, SigmaGrid
from qcomm.collectives.layout import BucketLayout, Piece, TensorSpec
from qcomm.collectives.saved_residuals import FORMAT, check_fit, check_saved

__all__ = ["MAX_FEEDBACK_STEP", "ErrorFeedback", "check_equilibrium"]

# Below sqrt(12), where a step has 18 times the gradient's RMS: a little more and it has 30, then 70.
MAX_FEEDBACK_STEP = 3.4


class Residuals(NamedTuple):
    """Residuals of one collective, by the number of their tensor in the layout.

    Attributes:
        local: of each compressed tensor, whole.
        owner: of the pieces whose means this rank makes.
        spent: tensors whose local residual is known to be zero in that piece.
        local_rms, owner_rms: forecasts of value plus residual, see :mod:`qcomm.collectives.packing`.
    """

    local: Mapping[int, torch.Tensor]
    owner: Mapping[int, torch.Tensor]
    spent: Set[int]
    local_rms: Mapping[int, float] = {}
    owner_rms: Mapping[int, float] = {}


NO_RESIDUALS = Residuals({}, {}, frozenset())


def check_equilibrium(grid: Grid, name: str) -> None:
    """Checks that the residuals of error feedback stay bounded on a grid.

    Args:
        grid: of values or of means.
        name: of the option that the message is about.

    Raises:
        ValueError: naming the option, and a value that is allowed.

    Example:
        >>> check_equilibrium(SigmaGrid(step=3.4), "step")
    """
    if isinstance(grid, SigmaGrid):
        if grid.step > MAX_FEEDBACK_STEP:
            raise ValueError(
                f"{name} must be at most {MAX_FEEDBACK_STEP:g} with error feedback, got {grid.step}: from sqrt(12) = "
                f"3.46 on residuals grow for ever; take {name}={MAX_FEEDBACK_STEP:g}, or error_feedback=False"
            )
    elif grid.reconstruction == "endpoint" and grid.max_num_bits == 1:
        # The residual is as wide as the levels' distance, which is all of value plus residual: both grow together.
        raise ValueError(
            "grid must have more than one bit with error feedback and reconstruction 'endpoint', otherwise residuals "
            "grow for ever; take num_bits=2, reconstruction='center', or error_feedback=False"
        )


class ErrorFeedback:
    """Residuals of one rank, in float32 and in the units of the unscaled gradient.

    Residuals belong to parameters, by name, and not to buckets, which DDP rearranges. Owner residuals belong to a part
    of a parameter, which depends on the bucket and the number of ranks. That part changes when DDP rebuilds its
    buckets, the world is resized or training resumes. The owner then adds ``world_size * o`` to its local residual, so
    the next mean contains ``o`` without communication. When the number of ranks changes from W to W', local residuals
    are multiplied by W'/W, because they will be divided by W'.

    A gradient or mean that is zero throughout is sent as zero, and its residual is kept for the next time. The sum
    above still holds. Nothing is lost where DDP discards the mean because no rank used the parameter.

    The object is used by the thread that runs the collectives. Read it (``state_dict``) only between steps.

    Example:
        >>> feedback = ErrorFeedback()
        >>> feedback.local("conv1.weight", 3)
        tensor([0., 0., 0.])
    """

    def __init__(self) -> None:
        self._local: dict[str, torch.Tensor] = {}
        self._owner: dict[
            str, tuple[int, torch.Tensor]
        ] = {}  # parameter -> (first element of the own part, residual of the part)
        self._world_size: int | None = None
        self._spent: dict[str, tuple[int, int]] = {}  # parameter -> (first element, how many): known to be zero
        # Forecasts by parameter; they hold as long as no one else changes its residual.
        self._local_rms: dict[str, float] = {}
        self._owner_rms: dict[str, float] = {}
        # Residuals of merged tensors, with the views of them that are in the tables above.
        self._joined: dict[tuple[str, ...], tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without views, which a copy would not keep."""
        local = {key: _whole(residual) for key, residual in self._local.items()}
        owner = {key: (start, _whole(residual)) for key, (start, residual) in self._owner.items()}
        return {**self.__dict__, "_local": local, "_owner": owner, "_joined": {}}

    def local(self, key: str, numel: int, device: torch.device = CPU) -> torch.Tensor:
        """Returns the rank's own residual of a parameter, to be changed in place.

        The residual is 1-D float32, initially zero, on ``device``.

        Raises:
            ValueError: the known residual has another size, because the checkpoint is of another model.
        """
        self._spent.pop(key, None)  # the caller may change it
        self._local_rms.pop(key, None)
        residual = self._local.get(key)
        if residual is None:
            residual = self._local[key] = torch.zeros(numel, dtype=torch.float32, device=device)
        elif residual.device != device:  # a checkpoint's
            residual = self._local[key] = residual.to(device)
        if residual.numel() != numel:
            raise ValueError(
                f"residual of {key!r} has {residual.numel()} elements, the parameter {numel}: another model?"
            )
        return residual

    def owner(self, key: str, start: int, length: int, device: torch.device = CPU) -> torch.Tensor:
        """Returns the owner residual of elements [start, start + length) of a parameter, in the layout adopted last."""
        self._owner_rms.pop(key, None)  # the caller may change it
        known = self._owner.get(key)
        if known is None:
            known = self._owner[key] = start, torch.zeros(length, dtype=torch.float32, device=device)
        elif known[1].device != device:
            known = self._owner[key] = known[0], known[1].to(device)
        if known[0] != start or known[1].numel() != length:
            raise ValueError(
                f"owner residual of {key!r} begins at {known[0]} and has {known[1].numel()} elements, "
                f"not {start} and {length}; adopt the layout first"
            )
        return known[1]

    def local_of(self, tensor: TensorSpec, device: torch.device = CPU) -> torch.Tensor:
        """Returns the rank's own residual of a tensor of a layout, to be changed in place; see :meth:`local`.

        Example:
            >>> members = TensorSpec("a", 0, 1, True), TensorSpec("b", 9, 2, True)
            >>> feedback = ErrorFeedback()
            >>> _ = feedback.local_of(TensorSpec("small", 0, 3, True, members=members)).fill_(1.0)
            >>> feedback.local("b", 2)
            tensor([1., 1.])
        """
        if not tensor.members:
            return self.local(tensor.key, tensor.numel, device)
        parts = [self.local(member.key, member.numel, device) for member in tensor.members]
        names = tuple(member.key for member in tensor.members)
        joined, views = self._join(("local", *names), parts)
        self._local.update(zip(names, views, strict=True))
        return joined

    def owner_of(self, tensor: TensorSpec, start: int, length: int, device: torch.device = CPU) -> torch.Tensor:
        """Returns the owner residual of elements [start, start + length) of a tensor of a layout; see :meth:`owner`."""
        if not tensor.members:
            return self.owner(tensor.key, start, length, device)
        covered = tensor.parts(start, length)
        parts = [self.owner(key, first, count, device) for key, first, count in covered]
        joined, views = self._join(("owner", *(key for key, _, _ in covered)), parts)
        self._owner.update((key, (first, view)) for (key, first, _), view in zip(covered, views, strict=True))
        return joined

    def _join(self, names: tuple[str, ...], parts: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns one tensor of the values of ``parts``, and views of it in their place.

        It is the known one if ``parts`` are its views, otherwise a copy.
        """
        known = self._joined.get(names)
        if known is None or not all(view is part for view, part in zip(known[1], parts, strict=True)):
            joined = torch.cat(parts)
            known = self._joined[names] = joined, list(joined.split([part.numel() for part in parts]))
        return known

    def for_two_phase(self, layout: BucketLayout, rank: int, averages: bool = True) -> "Residuals":
        """Adopts a layout and returns all residuals that its collective uses on ``rank``, to be changed in place.

        Without ``averages`` no means are quantized, and there are no owner residuals.
        """
        self.adopt(layout, rank if averages else None)
        pieces = layout.chunks[rank].pieces
        numbers = [number for number, tensor in enumerate(layout.tensors) if tensor.compressed]
        keys = {number: layout.tensors[number].key for number in numbers}
        spent = {p.tensor for p in pieces if self.is_spent(keys[p.tensor], p.start, p.length)}
        local_rms = {number: rms for number, key in keys.items() if (rms := self._local_rms.get(key)) is not None}
        owner_rms = {number: rms for number, key in keys.items() if (rms := self._owner_rms.get(key)) is not None}
        local = {number: self.local_of(layout.tensors[number]) for number in numbers}
        owned = pieces if averages else ()
        owner = {p.tensor: self.owner_of(layout.tensors[p.tensor], p.start, p.length) for p in owned}
        return Residuals(local, owner, spent, local_rms, owner_rms)

    def forecast(self, local: Mapping[str, float], owner: Mapping[str, float]) -> None:
        """Notes the forecast RMS of value plus residual of parameters, and of the means of their own parts."""
        self._local_rms.update(local)
        self._owner_rms.update(owner)

    def spend(self, pieces: Iterable[tuple[str, Piece]]) -> None:
        """Notes that pieces of local residuals are zero, until a caller may change them.

        An owner adds its values to the mean of its own part unquantized, so no residual is left there in any step.

        Args:
            pieces: each with the name of its parameter.
        """
        self._spent.update((key, (piece.start, piece.length)) for key, piece in pieces)

    def is_spent(self, key: str, start: int, length: int) -> bool:
        """Returns whether elements [start, start + length) of a local residual are known to be zero."""
        return self._spent.get(key) == (start, length)

    def keeps(self, key: str) -> bool:
        """Returns whether anything of a parameter is still to be sent."""
        return key in self._local

    def take(self, key: str, numel: int, device: torch.device = CPU) -> torch.Tensor:
        """Returns all that this rank keeps of a parameter, and sets it to zero.

        The result is 1-D float32, for a collective that sends it whole. The share of an owner is not averaged over
        ranks, so it counts W times.
        """
        if key in self._owner:
            self._move_to_local(key)
        residual = self.local(key, numel, device)
        del self._local[key]
        return residual

    def adopt(self, layout: BucketLayout, chunk: int | None) -> None:
        """Prepares for a collective with this layout: moves owner residuals whose part changed into the local ones.

        Args:
            layout: of the buffer.
            chunk: number of the chunk whose mean this rank quantizes; None if it quantizes no mean.
        """
        if self._world_size != layout.world_size:
            self._resize(layout.world_size)
        parts = {} if chunk is None else layout.owned_parts[chunk]
        for tensor in layout.parameters:
            known = self._owner.get(tensor.key)
            if known is not None and tensor.compressed and parts.get(tensor.key) != (known[0], known[1].numel()):
                self._move_to_local(tensor.key)

    def _move_to_local(self, key: str) -> None:
        start, residual = self._owner.pop(key)
        for known in (self._spent, self._local_rms, self._owner_rms):
            known.pop(key, None)
        local = self._local[key]
        local[start : start + residual.numel()].add_(residual.to(local.device), alpha=float(self._world_size or 1))

    def _resize(self, world_size: int) -> None:
        if self._world_size is not None:
            for key in list(self._owner):
                self._move_to_local(key)
            for residual in self._local.values():
                residual.mul_(world_size / self._world_size)
            self._local_rms.clear()
        self._world_size = world_size

    def norm(self) -> float:
        """Returns the Euclidean norm of the local residuals, which are still to be sent."""
        # In an order of its own: which bucket comes first on its channel differs from run to run.
        squares = [self._local[key].double().square().sum() for key in sorted(self._local)]
        if not squares:
            return 0.0
        # Some residuals of a checkpoint that was just loaded may not have reached their device.
        return float(torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt())

    @property
    def world_size(self) -> int | None:
        """Returns the number of ranks whose mean the residuals are for; None before the first exchange."""
        return self._world_size

    def clear(self, world_size: int | None = None) -> None:
        """Forgets all residuals; ``world_size``: the number of ranks that those of other ranks are still for."""
        self._world_size = world_size
        for known in (self._local, self._owner, self._spent, self._local_rms, self._owner_rms, self._joined):
            known.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of this rank's residuals, and the number of ranks they are for. Every rank saves its own."""
        return {
            "format": FORMAT,
            "world_size": self._world_size,
            "local": {key: residual.clone() for key, residual in sorted(self._local.items())},
            "owner": {key: (start, residual.clone()) for key, (start, residual) in sorted(self._owner.items())},
            "rms": {"local": dict(sorted(self._local_rms.items())), "owner": dict(sorted(self._owner_rms.items()))},
        }

    def load_state_dict(
        self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]], sizes: Mapping[str, int] | None = None
    ) -> None:
        """Continues from saved residuals, also with another number of ranks.

        Args:
            state: the state that this rank saved. When W ranks continue as fewer, W', rank r passes a list: its own
                state and those of ranks r + W', r + 2W', .... Their residuals are added up and nothing is lost. Without
                them their share is forgotten, which costs about one step's quantization error. A new rank loads nothing
                and starts from zero. The others' residuals are rescaled so that the mean keeps them.
            sizes: number of elements of each parameter that may have a residual; by default they are not checked.

        Raises:
            ValueError: the state has another format, is damaged, belongs to another model, or was saved with different
                numbers of ranks; nothing has changed then.
        """
        states = [state] if isinstance(state, Mapping) else list(state)
        if not states:
            raise ValueError("state must hold at least one saved dictionary")
        for saved in states:
            check_saved(saved, sizes)
            if saved["world_size"] != states[0]["world_size"]:
                raise ValueError(
                    f"state was saved by {states[0]['world_size']} and by {saved['world_size']} ranks; "
                    "all parts must be of one run"
                )
        merged = _added([_restored(saved) for saved in states])
        self._spent.clear()
        self._local_rms, self._owner_rms = merged._local_rms, merged._owner_rms
        self._local, self._owner, self._world_size = merged._local, merged._owner, merged._world_size

    def check_fits(self, sizes: Mapping[str, int]) -> None:
        """Raises ValueError, naming the residual, unless ``sizes`` has each one's number of elements by its name."""
        check_fit({key: residual.numel() for key, residual in self._local.items()}, sizes)


def _restored(saved: Mapping[str, Any]) -> ErrorFeedback:
    """Returns the residuals of one rank, in memory of their own."""
    part = ErrorFeedback()
    part._world_size = saved["world_size"]
    part._local = {key: residual.detach().clone() for key, residual in saved["local"].items()}
    part._owner = {key: (start, residual.detach().clone()) for key, (start, residual) in saved["owner"].items()}
    part.forecast(saved["rms"]["local"], saved["rms"]["owner"])
    return part


def _added(parts: Sequence[ErrorFeedback]) -> ErrorFeedback:
    """Returns the sum of several ranks' residuals, with all of them in the local ones.

    Raises:
        ValueError: they have different numbers of elements.
    """
    merged = parts[0]
    if len(parts) > 1:  # residuals of several owners cannot be told apart any more
        for part in parts:
            for key in list(part._owner):
                part._move_to_local(key)
        for part in parts[1:]:
            for key, residual in part._local.items():
                merged.local(key, residual.numel(), residual.device).add_(residual)
    return merged


def _whole(residual: torch.Tensor) -> torch.Tensor:
    """Returns the residual, in memory of its own."""
    return residual if residual.untyped_storage().nbytes() == residual.nbytes else residual.clone()
