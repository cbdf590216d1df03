"""The reference codec, an executable version of docs/format.md in slow, obvious code; and that of gradient noise.

The native core must agree with the codec bit for bit. Training does not use it: it exists to be read, and to be
compared with.
"""

from qcomm.reference.choice import nearest_table, range_segment, sigma_code, sigma_segment
from qcomm.reference.codes import canonical_codes, code_lengths, pack_lengths, unpack_lengths
from qcomm.reference.decode import decode_packet
from qcomm.reference.gradient_noise import noise_figures, tail_index, two_batch_figures
from qcomm.reference.grids import (
    dequantize,
    entropy,
    equilibrium_step,
    log2_fixed,
    quantize,
    range_num_bits,
    sample_indices,
    sigma_num_bits,
    sum_squares,
)
from qcomm.reference.lanes import decode_lanes, encode_lanes
from qcomm.reference.packet import ReferenceSegment, checksum, encode_packet

__all__ = [
    "ReferenceSegment",
    "canonical_codes",
    "checksum",
    "code_lengths",
    "decode_lanes",
    "decode_packet",
    "dequantize",
    "encode_lanes",
    "encode_packet",
    "entropy",
    "equilibrium_step",
    "log2_fixed",
    "nearest_table",
    "noise_figures",
    "pack_lengths",
    "quantize",
    "range_num_bits",
    "range_segment",
    "sample_indices",
    "sigma_code",
    "sigma_num_bits",
    "sigma_segment",
    "sum_squares",
    "tail_index",
    "two_batch_figures",
    "unpack_lengths",
]
