// AVX-512 with VBMI, VBMI2 and GFNI (Ice Lake, Zen 4 and later): a step is 32 lanes of 16 bits, and one compress or
// expand instruction packs or unpacks a step's words. The parts are files of their own, since together they are too
// long to read; each needs those before it.
#include <immintrin.h>

#include <cstddef>
#include <type_traits>

#include "kernels.h"
#include "qcomm/format.h"

namespace qcomm {
namespace avx512 {
namespace {

#include "kernels_lanes.inl"
#include "kernels_loops.inl"
#include "kernels_zero_runs.inl"

#include "registers_avx512.inl"

#include "encode_lanes_avx512.inl"

#include "values_avx512.inl"

#include "decode_lanes_avx512.inl"

#include "zero_runs_avx512.inl"

}  // namespace
}  // namespace avx512

const Kernels kAvx512Kernels = {
    "avx512",
    avx512::load,
    avx512::measure,
    avx512::quantize,
    avx512::find_symbol,
    avx512::scan,
    avx512::quantize_counted,
    avx512::quantize_residual,
    avx512::update_residual,
    avx512::dequantize,
    avx512::encode_lanes,
    avx512::decode_lanes,
    avx512::find_levels,
    avx512::encode_runs,
    avx512::decode_runs,
    avx512::checksum,
    avx512::divide_to_bfloat,
};

}  // namespace qcomm
