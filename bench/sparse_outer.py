"""The sparse rival of DiLoCo: the largest of the accumulated movements, as indices and values of two bits.

After Sarfi et al., "Communication Efficient LLM Pre-training with SparseLoCo" (https://arxiv.org/abs/2508.15706): the
accumulated movement decays, and takes the place of the outer momentum. Every rank gets the packets of all others.
"""

import torch
import torch.distributed as dist
from torch import nn

CHUNK = 4096  # values among which the largest are taken
KEPT = 64  # of a chunk: 1.56 %
INDEX_BITS, VALUE_BITS, SCALE_BITS = 12, 2, 2 * 32
DECAY = 0.95  # of what has not been sent, in each exchange


class SparseOuter:
    """Moves a model every ``period`` steps, with the interface of ``qcomm.DiLoCo`` as far as the bench needs it.

    A kept value is sent as its sign and one of two magnitudes, the means of the larger and the smaller half of the
    chunk's kept values. Bits are counted by that layout; the tensors themselves travel as they are, in fp32.

    Args:
        model: of the same weights on all ranks.
        period: steps from one exchange to the next.
        rate: of the outer step.
    """

    def __init__(self, model: nn.Module, period: int, rate: float = 1.0) -> None:
        self._parameters, self._period, self._rate = list(model.parameters()), period, rate
        self._anchor = nn.utils.parameters_to_vector(self._parameters).detach().clone()
        self._left = torch.zeros_like(self._anchor)
        self._step = self._exchanges = 0

    def step(self) -> None:
        """Counts a step of the inner optimizer; a collective when an exchange is due."""
        self._step += 1
        if self._step % self._period == 0:
            self._exchange()

    def finish(self) -> None:
        """Exchanges the movement of steps after the last exchange. A collective."""
        if self._step % self._period:
            self._exchange()

    def stats(self) -> dict[str, float]:
        """Returns the bytes that the exchanges of this rank take, sent once and received from all others."""
        chunks = -(-self._anchor.numel() // CHUNK)
        packet = chunks * (KEPT * (INDEX_BITS + VALUE_BITS) + SCALE_BITS) / 8
        sent = packet * self._exchanges
        return {"bytes_sent": sent, "bytes_received": sent * (dist.get_world_size() - 1), "steps": self._exchanges}

    @torch.no_grad()
    def _exchange(self) -> None:
        self._exchanges += 1
        self._left *= DECAY
        self._left += self._anchor - nn.utils.parameters_to_vector(self._parameters)
        movement = sparse(self._left)
        self._left -= movement
        dist.all_reduce(movement)
        self._anchor -= self._rate / dist.get_world_size() * movement
        nn.utils.vector_to_parameters(self._anchor.clone(), self._parameters)


def sparse(values: torch.Tensor) -> torch.Tensor:
    """Returns what arrives of a vector: 64 values of each 4096, with two magnitudes; all others are 0.

    Example:
        >>> values = torch.zeros(4096)
        >>> values[:64] = torch.cat([torch.full((32,), 4.0), torch.full((32,), -2.0)])
        >>> bool((sparse(values) == values).all()), int(sparse(torch.randn(5000)).count_nonzero())
        (True, 128)
    """
    padded = torch.zeros(-(-values.numel() // CHUNK), CHUNK, dtype=values.dtype, device=values.device)
    padded.view(-1)[: values.numel()] = values
    largest = padded.abs().topk(KEPT, dim=1)  # sorted: the larger half comes first
    halves = largest.values.view(-1, 2, KEPT // 2).mean(dim=2, keepdim=True)
    magnitudes = halves.expand(-1, 2, KEPT // 2).reshape(-1, KEPT)
    arrived = torch.zeros_like(padded).scatter_(1, largest.indices, magnitudes)
    return (arrived * padded.sign()).view(-1)[: values.numel()]
