"""The plain competitor of the same shape: two phases in int8, in torch operations, no entropy coding."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

BLOCK = 512  # values that share a scale


class Int8:
    """Two phases like qcomm's, over the same rounds of pairs, in torch operations: int8 and one scale for 512 values.

    The scale is the block's largest magnitude over 127. Every rank sends chunk r to rank r, which averages and sends
    the mean to all; error feedback and entropy coding it has none.
    """

    def __init__(self, elements: int) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.chunk_blocks = -(-elements // (BLOCK * self.world_size))

    def __call__(self, buffer: torch.Tensor) -> int:
        """The mean, and the bytes that this rank sent."""
        padded = torch.zeros(self.world_size * self.chunk_blocks, BLOCK)
        padded.view(-1)[: buffer.numel()] = buffer
        packets = self._encode(padded).view(self.world_size, -1)
        incoming, sent = self._exchange(list(packets))
        total = padded.view(self.world_size, self.chunk_blocks, BLOCK)[self.rank].clone()
        for sender, packet in enumerate(incoming):
            if sender != self.rank:
                total += self._decode(packet)
        mean = self._encode(total / self.world_size)
        means, sent_again = self._exchange([mean.view(-1)] * self.world_size)
        decoded = torch.cat([self._decode(packet) for packet in means])
        buffer.copy_(decoded.view(-1)[: buffer.numel()])
        return sent + sent_again

    def bound(self, values: torch.Tensor) -> torch.Tensor:
        """Most that each element may be off, rounding left out: half a step of every rank, half a step of the owner."""
        padded = torch.zeros(self.world_size * self.chunk_blocks, BLOCK)
        padded.view(-1)[: values.numel()] = values
        step = padded.abs().amax(1, keepdim=True) / 127
        largest = padded.abs().amax(1, keepdim=True)
        dist.all_reduce(step)
        dist.all_reduce(largest)
        # The mean's largest magnitude is at most the mean of the largest, and the first error.
        first = step / self.world_size / 2
        second = (largest / self.world_size + first) / 127 / 2
        return (first + second).expand_as(padded).reshape(-1)[: values.numel()]

    @staticmethod
    def _encode(blocks: torch.Tensor) -> torch.Tensor:
        """Rows of 4 bytes of scale and 512 int8 values."""
        scale = blocks.abs().amax(1, keepdim=True) / 127
        symbols = (blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
        return torch.cat([scale.view(torch.int8), symbols], 1)

    @staticmethod
    def _decode(packet: torch.Tensor) -> torch.Tensor:
        rows = packet.view(-1, 4 + BLOCK)
        return rows[:, 4:].to(torch.float32) * rows[:, :4].clone().view(torch.float32)

    def _exchange(self, outgoing: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], int]:
        """Packet r to rank r, in rounds: to rank + d while one comes from rank - d."""
        incoming = [torch.empty_like(packet) for packet in outgoing]
        incoming[self.rank] = outgoing[self.rank]
        for distance in range(1, self.world_size):
            target, source = (self.rank + distance) % self.world_size, (self.rank - distance) % self.world_size
            for work in (dist.irecv(incoming[source], source), dist.isend(outgoing[target], target)):
                work.wait()
        return incoming, (self.world_size - 1) * outgoing[0].nbytes
