#pragma once

#include "kernels.h"

namespace qcomm {

// Kernels::decode_lanes for symbols of at most 8 bits, each of them a byte in `values`.
void decode_to_bytes_avx512(CodedBlock* blocks, int count, const LaneDecoding& how);

}  // namespace qcomm
