// The loops of zero runs for AVX-512. Included like kernels_loops.inl, behind registers_avx512.inl.

// Squares of 16 float32 values, added to their lanes in float64.
struct Squares16 {
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();

    QCOMM_INLINE void add(__m512 x) {
        // The product of two float32 values is exact in float64, so fused or not is the same.
        const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
        low = _mm512_fmadd_pd(a, a, low);
        high = _mm512_fmadd_pd(b, b, high);
    }
    void store(double* lanes) const {
        _mm512_storeu_pd(lanes, low);
        _mm512_storeu_pd(lanes + 8, high);
    }
};

// Levels of float32 values, 32 at a time: what is not 0 is compressed, so no branch depends on a value.
template <bool kScaled>
class LevelFinder {
public:
    LevelFinder(const float* data, const float* kept, float inv_scale, float step, int base, const LevelsOut* out)
        : data_(data),
          kept_(kept),
          residual_(out->residual),
          old_(out->old),
          positions_(out->positions),
          levels_(out->levels),
          scale_(_mm512_set1_ps(inv_scale)),
          step_(_mm512_set1_ps(step)),
          inv_(_mm512_set1_ps(1.0f / step)) {
        alignas(64) std::uint16_t first[kLanes];
        for (int j = 0; j < kLanes; ++j) first[j] = static_cast<std::uint16_t>(base + j);
        place_ = _mm512_load_si512(first);
    }

    // Processors fetch ahead up to the end of a page by themselves, so rows of the next page are asked for. `last` is
    // the last whole row behind data_.
    template <bool kSampled>
    QCOMM_INLINE void row(int i, std::int64_t last) {
        constexpr int kAhead = 1024;
        const std::int64_t ahead = i + kAhead < last ? i + kAhead : last;
        fetch_row<true>(data_ + ahead, kLanes * sizeof(float), 0);
        fetch_row<true>(kept_ + ahead, kLanes * sizeof(float), 0);
        const __m512i low = level16<kSampled, 0>(i), high = level16<kSampled, 1>(i + kLanes / 2);
        // Whole registers are stored. What lies in them behind the row's levels is overwritten by the next row.
        const auto mask = static_cast<__mmask32>(
            _mm512_kunpackw(_mm512_test_epi32_mask(high, high), _mm512_test_epi32_mask(low, low)));
        const __m256i bytes = _mm256_set_m128i(_mm512_cvtepi32_epi8(high), _mm512_cvtepi32_epi8(low));
        _mm512_storeu_si512(positions_ + found_, _mm512_maskz_compress_epi16(mask, place_));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(levels_ + found_), _mm256_maskz_compress_epi8(mask, bytes));
        found_ += __builtin_popcount(mask);
        place_ = _mm512_add_epi16(place_, _mm512_set1_epi16(kLanes));
    }
    void finish(LevelsOut* out, SampleLanes* lanes) {
        out->count = found_;
        out->finite = _mm512_reduce_add_ps(_mm512_add_ps(poison_[0], poison_[1])) == 0.0f;
        for (int half = 0; half < 2; ++half) {
            values_[half].store(lanes->values + 16 * half);
            residuals_[half].store(lanes->residuals + 16 * half);
        }
    }

private:
    template <bool kSampled, int kHalf>
    QCOMM_INLINE __m512i level16(int i) {
        __m512 value = _mm512_loadu_ps(data_ + i);
        if (kScaled) value = _mm512_mul_ps(value, scale_);
        const __m512 old = _mm512_loadu_ps(kept_ + i), u = _mm512_add_ps(value, old);
        const __m512 top = _mm512_set1_ps(kMaxLevel), bottom = _mm512_set1_ps(-kMaxLevel);
        // What lies beyond the largest level stays in the residual. Rounded to nearest even, which is the mode of the
        // process.
        const __m512 inside = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(u, inv_), bottom), top);
        const __m512i level = _mm512_cvtps_epi32(inside);
        const __m512 lost = _mm512_sub_ps(u, _mm512_mul_ps(_mm512_cvtepi32_ps(level), step_));
        _mm512_storeu_ps(old_ + i, old);
        _mm512_storeu_ps(residual_ + i, lost);
        // 0 times what is not finite is NaN, and a sum with NaN stays NaN: one check at the end is enough.
        poison_[kHalf] = _mm512_fmadd_ps(lost, _mm512_setzero_ps(), poison_[kHalf]);
        if (kSampled) {
            values_[kHalf].add(value);
            residuals_[kHalf].add(lost);
        }
        return level;
    }

    const float* data_;
    const float* kept_;
    // Copies, since stores of bytes might otherwise be taken to change them.
    float* residual_;
    float* old_;
    std::uint16_t* positions_;
    std::int8_t* levels_;
    __m512 scale_, step_, inv_;
    __m512i place_;
    __m512 poison_[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};  // NaN once a residual is not finite
    Squares16 values_[2], residuals_[2];
    int found_ = 0;
};

// The whole rows of n values.
template <bool kScaled>
void find_levels_of_floats(const float* data, const float* kept, float inv_scale, int n, std::int64_t last, float step,
                           int base, LevelsOut* out, SampleLanes* lanes) {
    LevelFinder<kScaled> finder(data, kept, inv_scale, step, base, out);
    const int rows = n / kLanes;
    for (int r = 0; r < rows;) {
        // One row of each group also adds to the sample, by a branch that is nearly always predicted.
        const int sampled = sampled_row(r / kSampledRows, n), end = r + kSampledRows < rows ? r + kSampledRows : rows;
        for (; r < end; ++r) {
            if (__builtin_expect(r == sampled, 0)) {
                finder.template row<true>(kLanes * r, last);
            } else {
                finder.template row<false>(kLanes * r, last);
            }
        }
    }
    finder.finish(out, lanes);
}

void find_levels(const Values& values, std::int64_t begin, int n, const Quantizer& quantizer, int base,
                 LevelsOut* out) {
    // Gradients are float32 and have a residual. Nothing else is worth a version of its own.
    if (values.dtype != DType::kFloat32 || values.residual == nullptr)
        return find_levels_scalar(values, begin, n, quantizer, base, out);
    SampleLanes lanes{};
    const int done = n / kLanes * kLanes;
    const auto* data = static_cast<const float*>(values.data) + begin;
    const auto find = values.inv_scale == 1.0 ? find_levels_of_floats<false> : find_levels_of_floats<true>;
    find(data, values.residual + begin, static_cast<float>(values.inv_scale), n, values.count - begin - kLanes,
         static_cast<float>(quantizer.p1), base, out, &lanes);
    find_levels_from<Traits<DType::kFloat32>>(values, begin, done, n, quantizer, base, out, &lanes);
    out->sample = fold_sample(lanes, n);
}

// Tokens of 16 levels at a time, looked up by run and level. A run that needs a skip is rare: its 16 go one by one.
std::uint32_t* put_all_tokens(const std::uint16_t* positions, const std::int8_t* levels, int count, const RunCode& code,
                              std::uint32_t* tokens) {
    constexpr int kWidth = 16;
    // The first run has no level before it. It counts from the begin of the block.
    tokens = put_tokens(positions, levels, 0, 1, 0, code, tokens);
    const __m512i one = _mm512_set1_epi32(1);
    int i = 1;
    for (; i + kWidth <= count; i += kWidth) {
        const auto load = [](const std::uint16_t* at) {
            return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        };
        const __m512i run = _mm512_sub_epi32(_mm512_sub_epi32(load(positions + i), load(positions + i - 1)), one);
        if (__builtin_expect(_mm512_cmpge_epi32_mask(run, _mm512_set1_epi32(kSkipZeros)) != 0, 0)) {
            tokens = put_tokens(positions, levels, i, i + kWidth, positions[i - 1] + 1, code, tokens);
            continue;
        }
        const __m512i level = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + i)));
        // As level_place().
        const __m512i above = _mm512_add_epi32(level, _mm512_set1_epi32(kMaxLevel));
        const __m512i place =
            _mm512_mask_sub_epi32(above, _mm512_cmpgt_epi32_mask(level, _mm512_setzero_si512()), above, one);
        _mm512_storeu_si512(tokens, gather(_mm512_add_epi32(_mm512_slli_epi32(run, 3), place), code.tokens, 4));
        tokens += kWidth;
    }
    if (i < count) tokens = put_tokens(positions, levels, i, count, positions[i - 1] + 1, code, tokens);
    return tokens;
}

// As encode() of encode_lanes_avx512.inl, but for tokens of up to 16 bits: a shift by 16 is one by 0 to a funnel shift,
// and raising lanes to 16 bits may fill others.
int encode_tokens(const std::uint32_t* tokens, int count, std::uint32_t* start, std::uint16_t* words_end) {
    EncodeLanes lanes;
    begin_lanes(lanes, words_end);
    int step = count / kLanes;
    if (const int live = count % kLanes) push_step(lanes, tokens + step * kLanes, live);
    const __m512i word = _mm512_set1_epi16(kWordBits), emit = _mm512_set1_epi16(kEmitBits);
    const __m512i bits[] = {_mm512_loadu_si512(lanes.bits), _mm512_loadu_si512(lanes.bits + 16)};
    __m512i low = low_words(bits[0], bits[1]), high = high_words(bits[0], bits[1]);
    __m512i held = low_words(_mm512_loadu_si512(lanes.count), _mm512_loadu_si512(lanes.count + 16));
    std::uint16_t* words = lanes.words;
    bool started = lanes.started;
    // From the last step to the first, so that a decoder reads forward.
    for (--step; step >= 0; --step) {
        const __m512i a = _mm512_loadu_si512(tokens + step * kLanes),
                      b = _mm512_loadu_si512(tokens + step * kLanes + 16);
        const __m512i code = low_words(a, b), length = high_words(a, b);
        __m512i sum = _mm512_add_epi16(held, length);
        __mmask32 full = _mm512_cmpge_epu16_mask(sum, emit);
        if (__builtin_expect(!started && full != 0, 0)) {
            started = true;
            held = _mm512_max_epu16(held, word);
            sum = _mm512_add_epi16(held, length);
            full = _mm512_cmpge_epu16_mask(sum, emit);
        }
        const __m512i highest = _mm512_shrdv_epi16(low, high, held);
        const auto written = static_cast<unsigned>(__builtin_popcount(full));
        words -= written;
        _mm512_mask_storeu_epi16(words, _bzhi_u32(0xFFFFFFFFu, written), _mm512_maskz_compress_epi16(full, highest));
        held = _mm512_mask_sub_epi16(sum, full, sum, word);
        const __mmask32 whole = _mm512_cmpeq_epi16_mask(length, word);
        high = _mm512_mask_mov_epi16(_mm512_shldv_epi16(high, low, length), whole, low);
        low = _mm512_or_si512(_mm512_sllv_epi16(low, length), code);
    }
    alignas(64) std::uint16_t low_of[kLanes], high_of[kLanes], held_of[kLanes];
    _mm512_store_si512(low_of, low);
    _mm512_store_si512(high_of, high);
    _mm512_store_si512(held_of, held);
    for (int j = 0; j < kLanes; ++j) {
        lanes.count[j] = held_of[j];
        lanes.bits[j] = (static_cast<std::uint32_t>(high_of[j]) << kWordBits | low_of[j]) & ((1u << held_of[j]) - 1u);
    }
    lanes.words = words;
    return finish_lanes(lanes, start, words_end);
}

int encode_runs(const std::uint16_t* positions, const std::int8_t* levels, int count, const RunCode& code,
                std::uint32_t* scratch, int* tokens, std::uint32_t* start, std::uint16_t* words_end) {
    *tokens = static_cast<int>(put_all_tokens(positions, levels, count, code, scratch) - scratch);
    return encode_tokens(scratch, *tokens, start, words_end);
}

// 16 lanes of 32 bits.
struct RunLanes {
    __m512i bits, count;
};

// Inclusive sums of 16 numbers: of neighbours 1, 2, 4 and 8 lanes below.
QCOMM_INLINE __m512i sums_of(__m512i v) {
    const __m512i zero = _mm512_setzero_si512();
    v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 15));
    v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 14));
    v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 12));
    return _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 8));
}

void decode_runs(RunBlock& block) {
    DecodeLanes lanes;
    block.count = 0;
    block.whole = begin_lanes(lanes, block);
    if (!block.whole) return;
    RunLanes halves[2];
    for (int h = 0; h < 2; ++h)
        halves[h] = {_mm512_loadu_si512(lanes.bits + 16 * h), _mm512_loadu_si512(lanes.count + 16 * h)};
    const __m512i window = _mm512_set1_epi32((1 << kMaxRunCodeLength) - 1), one = _mm512_set1_epi32(1);
    const __m512i word = _mm512_set1_epi32(kWordBits), has_level = _mm512_set1_epi32(static_cast<int>(kHasLevel));
    __m512i least = _mm512_setzero_si512();
    // The position behind the last level, in all lanes. Beyond the block it is only compared at the end: positions are
    // written to places that do not depend on it.
    __m512i next = _mm512_setzero_si512();
    int begin = 0, found = 0;
    bool last_has_level = false;
    for (; begin + kLanes <= block.tokens && lanes.left >= kLanes; begin += kLanes) {
        // Both halves first: two gathers that do not depend on each other hide each other's latency.
        __m512i entry[2];
        for (int h = 0; h < 2; ++h) entry[h] = gather(_mm512_and_si512(halves[h].bits, window), block.code->entries, 4);
        for (int h = 0; h < 2; ++h) {
            const __m512i e = entry[h];
            RunLanes& lane = halves[h];
            // zero_runs.h has the bits of an entry.
            const __m512i extra = _mm512_and_si512(_mm512_srli_epi32(e, 9), _mm512_set1_epi32(7));
            const __m512i code = _mm512_and_si512(_mm512_srli_epi32(e, 5), _mm512_set1_epi32(15));
            const __m512i more = _mm512_andnot_si512(_mm512_sllv_epi32(_mm512_set1_epi32(-1), extra),
                                                     _mm512_srlv_epi32(lane.bits, code));
            const __mmask16 leveled = _mm512_test_epi32_mask(e, has_level);
            __m512i step = _mm512_add_epi32(_mm512_and_si512(_mm512_srli_epi32(e, 12), _mm512_set1_epi32(1023)), more);
            step = _mm512_mask_add_epi32(step, leveled, step, one);
            const __m512i behind = _mm512_add_epi32(next, sums_of(step));
            next = _mm512_permutexvar_epi32(_mm512_set1_epi32(15), behind);
            // As level_at().
            const __m512i below = _mm512_sub_epi32(_mm512_and_si512(_mm512_srli_epi32(e, 22), _mm512_set1_epi32(7)),
                                                   _mm512_set1_epi32(kMaxLevel));
            const __m512i level =
                _mm512_mask_add_epi32(below, _mm512_cmpge_epi32_mask(below, _mm512_setzero_si512()), below, one);
            __m512i position = _mm512_sub_epi32(behind, one), value = level;
            if (__builtin_expect(leveled != 0xFFFF, 0)) {
                position = _mm512_maskz_compress_epi32(leveled, position);
                value = _mm512_maskz_compress_epi32(leveled, value);
            }
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(block.positions + found), _mm512_cvtepi32_epi16(position));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(block.levels + found), _mm512_cvtepi32_epi8(value));
            found += __builtin_popcount(leveled);
            last_has_level = (leveled & 0x8000) != 0;

            const __m512i length = _mm512_and_si512(e, _mm512_set1_epi32(31));
            lane.bits = _mm512_srlv_epi32(lane.bits, length);
            lane.count = _mm512_sub_epi32(lane.count, length);
            least = _mm512_min_epi32(least, lane.count);
        }
        for (RunLanes& lane : halves) {
            // Lanes that hold less than a word take one each, in the order of the lanes.
            const __mmask16 need = _mm512_cmplt_epi32_mask(lane.count, word);
            const __m512i taken = _mm512_maskz_expand_epi32(
                need, _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes.words))));
            lane.bits = _mm512_or_si512(lane.bits, _mm512_sllv_epi32(taken, lane.count));
            lane.count = _mm512_mask_add_epi32(lane.count, need, lane.count, word);
            const int used = __builtin_popcount(need);
            lanes.words += 2 * used;
            lanes.left -= used;
        }
    }
    for (int h = 0; h < 2; ++h) {
        _mm512_storeu_si512(lanes.bits + 16 * h, halves[h].bits);
        _mm512_storeu_si512(lanes.count + 16 * h, halves[h].count);
    }
    lanes.least = _mm512_reduce_min_epi32(least);
    block.count = found;
    const auto behind = static_cast<std::uint32_t>(_mm_cvtsi128_si32(_mm512_castsi512_si128(next)));
    decode_runs_rest(lanes, block, begin, behind, last_has_level);
}
