"""``broadcast_parameters``: one rank's weights to all ranks, compressed."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist

from qcomm.codec import CPU, Grid, RangeGrid
from qcomm.collectives import ReduceOptions, announce_late, no_bytes, refuse_early
from qcomm.communicator import (
    Communicator,
    Fault,
    Fields,
    Phase,
    attempt,
    check_connections,
    deal,
    get_ranks,
    resolve_group,
)
from qcomm.errors import PacketError
from qcomm.local_sgd.parameters import BUFFER, Params, check_writable, described, named_tensors
from qcomm.state_dicts import pack_state, packed_size_limit, unpack_state
from qcomm.transport import ConnectionOptions, KeyFile

__all__ = ["broadcast_parameters"]

Tensors = Sequence[tuple[str, torch.Tensor]]


def broadcast_parameters(
    module_or_params: torch.nn.Module | Params,
    src: int = 0,
    process_group: dist.ProcessGroup | None = None,
    grid: Grid = RangeGrid(),
    *,
    min_elements: int = 1024,
    lossless: bool = False,
    num_threads: int = 1,
    secret: KeyFile | Path | str | None = None,
) -> None:
    """Replaces every rank's weights by those of rank ``src``, in place. All ranks end with the same bits.

    A collective. Rank ``src`` takes the decoded values, too. Its own weights change by the quantization error, half a
    level at most. The packed weights travel in W parts, one to each rank, which sends it to all others. ``src``
    therefore sends them twice, and not W - 1 times.

    Args:
        module_or_params: a module, all of whose parameters and buffers are sent; or ``model.parameters()``,
            ``model.named_parameters()`` or ``optimizer.param_groups``. The same names, shapes and dtypes on all ranks.
        src: the global rank that has the weights.
        process_group: by default the default group; ``src`` belongs to it.
        grid: of the quantization. Buffers, integers, non-finite tensors and those of fewer than ``min_elements``
            elements travel uncompressed.
        min_elements: smallest number of elements of a tensor that is compressed.
        lossless: compress nothing.
        num_threads: maximum number of threads that encode and decode a tensor on this rank.
        secret: a key file that seals the messages, see :class:`qcomm.collectives.ReduceOptions`.

    Raises:
        ValueError: ``src`` does not belong to the group, or ``secret`` is no key file.
        OSError: the key file cannot be read.
        CollectiveError: a rank failed, for instance because its arguments cannot be sent. Nothing has changed on any
            rank, unless only decoding failed, on that rank.
        ConfigMismatchError: arguments or tensors differ between ranks; nothing has changed.

    Example:
        >>> import tempfile
        >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
        >>> broadcast_parameters(torch.nn.Linear(64, 64), src=0)
        >>> dist.destroy_process_group()
    """
    group = resolve_group(process_group)
    ranks = get_ranks(group)
    if src not in ranks:
        raise ValueError(f"src must be one of the group's ranks {ranks}, got {src!r}")
    key_file, unread = attempt(Phase.PREPARE, KeyFile.of, secret)
    if len(ranks) == 1:
        if unread is not None:
            raise unread.error
        return
    if unread is not None:
        refuse_early(unread, group, secret)
    communicator = deal(group, ConnectionOptions(key_file))
    tensors: Tensors = []
    packed, fields, fault = no_bytes(), Fields({}), None
    try:
        check_connections(group, ConnectionOptions(key_file))
        ReduceOptions(grid, min_elements=min_elements, num_threads=num_threads)  # checks them
        if not _is(lossless, bool):
            raise TypeError(f"lossless must be a bool, got {type(lossless).__name__}")
        tensors = _tensors(module_or_params)
        fields = _fields(tensors, src, grid, min_elements, lossless)
        if ranks[communicator.rank] == src:
            kept = ("*",) if lossless else (f"{BUFFER}*",)
            packed = pack_state(dict(tensors), grid, min_elements, kept, num_threads)
    except Exception as error:  # noqa: BLE001 - any: the other ranks are already waiting for this one
        fault = Fault(Phase.PREPARE, error)

    def job() -> dict[str, torch.Tensor]:
        received = _spread(packed, packed_size_limit(tensors), ranks.index(src), communicator, fields, fault)
        restored, failure = attempt(Phase.DECODE, _unpacked, received, tensors, num_threads)
        if failure is not None or restored is None:
            announce_late(failure or Fault(Phase.DECODE, PacketError("nothing was received")), communicator)
        return restored

    restored = communicator.submit(job, alone=False).result()
    with torch.no_grad():
        for name, tensor in tensors:
            tensor.copy_(restored[name])


def _is(value: object, kind: type) -> bool:
    # Callers may pass other types than the annotated ones; ``save`` takes patterns under the same name.
    return isinstance(value, kind)


def _tensors(module_or_params: torch.nn.Module | Params) -> Tensors:
    if isinstance(module_or_params, torch.nn.Module):
        buffers = [(f"{BUFFER}{name}", buffer) for name, buffer in module_or_params.named_buffers()]
        tensors = [*module_or_params.named_parameters(), *buffers]
    else:
        tensors = named_tensors(module_or_params)
    for name, tensor in tensors:
        check_writable(name, tensor)
    return tensors


def _fields(tensors: Tensors, src: int, grid: Grid, min_elements: int, lossless: bool) -> Fields:
    listing = described(tensors)
    digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
    return Fields(
        {
            "operation": "broadcast_parameters",
            "src": str(src),
            "grid": grid.describe(),
            "min_elements": str(min_elements),
            "lossless": str(lossless),
            "tensors": f"{len(tensors)} (digest {digest}): {listing}",
        }
    )


def _spread(
    packed: torch.Tensor, limit: int, source: int, communicator: Communicator, fields: Fields, fault: Fault | None
) -> torch.Tensor:
    """Returns the bytes of rank ``source`` of the group on every rank, by a scatter and an all-gather."""
    own, world_size = communicator.rank, communicator.world_size
    fault = communicator.begin() or fault
    limits = [limit if rank == source else 0 for rank in range(world_size)]
    handshake = communicator.handshake(Phase.ENCODE, fields, [packed.numel()] * world_size, limits, fault)
    size = handshake.finish().sizes[source]
    whole = packed if own == source else torch.empty(size, dtype=torch.uint8, device=CPU)
    cuts = [size * part // world_size for part in range(world_size + 1)]
    parts = [whole[begin:end] for begin, end in pairwise(cuts)]
    nothing = [no_bytes()] * world_size
    incoming = list(nothing)
    if own != source:
        incoming[source] = parts[own]
    communicator.exchange(parts if own == source else nothing, incoming, Phase.ENCODE)
    outgoing = [no_bytes() if rank == source else parts[own] for rank in range(world_size)]
    communicator.exchange(outgoing, nothing if own == source else parts, Phase.ENCODE)
    return whole


def _unpacked(received: torch.Tensor, tensors: Tensors, num_threads: int) -> dict[str, torch.Tensor]:
    """Returns the tensors in ``received``, after checking their names, shapes and dtypes."""
    restored = unpack_state(received, sum(tensor.nbytes for _, tensor in tensors), num_threads)
    if not isinstance(restored, dict) or list(restored) != [name for name, _ in tensors]:
        raise PacketError("the packed weights have other names than the ranks agreed on")
    for name, tensor in tensors:
        found = restored[name]
        if not isinstance(found, torch.Tensor) or found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise PacketError(f"{name!r} was not sent in the shape and dtype that the ranks agreed on")
    return restored
