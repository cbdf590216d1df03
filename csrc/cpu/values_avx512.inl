// Symbols to float32 values in registers, and where they go. Included like kernels_loops.inl. Each class computes
// exactly the operations of its grid's decode(), in their order, since every version must give the same bits.

// Values of 16 symbols, as SigmaQuantizer<float>::decode() computes them; 0 for an escape.
class SigmaValues {
public:
    explicit SigmaValues(const SigmaQuantizer<float>& grid)
        : step_(_mm512_set1_ps(grid.step())),
          radius_(_mm512_set1_epi32(grid.radius())),
          escape_(_mm512_set1_epi32(static_cast<int>(grid.escape()))) {}

    QCOMM_INLINE __m512 operator()(__m512i symbol) const {
        return _mm512_maskz_mul_ps(_mm512_cmpneq_epi32_mask(symbol, escape_),
                                   _mm512_cvtepi32_ps(_mm512_sub_epi32(symbol, radius_)), step_);
    }

private:
    __m512 step_;
    __m512i radius_, escape_;
};

// The same of RangeQuantizer::decode(): a fused multiply-add in float64, in halves of 8. Where there is no endpoint
// level `top` is a symbol that does not occur.
class RangeValues {
public:
    explicit RangeValues(const RangeQuantizer& grid)
        : lo_(_mm512_set1_pd(grid.lo())),
          step_(_mm512_set1_pd(grid.step())),
          offset_(_mm512_set1_ps(static_cast<float>(grid.offset()))),
          hi_(_mm512_set1_ps(static_cast<float>(grid.hi()))),
          top_(_mm512_set1_epi32(grid.offset() == 0.0 ? static_cast<int>(grid.top()) : -1)) {}

    QCOMM_INLINE __m512 operator()(__m512i symbol) const {
        const __m512 level = _mm512_add_ps(_mm512_cvtepi32_ps(symbol), offset_);  // exact: at most 17 bits
        const __m256 low = value(_mm512_castps512_ps256(level)), high = value(_mm512_extractf32x8_ps(level, 1));
        return _mm512_mask_mov_ps(_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1),
                                  _mm512_cmpeq_epi32_mask(symbol, top_), hi_);
    }

private:
    QCOMM_INLINE __m256 value(__m256 level) const {
        return _mm512_cvtpd_ps(_mm512_fmadd_pd(_mm512_cvtps_pd(level), step_, lo_));
    }

    __m512d lo_, step_;
    __m512 offset_, hi_;
    __m512i top_;
};

// Values of an alphabet of at most 64 symbols in registers, for a grid whose arithmetic takes longer.
class TabledValues {
public:
    static constexpr int kMaxSymbols = 64;

    explicit TabledValues(const RangeQuantizer& grid) {
        float values[kMaxSymbols];
        for (std::uint32_t s = 0; s < kMaxSymbols; ++s) values[s] = static_cast<float>(grid.decode(s));
        for (int i = 0; i < 4; ++i) values_[i] = _mm512_loadu_ps(values + 16 * i);
    }

    QCOMM_INLINE __m512 operator()(__m512i symbol) const {
        const __mmask16 bit5 = _mm512_test_epi32_mask(symbol, _mm512_set1_epi32(32));
        return _mm512_mask_mov_ps(_mm512_permutex2var_ps(values_[0], symbol, values_[1]), bit5,
                                  _mm512_permutex2var_ps(values_[2], symbol, values_[3]));
    }

private:
    __m512 values_[4];
};

// For symbols alone.
struct NoSink {
    QCOMM_INLINE void put(__m512i) {}
    QCOMM_INLINE void put_rest(const std::uint16_t*, int) {}
};

// Turns symbols into values while they are in registers: memory is written while the next ones are decoded. An
// accumulated value is added in the same pass, which saves reading it again.
template <class Values, bool kAccumulates>
struct FloatSink {
    const Values* values;
    const LaneDecoding* how;
    float* out;

    QCOMM_INLINE void put(__m512i symbols) {
        put16((*values)(lower_half(symbols)), out);
        put16((*values)(upper_half(symbols)), out + 16);
        out += kLanes;
    }
    static QCOMM_INLINE void put16(__m512 value, float* at) {
        _mm512_storeu_ps(at, kAccumulates ? _mm512_add_ps(_mm512_loadu_ps(at), value) : value);
    }
    // The last, short step: its symbols are in memory.
    QCOMM_INLINE void put_rest(const std::uint16_t* symbols, int n) {
        dequantize(symbols, n, how->quantizer, how->dtype, out, kAccumulates);
    }
};

// 32 symbols are compared at once, and the positions of those that match compressed to the front.
int find_symbol(const std::uint16_t* symbols, int n, int symbol, std::uint16_t* positions) {
    const __m512i wanted = _mm512_set1_epi16(static_cast<short>(symbol));
    alignas(64) std::uint16_t first[kLanes];
    for (int i = 0; i < kLanes; ++i) first[i] = static_cast<std::uint16_t>(i);
    const __m512i lanes = _mm512_load_si512(first);
    int count = 0;
    for (int i = 0; i < n; i += kLanes) {
        const __mmask32 present = _bzhi_u32(0xFFFFFFFFu, n - i < kLanes ? static_cast<unsigned>(n - i) : kLanes);
        const __mmask32 found =
            _mm512_mask_cmpeq_epi16_mask(present, _mm512_maskz_loadu_epi16(present, symbols + i), wanted);
        if (found == 0) continue;
        const __m512i at = _mm512_add_epi16(lanes, _mm512_set1_epi16(static_cast<short>(i)));
        _mm512_storeu_si512(positions + count, _mm512_maskz_compress_epi16(found, at));
        count += __builtin_popcount(found);
    }
    return count;
}
