// decode_lanes of csrc/cpu/kernels_avx512.cpp with bytes in the place of float32 values.
#include <immintrin.h>

#include <cstddef>
#include <type_traits>

#include "decode_to_bytes.h"
#include "qcomm/format.h"

namespace qcomm {
namespace {

#include "kernels_lanes.inl"
#include "kernels_loops.inl"
#include "registers_avx512.inl"
#include "values_avx512.inl"

#include "decode_lanes_avx512.inl"

struct ByteSink {
    std::uint8_t* out;

    QCOMM_INLINE void put(__m512i symbols) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi16_epi8(symbols));
        out += kLanes;
    }
    QCOMM_INLINE void put_rest(const std::uint16_t* symbols, int n) {
        for (int i = 0; i < n; ++i) out[i] = static_cast<std::uint8_t>(symbols[i]);
    }
};

}  // namespace

void decode_to_bytes_avx512(CodedBlock* blocks, int count, const LaneDecoding& how) {
    with_code(how.table->ranks, how.quantizer.num_bits, [&](const auto& code) {
        decode<false>(blocks, count, *how.table, code,
                      [](const CodedBlock& block) { return ByteSink{static_cast<std::uint8_t*>(block.values)}; });
    });
}

}  // namespace qcomm
