"""A sum over all ranks by messages around a ring, for transports that have no all-reduce.

The buffer is cut in W chunks. First each chunk goes once around, from rank c - 1 down to rank c, and every rank adds
its values. Then the sums go around the same way. Each rank sends ``2 (W - 1) / W`` of the buffer in total::

    chunk c    x(c-1) + x(c-2) + ... + x(c+1) + x(c)        rank numbers modulo W, one rounding for each addition

gloo's all-reduce has the same order and the same chunks, so an uncompressed mean has the same bits over every
transport. The sum needs no arithmetic of the transport: MPI knows neither float16 nor bfloat16.

P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 69, 2009.
"""

import itertools

import torch

from qcomm.transport.base import Transport

__all__ = ["ring_sum"]

# gloo cuts a chunk in segments no larger than this, at least two, all of one size.
GLOO_SEGMENT_BYTES = 1 << 20


def ring_sum(transport: Transport, buffer: torch.Tensor, what: str) -> None:
    """Replaces ``buffer`` by its sum over all ranks, the same bits on all.

    Args:
        transport: carries the messages.
        buffer: 1-D and contiguous, of the same size and dtype on all ranks.
        what: for the error message: "waiting for ...".

    Raises:
        TransportError: a peer is gone; the buffer holds sums of some ranks then.
    """
    world_size, rank = transport.world_size, transport.rank
    if world_size == 1:
        return
    chunks = _cut(buffer, world_size)
    # Messages are received into scratch memory: after a timeout nothing may write to the caller's buffer.
    scratch = torch.empty(chunks[0].numel(), dtype=buffer.dtype, device="cpu")
    for step in range(2 * (world_size - 1)):
        sent, received = chunks[(rank + 1 + step) % world_size], chunks[(rank + 2 + step) % world_size]
        incoming = scratch[: received.numel()]
        transfers = []
        if received.numel():
            transfers.append(transport.start_receive((rank + 1) % world_size, incoming, step))
        if sent.numel():
            transfers.append(transport.start_send((rank - 1) % world_size, sent, step))
        transport.finish(transfers, what)
        if step < world_size - 1:
            received.add_(incoming)
        else:
            received.copy_(incoming)


def _cut(buffer: torch.Tensor, world_size: int) -> list[torch.Tensor]:
    """Returns the chunks, the first of which is the largest; the last ones may be short or empty.

    Example:
        >>> [chunk.numel() for chunk in _cut(torch.zeros(10), 3)]
        [4, 4, 2]
    """
    wanted = max(-(-buffer.nbytes // GLOO_SEGMENT_BYTES), 2 * world_size)
    segments = -(-wanted // world_size)  # in a chunk
    # The bytes of a segment are rounded up to whole elements.
    elements = segments * -(-buffer.numel() // (segments * world_size))
    bounds = [min(chunk * elements, buffer.numel()) for chunk in range(world_size + 1)]
    return [buffer[start:end] for start, end in itertools.pairwise(bounds)]
