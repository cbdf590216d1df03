// The loops of zero runs, one value and one lane at a time: the definition, and the ends of the vector versions.
// Included like kernels_loops.inl, behind kernels_lanes.inl.

// A RunSample in lanes. A square of float32 is exact in float64, so no fused operation rounds differently.
struct SampleLanes {
    double values[kLanes], residuals[kLanes];
};
inline RunSample fold_sample(SampleLanes& lanes, int n) {
    for (int d = kLanes / 2; d > 0; d /= 2) {
        for (int j = 0; j < d; ++j) {
            lanes.values[j] += lanes.values[j + d];
            lanes.residuals[j] += lanes.residuals[j + d];
        }
    }
    return {lanes.values[0], lanes.residuals[0], static_cast<double>(sampled_values(n))};
}

// Values [at, n) of a part, behind those that a vector version has done: `at` is a multiple of 32.
template <class Tr>
QCOMM_INLINE void find_levels_from(const Values& values, std::int64_t begin, int at, int n, const Quantizer& quantizer,
                                   int base, LevelsOut* out, SampleLanes* lanes) {
    using T = typename Tr::Arithmetic;
    const RunQuantizer<T> grid(quantizer.p1);
    const auto* data = static_cast<const typename Tr::Storage*>(values.data) + begin;
    const auto inv_scale = static_cast<T>(values.inv_scale);
    const float* const kept = values.residual != nullptr ? values.residual + begin : nullptr;
    int found = out->count;
    float poison = 0.0f;
    bool in_sample = false;
    for (int i = at; i < n; ++i) {
        if (i % kLanes == 0) in_sample = i / kLanes == sampled_row(i / (kLanes * kSampledRows), n);
        const T value = Tr::widen(data[i]) * inv_scale;  // a factor of 1 changes nothing
        const float old = kept != nullptr ? kept[i] : 0.0f;
        const T x = kept != nullptr ? value + static_cast<T>(old) : value;
        const int level = grid(x);
        const float lost = grid.lost(x, level);
        poison += lost * 0.0f;  // NaN from the first one on that is not finite
        out->old[i] = old;
        out->residual[i] = lost;
        if (in_sample) {
            lanes->values[i % kLanes] += static_cast<double>(value) * static_cast<double>(value);
            lanes->residuals[i % kLanes] += static_cast<double>(lost) * static_cast<double>(lost);
        }
        // Stored every time and kept only where there is a level: most have none, but which ones cannot be predicted.
        out->positions[found] = static_cast<std::uint16_t>(base + i);
        out->levels[found] = static_cast<std::int8_t>(level);
        found += level != 0;
    }
    out->count = found;
    out->finite &= poison == 0.0f;
}

inline void find_levels_scalar(const Values& values, std::int64_t begin, int n, const Quantizer& quantizer, int base,
                               LevelsOut* out) {
    SampleLanes lanes{};
    out->count = 0;
    out->finite = true;
    dispatch(values.dtype, [&](auto traits) {
        find_levels_from<decltype(traits)>(values, begin, 0, n, quantizer, base, out, &lanes);
    });
    out->sample = fold_sample(lanes, n);
}

// Writes the tokens of levels [first, count) behind `tokens`; `next` is the position behind the level before them.
// Returns the end.
QCOMM_INLINE std::uint32_t* put_tokens(const std::uint16_t* positions, const std::int8_t* levels, int first, int count,
                                       int next, const RunCode& code, std::uint32_t* tokens) {
    for (int i = first; i < count; ++i) {
        int run = positions[i] - next;
        next = positions[i] + 1;
        for (; run >= kSkipZeros; run -= kSkipZeros) *tokens++ = code.skip;
        *tokens++ = code.tokens[8 * run + level_place(levels[i])];
    }
    return tokens;
}

// Codes tokens step by step, the last one first.
inline int encode_tokens_scalar(const std::uint32_t* tokens, int count, std::uint32_t* start,
                                std::uint16_t* words_end) {
    EncodeLanes lanes;
    begin_lanes(lanes, words_end);
    for (int step = (count - 1) / kLanes; step >= 0; --step) {
        const int live = count - step * kLanes < kLanes ? count - step * kLanes : kLanes;
        push_step(lanes, tokens + step * kLanes, live);
    }
    return finish_lanes(lanes, start, words_end);
}

inline int encode_runs_scalar(const std::uint16_t* positions, const std::int8_t* levels, int count, const RunCode& code,
                              std::uint32_t* scratch, int* tokens, std::uint32_t* start, std::uint16_t* words_end) {
    *tokens = static_cast<int>(put_tokens(positions, levels, 0, count, 0, code, scratch) - scratch);
    return encode_tokens_scalar(scratch, *tokens, start, words_end);
}

// The fields of an entry of RunCode::entries.
QCOMM_INLINE std::uint32_t length_of_token(std::uint32_t entry) { return entry & 31u; }
QCOMM_INLINE std::uint32_t run_of_token(std::uint32_t entry, std::uint32_t bits) {
    const std::uint32_t extra = entry >> 9 & 7u;
    return (entry >> 12 & 1023u) + (bits >> (entry >> 5 & 15u) & ((1u << extra) - 1u));
}

// From token `begin` on, with which a step begins; `next` is the position behind those before, and `has_level` tells
// whether the last of them has a level. As in decode_step(),
// nothing is refused on the way: a position beyond the block, which only a damaged one has, is put at its end.
inline void decode_runs_rest(DecodeLanes& lanes, RunBlock& block, int begin, std::uint32_t next, bool has_level) {
    const std::uint32_t mask = (1u << kMaxRunCodeLength) - 1u, end = static_cast<std::uint32_t>(block.values);
    for (; begin < block.tokens; begin += kLanes) {
        const int live = block.tokens - begin < kLanes ? block.tokens - begin : kLanes;
        for (int j = 0; j < live; ++j) {
            std::uint32_t x = lanes.bits[j];
            const std::uint32_t entry = block.code->entries[x & mask];
            next += run_of_token(entry, x);
            has_level = (entry & kHasLevel) != 0;
            if (has_level) {
                next = next < end ? next : end;
                block.positions[block.count] = static_cast<std::uint16_t>(next);
                block.levels[block.count] = static_cast<std::int8_t>(level_at(static_cast<int>(entry >> 22 & 7u)));
                // At the end of the block there is no such value, and the block is not whole.
                block.count += next < end;
                ++next;
            }
            std::int32_t c = lanes.count[j] - static_cast<std::int32_t>(length_of_token(entry));
            lanes.least = c < lanes.least ? c : lanes.least;
            x >>= length_of_token(entry);
            if (c < static_cast<std::int32_t>(kWordBits) && lanes.left > 0) {
                std::uint16_t word;
                __builtin_memcpy(&word, lanes.words, sizeof(word));
                x |= static_cast<std::uint32_t>(word) << (c & 31);
                c += kWordBits;
                lanes.words += sizeof(word);
                --lanes.left;
            }
            lanes.bits[j] = x;
            lanes.count[j] = c;
        }
    }
    block.whole = end_lanes(lanes) && has_level && next <= end;
}

// The lanes as a CodedBlock has them, whose other fields are not needed.
inline bool begin_lanes(DecodeLanes& lanes, const RunBlock& block) {
    CodedBlock coded{};
    coded.start = block.start;
    coded.words = block.words;
    coded.word_count = block.word_count;
    return begin_lanes(lanes, coded);
}

inline void decode_runs_scalar(RunBlock& block) {
    DecodeLanes lanes;
    block.count = 0;
    block.whole = begin_lanes(lanes, block);
    if (block.whole) decode_runs_rest(lanes, block, 0, 0, false);
}
