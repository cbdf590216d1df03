"""Layouts of buckets that tests share."""

from qcomm.collectives.layout import TensorSpec


def specs(sizes):
    """Tensors one after another; (numel, compressed) each."""
    offset, tensors = 0, []
    for number, (numel, compressed) in enumerate(sizes):
        tensors.append(TensorSpec(f"t{number}", offset, numel, compressed))
        offset += numel
    return tensors
