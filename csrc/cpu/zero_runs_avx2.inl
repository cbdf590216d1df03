// The loops of zero runs for AVX2. Included like kernels_loops.inl, behind encode_lanes_avx2.inl.

// ---- Finding levels ------------------------------------------------------------------------------------------------

// 32 levels as bytes, in order.
QCOMM_INLINE __m256i narrow8(const __m256i (&levels)[kGroups]) {
    const __m256i packed =
        _mm256_packs_epi16(_mm256_packs_epi32(levels[0], levels[1]), _mm256_packs_epi32(levels[2], levels[3]));
    return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

// Appends those of 8 levels that are in the mask, the first of which is value `first`; returns their number. All 8 are
// stored: the next ones overwrite those that do not count.
QCOMM_INLINE int keep_levels(__m128i of, unsigned mask, __m128i first, std::uint16_t* positions, std::int8_t* levels) {
    const __m128i order = _mm_cvtsi64_si128(static_cast<long long>(kPermutations.compress[mask]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(positions), _mm_add_epi16(_mm_cvtepu8_epi16(order), first));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(levels), _mm_shuffle_epi8(of, order));
    return __builtin_popcount(mask);
}

// Levels of float32 values, a row of 32 at a time. Nearly all values are within the levels, so that rounding them to an
// integer is all. Rows with others are computed again: a value that is not finite rounds to the least integer, so it is
// among those.
template <bool kScaled>
class LevelFinder {
public:
    LevelFinder(const Values& values, std::int64_t begin, const Quantizer& quantizer, int base, const LevelsOut* out)
        : data_(static_cast<const float*>(values.data) + begin),
          kept_(values.residual + begin),
          residual_(out->residual),
          old_(out->old),
          positions_(out->positions),
          levels_(out->levels),
          last_row_(values.count - begin - kLanes),
          scale_(_mm256_set1_ps(static_cast<float>(values.inv_scale))),
          first_(_mm_set1_epi16(static_cast<short>(base))) {
        const RunQuantizer<float> grid(quantizer.p1);
        step_ = _mm256_set1_ps(grid.step());
        inverse_ = _mm256_set1_ps(grid.inverse());
    }

    template <bool kSampled>
    QCOMM_INLINE void row(int i, SampleLanes* lanes) {
        fetch_ahead(i);
        __m256 value[kGroups], u[kGroups];
        __m256i level[kGroups];
        for (int g = 0; g < kGroups; ++g) {
            const int at = i + kWidth * g;
            const __m256 x = _mm256_loadu_ps(data_ + at), old = _mm256_loadu_ps(kept_ + at);
            value[g] = kScaled ? _mm256_mul_ps(x, scale_) : x;
            u[g] = _mm256_add_ps(value[g], old);
            level[g] = _mm256_cvtps_epi32(_mm256_mul_ps(u[g], inverse_));
            _mm256_storeu_ps(old_ + at, old);
        }
        __m256i bytes = narrow8(level);
        const __m256i beyond = _mm256_subs_epu8(_mm256_add_epi8(bytes, _mm256_set1_epi8(kMaxLevel)),
                                                _mm256_set1_epi8(static_cast<char>(2 * kMaxLevel)));
        if (__builtin_expect(!_mm256_testz_si256(beyond, beyond), 0)) bytes = limit(u, level);
        for (int g = 0; g < kGroups; ++g) {
            const __m256 lost = _mm256_sub_ps(u[g], _mm256_mul_ps(_mm256_cvtepi32_ps(level[g]), step_));
            _mm256_storeu_ps(residual_ + i + kWidth * g, lost);
            if (kSampled) {
                add_squares(value[g], lanes->values + kWidth * g);
                add_squares(lost, lanes->residuals + kWidth * g);
            }
        }
        keep(bytes);
    }
    void finish(LevelsOut* out) const {
        out->count = static_cast<int>(found_);
        out->finite = finite_;
    }

private:
    // Asks for the row that is 4 KiB further on, maybe of the next call's values: processors by themselves do not look
    // beyond a page, and the pass would take 1.5 times as long or more.
    QCOMM_INLINE void fetch_ahead(int i) const {
        constexpr int kAhead = 1024;
        const std::int64_t at = i + kAhead < last_row_ ? i + kAhead : last_row_;
        fetch_row<true>(data_ + at, kLanes * sizeof(float), 0);
        fetch_row<true>(kept_ + at, kLanes * sizeof(float), 0);
    }
    // As RunQuantizer, also of NaN.
    QCOMM_INLINE __m256i limit(const __m256 (&u)[kGroups], __m256i (&level)[kGroups]) {
        const __m256 top = _mm256_set1_ps(kMaxLevel), bottom = _mm256_set1_ps(-kMaxLevel);
        __m256 poison = _mm256_setzero_ps();
        for (int g = 0; g < kGroups; ++g) {
            const __m256 inside = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(u[g], inverse_), bottom), top);
            level[g] = _mm256_cvtps_epi32(inside);
            // NaN if a value is not finite; then its residual is not, either.
            poison = _mm256_add_ps(poison, _mm256_mul_ps(u[g], _mm256_setzero_ps()));
        }
        finite_ &= _mm256_movemask_ps(_mm256_cmp_ps(poison, poison, _CMP_UNORD_Q)) == 0;
        return narrow8(level);
    }
    // Keeps those of 32 levels that are not 0, without a branch.
    QCOMM_INLINE void keep(__m256i bytes) {
        const auto zeros =
            static_cast<unsigned>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
        for (int g = 0; g < kGroups; ++g) {
            const __m128i half = g < 2 ? _mm256_castsi256_si128(bytes) : _mm256_extracti128_si256(bytes, 1);
            found_ += keep_levels(g % 2 == 0 ? half : _mm_unpackhi_epi64(half, half), ~zeros >> (kWidth * g) & 0xFFu,
                                  first_, positions_ + found_, levels_ + found_);
            first_ = _mm_add_epi16(first_, _mm_set1_epi16(kWidth));
        }
    }
    // Squares of float32 are exact in float64, so that a fused addition is an addition.
    QCOMM_INLINE static void add_squares(__m256 x, double* sums) {
        const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)),
                      high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
        _mm256_storeu_pd(sums, _mm256_fmadd_pd(low, low, _mm256_loadu_pd(sums)));
        _mm256_storeu_pd(sums + 4, _mm256_fmadd_pd(high, high, _mm256_loadu_pd(sums + 4)));
    }

    const float* data_;
    const float* kept_;
    // Copies, since stores of bytes might otherwise be taken to change them.
    float* residual_;
    float* old_;
    std::uint16_t* positions_;
    std::int8_t* levels_;
    std::int64_t last_row_, found_ = 0;
    __m256 scale_, step_, inverse_;
    __m128i first_;  // position of the next value, in all elements
    bool finite_ = true;
};

// Rows [0, n / 32), in one pass, since memory is the bound.
template <bool kScaled>
void find_levels_of_floats(const Values& values, std::int64_t begin, int n, const Quantizer& quantizer, int base,
                           LevelsOut* out, SampleLanes* lanes) {
    LevelFinder<kScaled> finder(values, begin, quantizer, base, out);
    const int rows = n / kLanes;
    for (int r = 0; r < rows;) {
        const int sampled = sampled_row(r / kSampledRows, n), end = r + kSampledRows < rows ? r + kSampledRows : rows;
        for (; r < end; ++r) {
            if (__builtin_expect(r == sampled, 0)) {
                finder.template row<true>(kLanes * r, lanes);
            } else {
                finder.template row<false>(kLanes * r, nullptr);
            }
        }
    }
    finder.finish(out);
}

void find_levels(const Values& values, std::int64_t begin, int n, const Quantizer& quantizer, int base,
                 LevelsOut* out) {
    if (values.dtype != DType::kFloat32 || values.residual == nullptr)
        return find_levels_scalar(values, begin, n, quantizer, base, out);
    SampleLanes lanes{};
    const auto find = values.inv_scale == 1.0 ? find_levels_of_floats<false> : find_levels_of_floats<true>;
    find(values, begin, n, quantizer, base, out, &lanes);
    find_levels_from<Traits<DType::kFloat32>>(values, begin, n / kLanes * kLanes, n, quantizer, base, out, &lanes);
    out->sample = fold_sample(lanes, n);
}

// ---- Encoding ------------------------------------------------------------------------------------------------------

// put_tokens(), 16 levels at a time. A run that needs a skip is rare: its 16 levels take the scalar path.
QCOMM_INLINE std::uint32_t* put_all_tokens(const std::uint16_t* positions, const std::int8_t* levels, int count,
                                           const RunCode& code, std::uint32_t* tokens) {
    tokens = put_tokens(positions, levels, 0, 1, 0, code, tokens);
    int i = 1;
    for (; i + kHalf <= count; i += kHalf) {
        const __m256i run = _mm256_sub_epi16(_mm256_sub_epi16(load256(positions + i), load256(positions + i - 1)),
                                             _mm256_set1_epi16(1));
        if (!_mm256_testz_si256(run, _mm256_set1_epi16(static_cast<short>(-kSkipZeros)))) {
            tokens = put_tokens(positions, levels, i, i + kHalf, positions[i - 1] + 1, code, tokens);
            continue;
        }
        const __m256i level = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels + i)));
        // As level_place(): one more for a negative level, whose highest bit is set.
        const __m256i place =
            _mm256_add_epi16(_mm256_add_epi16(level, _mm256_set1_epi16(kMaxLevel - 1)), _mm256_srli_epi16(level, 15));
        const __m256i index = _mm256_add_epi16(_mm256_slli_epi16(run, 3), place);
        store256(tokens, gather<4>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(index)), code.tokens));
        store256(tokens + kWidth, gather<4>(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(index, 1)), code.tokens));
        tokens += kHalf;
    }
    return i == count ? tokens : put_tokens(positions, levels, i, count, positions[i - 1] + 1, code, tokens);
}

// Pushes whole steps as long as no lane is full. Returns the step that fills one, or -1.
inline int push_tokens_before_start(EncodeLanes& lanes, const std::uint32_t* tokens, int step) {
    const __m256i low = _mm256_set1_epi32(0xFFFF), last = _mm256_set1_epi32(kEmitBits - 1);
    __m256i x[kGroups], c[kGroups];
    for (int g = 0; g < kGroups; ++g) x[g] = c[g] = _mm256_setzero_si256();
    for (; step >= 0; --step) {
        __m256i token[kGroups], sum[kGroups], full = _mm256_setzero_si256();
        for (int g = 0; g < kGroups; ++g) {
            token[g] = load256(tokens + step * kLanes + kWidth * g);
            sum[g] = _mm256_add_epi32(c[g], _mm256_srli_epi32(token[g], 16));
            full = _mm256_or_si256(full, _mm256_cmpgt_epi32(sum[g], last));
        }
        if (lane_mask(full) != 0) break;
        for (int g = 0; g < kGroups; ++g) {
            const __m256i up = _mm256_sllv_epi32(x[g], _mm256_srli_epi32(token[g], 16));
            x[g] = _mm256_or_si256(up, _mm256_and_si256(token[g], low));
            c[g] = sum[g];
        }
    }
    for (int g = 0; g < kGroups; ++g) store256(lanes.bits + kWidth * g, x[g]), store256(lanes.count + kWidth * g, c[g]);
    return step;
}

// 16 tokens, as WordLanes::push() takes them: four of each half go to each register, which packing undoes.
QCOMM_INLINE Codewords codewords_of(const std::uint32_t* tokens) {
    const auto two = [](const std::uint32_t* at) {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low),
                                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + kWidth)), 1);
    };
    return packed_codewords(two(tokens), two(tokens + 4));
}

int encode_runs(const std::uint16_t* positions, const std::int8_t* levels, int count, const RunCode& code,
                std::uint32_t* scratch, int* tokens, std::uint32_t* start, std::uint16_t* words_end) {
    std::uint32_t* const end = put_all_tokens(positions, levels, count, code, scratch);
    *tokens = static_cast<int>(end - scratch);
    // The last step is filled with tokens of no bits, which change no lane.
    for (int g = 0; g < kGroups; ++g) store256(end + kWidth * g, _mm256_setzero_si256());
    EncodeLanes lanes;
    begin_lanes(lanes, words_end);
    int step = push_tokens_before_start(lanes, scratch, (*tokens - 1) / kLanes);
    if (step >= 0) {
        WordLanes pushed(lanes);
        std::uint16_t* words = words_end;
        for (; step >= 0; --step)
            words = pushed.push(codewords_of(scratch + step * kLanes), codewords_of(scratch + step * kLanes + kHalf),
                                words);
        pushed.store(lanes);
        lanes.words = words;
    }
    return finish_lanes(lanes, start, words_end);
}

// ---- Decoding ------------------------------------------------------------------------------------------------------

// The tokens of a step without their codewords, in 16 bits each: zeros before the level in bits 0-9, level_place() in
// 10-12, and in 13 whether there is a level.
constexpr int kTokenPlace = 10, kTokenHasLevel = 13;

// The lanes of DecodeLanes in registers.
struct RunLanes {
    __m256i x[kGroups], c[kGroups], least;
    const std::uint8_t* words;
    std::int64_t left;

    explicit RunLanes(const DecodeLanes& lanes) : least(_mm256_setzero_si256()), words(lanes.words), left(lanes.left) {
        for (int g = 0; g < kGroups; ++g)
            x[g] = load256(lanes.bits + kWidth * g), c[g] = load256(lanes.count + kWidth * g);
    }

    // Takes a token from each of the lanes below `live`, and then words, as decode_one() does. kLast: there may be
    // fewer lanes or words than a step's 32, and 8 words more must be readable. Otherwise all are there. Tokens of
    // other lanes are 0.
    template <bool kLast>
    QCOMM_INLINE void take(const RunCode& code, int live, __m256i (&tokens)[2]) {
        const __m256i peek = _mm256_set1_epi32((1 << kMaxRunCodeLength) - 1), ones = _mm256_set1_epi32(-1);
        const __m256i word = _mm256_set1_epi32(kWordBits), numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        __m256i token[kGroups], alive[kGroups];
        for (int g = 0; g < kGroups; ++g) {
            __m256i e = gather<4>(_mm256_and_si256(x[g], peek), code.entries);
            if (kLast) {
                alive[g] = _mm256_cmpgt_epi32(_mm256_set1_epi32(live - kWidth * g), numbers);
                e = _mm256_and_si256(e, alive[g]);
            }
            const __m256i length = _mm256_and_si256(e, _mm256_set1_epi32(31));
            const __m256i behind = _mm256_and_si256(_mm256_srli_epi32(e, 5), _mm256_set1_epi32(15));
            const __m256i extra = _mm256_and_si256(_mm256_srli_epi32(e, 9), _mm256_set1_epi32(7));
            const __m256i zeros = _mm256_andnot_si256(_mm256_sllv_epi32(ones, extra), _mm256_srlv_epi32(x[g], behind));
            token[g] = _mm256_add_epi32(_mm256_srli_epi32(e, 12), zeros);
            x[g] = _mm256_srlv_epi32(x[g], length);
            c[g] = _mm256_sub_epi32(c[g], length);
            least = _mm256_min_epi32(least, c[g]);
        }
        for (int g = 0; g < kGroups; ++g) {
            __m256i need = _mm256_cmpgt_epi32(word, c[g]);
            if (kLast) need = _mm256_and_si256(need, alive[g]);
            unsigned m = lane_mask(need);
            if (kLast) {
                // The first lanes that ask get the words there are.
                m = _pdep_u32((1u << (left < kWidth ? left : kWidth)) - 1u, m);
                const __m256i bit = _mm256_sllv_epi32(_mm256_set1_epi32(1), numbers);
                need = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(m)), bit), bit);
            }
            const __m256i next = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
            const __m256i taken =
                _mm256_and_si256(_mm256_permutevar8x32_epi32(next, permutation(kPermutations.expand[m])), need);
            x[g] = _mm256_or_si256(x[g], _mm256_sllv_epi32(taken, c[g]));
            c[g] = _mm256_add_epi32(c[g], _mm256_and_si256(need, word));
            const int used = __builtin_popcount(m);
            words += 2 * used;
            left -= used;
        }
        for (int h = 0; h < 2; ++h)
            tokens[h] = _mm256_permute4x64_epi64(_mm256_packus_epi32(token[2 * h], token[2 * h + 1]), 0xD8);
    }

    // As end_lanes().
    bool end() const {
        const __m256i any = _mm256_or_si256(_mm256_or_si256(x[0], x[1]), _mm256_or_si256(x[2], x[3]));
        return _mm256_testz_si256(any, any) && lane_mask(least) == 0;
    }
};

// Sums of the first 1, 2, ..., 32 numbers of 16 bits.
QCOMM_INLINE void add_up(__m256i (&of)[2]) {
    __m256i sums[2];  // of each half's 8, in all of its elements
    for (int h = 0; h < 2; ++h) {
        of[h] = _mm256_add_epi16(of[h], _mm256_slli_si256(of[h], 2));
        of[h] = _mm256_add_epi16(of[h], _mm256_slli_si256(of[h], 4));
        of[h] = _mm256_add_epi16(of[h], _mm256_slli_si256(of[h], 8));
        sums[h] = _mm256_shuffle_epi8(of[h], _mm256_set1_epi16(0x0F0E));
        of[h] = _mm256_add_epi16(of[h], _mm256_permute2x128_si256(sums[h], sums[h], 0x08));
    }
    of[1] = _mm256_add_epi16(of[1], _mm256_add_epi16(sums[0], _mm256_permute4x64_epi64(sums[0], 0x4E)));
}

// Puts the levels of a step's tokens behind those of the block; returns the mask of tokens with a level. `next` is the
// position behind the tokens before. Positions of a damaged block may have more than 16 bits, but `next` tells.
template <bool kLast>
QCOMM_INLINE std::uint32_t put_levels(const __m256i (&tokens)[2], std::uint32_t& next, RunBlock& block, int& count) {
    const __m256i run_bits = _mm256_set1_epi16((1 << kTokenPlace) - 1), place_bits = _mm256_set1_epi16(7);
    const __m256i has_level = _mm256_set1_epi16(1 << kTokenHasLevel);
    __m256i position[2], place[2];
    for (int h = 0; h < 2; ++h) {
        position[h] =
            _mm256_add_epi16(_mm256_and_si256(tokens[h], run_bits), _mm256_srli_epi16(tokens[h], kTokenHasLevel));
        place[h] = _mm256_and_si256(_mm256_srli_epi16(tokens[h], kTokenPlace), place_bits);
    }
    add_up(position);
    const __m256i before = _mm256_set1_epi16(static_cast<short>(next - 1));
    next += static_cast<std::uint32_t>(_mm256_extract_epi16(position[1], 15));
    for (__m256i& p : position) p = _mm256_add_epi16(p, before);
    // As level_at().
    const __m256i places = _mm256_permute4x64_epi64(_mm256_packus_epi16(place[0], place[1]), 0xD8);
    const __m256i levels = _mm256_sub_epi8(_mm256_sub_epi8(places, _mm256_set1_epi8(kMaxLevel)),
                                           _mm256_cmpgt_epi8(places, _mm256_set1_epi8(kMaxLevel - 1)));
    if (!kLast && __builtin_expect(_mm256_testc_si256(_mm256_and_si256(tokens[0], tokens[1]), has_level), 1)) {
        store256(block.positions + count, position[0]);
        store256(block.positions + count + kHalf, position[1]);
        store256(block.levels + count, levels);
        count += kLanes;
        return ~0u;
    }
    // A token without a level leaves no room between those around it.
    const __m256i present = _mm256_permute4x64_epi64(
        _mm256_packs_epi16(_mm256_and_si256(tokens[0], has_level), _mm256_and_si256(tokens[1], has_level)), 0xD8);
    const auto mask =
        ~static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(present, _mm256_setzero_si256())));
    for (int g = 0; g < kGroups; ++g) {
        const std::uint32_t m = mask >> (kWidth * g) & 0xFFu;
        const __m128i order = _mm_cvtsi64_si128(static_cast<long long>(kPermutations.compress[m]));
        // The two bytes of element i of 16 bits are 2 * i and 2 * i + 1.
        const __m128i twice = _mm_add_epi8(_mm_unpacklo_epi8(order, order), _mm_unpacklo_epi8(order, order));
        const __m128i pairs = _mm_add_epi8(twice, _mm_set1_epi16(0x0100));
        const __m128i of =
            g % 2 == 0 ? _mm256_castsi256_si128(position[g / 2]) : _mm256_extracti128_si256(position[g / 2], 1);
        const __m128i half = g < 2 ? _mm256_castsi256_si128(levels) : _mm256_extracti128_si256(levels, 1);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(block.positions + count), _mm_shuffle_epi8(of, pairs));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(block.levels + count),
                         _mm_shuffle_epi8(g % 2 == 0 ? half : _mm_unpackhi_epi64(half, half), order));
        count += __builtin_popcount(m);
    }
    return mask;
}

// Steps with 32 words to take and another step behind them; then the others, whose words are copied to where 8 more can
// be read. Nothing is refused on the way, as in decode_step().
void decode_runs(RunBlock& block) {
    DecodeLanes lanes;
    block.count = 0;
    block.whole = begin_lanes(lanes, block);
    if (!block.whole) return;
    RunLanes held(lanes);
    __m256i tokens[2];
    std::uint32_t next = 0;
    int begin = 0, count = 0;
    bool ends_in_level = false;
    for (; begin + kLanes < block.tokens && held.left >= kLanes; begin += kLanes) {
        held.take<false>(*block.code, kLanes, tokens);
        put_levels<false>(tokens, next, block, count);
    }
    // Fewer than 32 words, or one step, which takes no more.
    std::uint16_t words[2 * kLanes] = {};
    if (held.left > kLanes) held.left = kLanes;
    if (held.left > 0) __builtin_memcpy(words, held.words, sizeof(std::uint16_t) * static_cast<std::size_t>(held.left));
    held.words = reinterpret_cast<const std::uint8_t*>(words);
    for (; begin < block.tokens; begin += kLanes) {
        const int live = block.tokens - begin < kLanes ? block.tokens - begin : kLanes;
        held.take<true>(*block.code, live, tokens);
        ends_in_level = (put_levels<true>(tokens, next, block, count) >> (live - 1) & 1u) != 0;
    }
    block.count = count;
    block.whole = held.end() && ends_in_level && next <= static_cast<std::uint32_t>(block.values);
}
