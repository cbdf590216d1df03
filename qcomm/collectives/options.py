"""Options of the mean over all ranks: documented once, checked once, and described for the comparison between ranks."""

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypedDict

from qcomm.codec import Grid, RangeGrid, SigmaGrid, check_num_threads
from qcomm.collectives.cost_model import Profile
from qcomm.collectives.error_feedback import check_equilibrium
from qcomm.collectives.layout import TensorSpec, merge_small
from qcomm.collectives.owner_shares import checked_link_rates, owner_shares
from qcomm.transport import AUTO, MOST_CONNECTIONS, ConnectionOptions, KeyFile

__all__ = ["STRATEGIES", "VERIFY", "ReduceKeywords", "ReduceOptions", "with_step"]

STRATEGIES = ("auto", "none", "bf16", "exact_sum", "all_gather", "hierarchical", "two_phase")
VERIFY = ("off", "interval", "step")
# Their packets have checksums, and every rank decodes the same ones. In the others, values are added on the way.
CHECKED_ON_ARRIVAL = ("two_phase", "all_gather")
# Up to this step the mean is at most as coarse as its RMS. Beyond it, bytes count more than the mean's noise.
FINE_STEP = 2.0
# Of the step for small tensors in that of the others. They are few bytes, and their noise is what hurts Adam's first
# steps.
SMALL_SHARE = 4


class ReduceKeywords(TypedDict, total=False):
    """Keyword arguments that become :class:`ReduceOptions`; ``grid`` is an argument of its own everywhere."""

    mean_step: float | None
    small_step: float | None
    min_elements: int
    strategy: str
    ranks_per_node: int | None
    link_rates: Sequence[float] | None
    num_threads: int
    profile: Profile | Path | str | None
    verify: str
    secret: KeyFile | Path | str | None
    connections: int | str | None
    device_codec: bool


@dataclass(frozen=True)
class ReduceOptions:
    """The way in which a mean over all ranks is computed.

    All ranks pass the same, except ``num_threads`` and the path of ``secret``.

    Args:
        grid: :class:`qcomm.SigmaGrid` or :class:`qcomm.RangeGrid`: how finely each rank's values are quantized.
        mean_step: ``step`` of the SigmaGrid for means, which ``"two_phase"`` and ``"hierarchical"`` quantize once more.
            By default it is at most 1 for a grid with ``step`` up to 2, and for a coarser grid equal to its ``step``.
            A RangeGrid takes None and serves both.
        small_step: ``step`` of the SigmaGrid for tensors with fewer than ``min_elements`` elements, at most a quarter
            of the ``step`` of ``grid``. The hook and DiLoCo with error feedback quantize all small tensors of a bucket
            or fragment as one; their means, too. With None they travel uncompressed, as they do with a RangeGrid and
            everywhere else.
        min_elements: tensors with fewer elements are small: they take ``small_step`` or travel uncompressed, in the
            same packets; ``"bf16"`` rounds them, too.
        strategy: ``"two_phase"`` compresses the values and their means. ``"all_gather"`` compresses the values alone,
            for few ranks or small tensors. ``"exact_sum"`` rounds the values to one grid of all ranks and loses nothing
            more. ``"none"`` is an uncompressed all-reduce, and ``"bf16"`` one of float32 values rounded to bfloat16.
            ``"hierarchical"`` adds uncompressed values inside a node and compresses between nodes. ``"auto"`` tries the
            strategies that may be fast during the first collectives of each size and keeps the fastest. One that
            compresses is kept only if it is a quarter faster than those that do not. From time to time ``"auto"`` looks
            again. With ``device_codec`` CUDA tensors have ``"two_phase"``, ``"none"`` and ``"bf16"``.
        ranks_per_node: for ``"hierarchical"``: ranks 0 to ``ranks_per_node - 1`` of the group are one node, and so on;
            any divisor of the number of ranks. By default the environment variable LOCAL_WORLD_SIZE, which launchers
            set.
        link_rates: what the link of each rank carries, in any unit, where links differ: a number for each rank of the
            group, as :func:`qcomm.measure_link_rates` measures them. Of three ranks and more, those with slow links
            then own less of each buffer in ``"two_phase"`` and ``"exact_sum"``, and send and receive less. Links that
            differ by less than a quarter are taken for equal. Not with ``"hierarchical"`` or ``device_codec``.
        num_threads: maximum number of threads that encode and decode on this rank. Results do not depend on it.
        profile: for ``"auto"``: the machine as ``qcomm bench --save-profile`` measured it, or the path of that file.
            Only the strategies that may be fast there are tried, and the uncompressed ones.
        verify: how soon ranks notice that their means differ, for instance because a bit was flipped beyond TCP's
            checksum: a DivergenceError then names bucket, step and ranks. With ``"interval"`` means of strategies that
            add values on the way are compared at the next handshake: within four collectives, or 31 steps where the
            hook runs uncompressed. Compressed packets have checksums. ``"step"`` compares all means before they are
            used, which takes another exchange of headers, and checks the sums of ``"none"`` and ``"bf16"`` against
            those of all ranks' values. ``"off"`` compares none. CUDA tensors with ``device_codec`` are not compared.
        secret: the path of a key file. Every message of this library is then encrypted and authenticated, and only
            ranks with a copy of that file take part, see docs/secure.md. It is a property of the group's connections:
            all uses of a group pass the same. Nothing bypasses the handshake then, and ``device_codec`` is refused. It
            needs the extra ``qcomm[secure]``.
        connections: TCP connections to each other rank, of each channel, at most 64; every message is cut
            into a part for each. More than one carry more over a long path that loses packets, where a single one is
            slow however fast the link is. With ``"auto"`` the ranks measure a round trip when they connect, and take
            more than one where it is 20 ms or longer and TCP's congestion control is not BBR, see docs/collective.md.
            A property of the group's connections, as ``secret`` is. By default those that the group has, otherwise
            one. Sums of uncompressed values take one.
        device_codec: compress CUDA tensors on the device and exchange them over NCCL, which needs a build with the
            kernels and a group with NCCL. By default tensors on a device are copied to host memory, averaged there like
            those of the CPU, and copied back.

    Raises:
        TypeError, ValueError: naming the option, the value and the values that are allowed.
        OSError: the profile or the key file cannot be read.
        RuntimeError: the package that seals messages is missing.

    Example:
        >>> ReduceOptions(SigmaGrid(step=2.0), strategy="two_phase").describe()["strategy"]
        'two_phase'
        >>> ReduceOptions(min_elements=-1)
        Traceback (most recent call last):
            ...
        ValueError: min_elements must be >= 0, got -1
    """

    grid: Grid = SigmaGrid(step=1.0)
    _: KW_ONLY
    mean_step: float | None = None
    small_step: float | None = 0.5
    min_elements: int = 1024
    strategy: str = "auto"
    ranks_per_node: int | None = None
    link_rates: Sequence[float] | None = None
    num_threads: int = 1
    profile: Profile | Path | str | None = None
    verify: str = "interval"
    secret: KeyFile | Path | str | None = None
    connections: int | str | None = None
    device_codec: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.grid, (SigmaGrid, RangeGrid)):
            raise TypeError(f"grid must be a qcomm.SigmaGrid or qcomm.RangeGrid, got {type(self.grid).__name__}")
        _mean_grid(self.grid, self.mean_step)
        _small_grid(self.grid, self.small_step)
        _check_int("min_elements", self.min_elements, 0)
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {STRATEGIES}, got {self.strategy!r}")
        if self.ranks_per_node is not None:
            if isinstance(self.ranks_per_node, bool) or not isinstance(self.ranks_per_node, int):
                raise TypeError(f"ranks_per_node must be an int or None, got {type(self.ranks_per_node).__name__}")
            if self.ranks_per_node < 1:
                raise ValueError(f"ranks_per_node must be at least 1, got {self.ranks_per_node}")
        object.__setattr__(self, "link_rates", checked_link_rates(self.link_rates))
        for reason, excludes in (
            ("strategy 'hierarchical'", self.strategy == "hierarchical"),
            ("device_codec", self.device_codec),
        ):
            if excludes and self.link_rates is not None:
                raise ValueError(f"link_rates must be None with {reason}, got {self.link_rates}")
        if self.verify not in VERIFY:
            raise ValueError(f"verify must be one of {VERIFY}, got {self.verify!r}")
        if not isinstance(self.device_codec, bool):
            raise TypeError(f"device_codec must be a bool, got {type(self.device_codec).__name__}")
        _check_connections(self.connections)
        check_num_threads(self.num_threads)
        object.__setattr__(self, "profile", _read_profile(self.profile, self.strategy))
        object.__setattr__(self, "secret", KeyFile.of(self.secret))

    @property
    def machine(self) -> Profile | None:
        """Returns the profile, read from its file; None for any machine."""
        if isinstance(self.profile, (str, Path)):
            raise TypeError("a profile is read when the options are made")
        return self.profile

    @cached_property
    def key_file(self) -> KeyFile | None:
        """Returns the file of the secret; None where messages are not sealed."""
        return KeyFile.of(self.secret)

    @cached_property
    def connection_options(self) -> ConnectionOptions:
        """Returns how the ranks that compute the mean are connected."""
        return ConnectionOptions(self.key_file, self.connections)

    @property
    def node_size(self) -> int:
        """Returns the number of ranks that form a node, of options for a world; 1 where nodes do not count."""
        return self.ranks_per_node or 1

    @cached_property
    def owner_shares(self) -> tuple[float, ...] | None:
        """Returns how much of a buffer each rank owns, of options for a world; None for equal parts."""
        return None if self.link_rates is None else owner_shares(self.link_rates)

    @cached_property
    def mean_grid(self) -> Grid:
        """Returns the grid of means.

        Example:
            >>> [ReduceOptions(SigmaGrid(step=step)).mean_grid.step for step in (0.5, 2.0, 3.2)]
            [0.5, 1.0, 3.2]
            >>> ReduceOptions(SigmaGrid(step=2.0), mean_step=2.0).mean_grid.step
            2.0
        """
        return _mean_grid(self.grid, self.mean_step)

    @cached_property
    def small_grid(self) -> Grid | None:
        """Returns the grid of merged small tensors and of their means, None where they travel uncompressed.

        Example:
            >>> [ReduceOptions(SigmaGrid(step=step)).small_grid.step for step in (1.0, 3.2)]
            [0.25, 0.5]
        """
        return _small_grid(self.grid, self.small_step)

    @cached_property
    def value_grids(self) -> tuple[Grid, Grid]:
        """Returns the grids of values: of a tensor by itself, and of merged small ones."""
        return self.grid, self.small_grid or self.grid

    @cached_property
    def mean_grids(self) -> tuple[Grid, Grid]:
        """Returns the grids of means: of a tensor by itself, and of merged small ones."""
        return self.mean_grid, self.small_grid or self.mean_grid

    def grid_of(self, tensor: TensorSpec) -> Grid:
        """Returns the grid of a tensor's values."""
        return self.value_grids[bool(tensor.members)]

    def mean_grid_of(self, tensor: TensorSpec) -> Grid:
        """Returns the grid of a tensor's means."""
        return self.mean_grids[bool(tensor.members)]

    def check_feedback(self) -> None:
        """Checks that error feedback comes to rest on the grids of both phases.

        Raises:
            ValueError: naming the option: residuals would grow from step to step.

        Example:
            >>> ReduceOptions(SigmaGrid(step=4.0)).check_feedback()  # doctest: +ELLIPSIS
            Traceback (most recent call last):
                ...
            ValueError: step must be at most 3.4 with error feedback, got 4.0: from ...
        """
        check_equilibrium(self.grid, "step")
        if isinstance(self.grid, SigmaGrid):
            check_equilibrium(self.mean_grid, "mean_step")
        if self.small_grid is not None:
            check_equilibrium(self.small_grid, "small_step")

    @cached_property
    def compresses(self) -> bool:
        """Returns whether the strategy is a named one that never exchanges all values uncompressed."""
        return self.strategy not in ("auto", "none", "bf16")

    @cached_property
    def verified(self) -> Sequence[str]:
        """Returns the strategies whose means are compared.

        Example:
            >>> "none" in ReduceOptions().verified, "two_phase" in ReduceOptions().verified
            (True, False)
        """
        if self.verify == "interval":
            return [strategy for strategy in STRATEGIES if strategy not in CHECKED_ON_ARRIVAL]
        return STRATEGIES if self.verify == "step" else ()

    def is_compressed(self, elements: int) -> bool:
        """Returns whether a tensor of ``elements`` elements is compressed."""
        return elements >= max(self.min_elements, 1)

    def merge_small(self, tensors: Sequence[TensorSpec]) -> list[TensorSpec]:
        """Returns the tensors of a bucket for a mean with error feedback: small ones that may be rounded are merged.

        Example:
            >>> tensors = [TensorSpec("bias", 0, 10, False, may_round=True), TensorSpec("weight", 10, 2000, True)]
            >>> [(tensor.key, tensor.compressed) for tensor in ReduceOptions().merge_small(tensors)]
            [('weight', True), ('small tensors', True)]
        """
        if self.small_grid is None:
            return list(tensors)
        return merge_small(tensors, lambda tensor: not tensor.compressed and tensor.may_round and tensor.numel > 0)

    def for_world(self, world_size: int) -> "ReduceOptions":
        """Returns these options for a number of ranks: ``ranks_per_node`` is resolved, and it and others are checked.

        Raises:
            ValueError: ``ranks_per_node`` does not divide the number of ranks, or the launcher has not set it;
                ``link_rates`` are of another number of ranks.

        Example:
            >>> ReduceOptions(strategy="hierarchical", ranks_per_node=2).for_world(6).node_size
            2
        """
        if self.link_rates is not None and len(self.link_rates) != world_size:
            raise ValueError(f"link_rates must be of {world_size} ranks, got {len(self.link_rates)}")
        return replace(self, ranks_per_node=_resolve_ranks_per_node(self.ranks_per_node, world_size, self.strategy))

    def describe(self) -> dict[str, str]:
        """Returns the options of the mean that have to be equal on all ranks, as text."""
        return {
            "grid": self.grid.describe(),
            "mean_step": str(self.mean_step),
            "small_step": str(self.small_step),
            "min_elements": str(self.min_elements),
            "strategy": self.strategy,
            "ranks_per_node": str(self.ranks_per_node),
            "link_rates": str(self.link_rates),
            "profile": "None" if self.machine is None else self.machine.describe(),
            "verify": self.verify,
            "device_codec": str(self.device_codec),
        }


def with_step(name: str, step: object, grid: SigmaGrid) -> SigmaGrid:
    """Returns a grid with another step, which is the value of option ``name``.

    Raises:
        TypeError, ValueError: naming the option.

    Example:
        >>> with_step("mean_step", 2, SigmaGrid(step=1.0)).step
        2.0
    """
    if isinstance(step, bool) or not isinstance(step, (int, float)):
        raise TypeError(f"{name} must be a real number or None, got {type(step).__name__}")
    try:
        return replace(grid, step=float(step))
    except ValueError as error:
        raise ValueError(f"{name} must be a step of the grid: {error}") from error


def _mean_grid(grid: Grid, mean_step: float | None) -> Grid:
    if isinstance(grid, RangeGrid):
        if mean_step is not None:
            raise ValueError(f"mean_step must be None with a RangeGrid, which serves means as well, got {mean_step!r}")
        return grid
    if mean_step is None:
        return replace(grid, step=min(grid.step, 1.0)) if grid.step <= FINE_STEP else grid
    return with_step("mean_step", mean_step, grid)


def _small_grid(grid: Grid, small_step: float | None) -> Grid | None:
    if small_step is None:
        return None
    small = with_step("small_step", small_step, SigmaGrid())
    return replace(small, step=min(small.step, grid.step / SMALL_SHARE)) if isinstance(grid, SigmaGrid) else None


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be >= {least}, got {value}")


def _check_connections(connections: object) -> None:
    if connections is None or connections == AUTO:
        return
    allowed = f"'{AUTO}' or an int from 1 to {MOST_CONNECTIONS}"
    if isinstance(connections, bool) or not isinstance(connections, (int, str)):
        raise TypeError(f"connections must be {allowed}, got {type(connections).__name__}")
    if isinstance(connections, str) or not 1 <= connections <= MOST_CONNECTIONS:
        raise ValueError(f"connections must be {allowed}, got {connections!r}")


def _read_profile(profile: object, strategy: str) -> Profile | None:
    if profile is None:
        return None
    if strategy != "auto":
        raise ValueError(f"profile must be given with strategy 'auto', which chooses by it, got strategy {strategy!r}")
    if isinstance(profile, (str, Path)):
        return Profile.load(profile)
    if not isinstance(profile, Profile):
        raise TypeError(f"profile must be a qcomm.collectives.Profile or its file, got {type(profile).__name__}")
    return profile


def _resolve_ranks_per_node(ranks_per_node: int | None, world_size: int, strategy: str) -> int:
    source = "ranks_per_node"
    if ranks_per_node is None:
        if strategy != "hierarchical":
            return 1
        source, text = "LOCAL_WORLD_SIZE, and so ranks_per_node,", os.environ.get("LOCAL_WORLD_SIZE", "")
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(
                "ranks_per_node must be given for strategy 'hierarchical', because the launcher did not set "
                f"LOCAL_WORLD_SIZE (it is {text!r})"
            )
        ranks_per_node = int(text)
    if world_size % ranks_per_node:
        raise ValueError(f"{source} must divide the number of ranks, {world_size}, got {ranks_per_node}")
    return ranks_per_node
