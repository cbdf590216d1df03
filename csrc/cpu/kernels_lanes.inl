// The 32 lanes of a block, one at a time: the definition (see block.h), and what the vector versions use for a short
// last step. Included like kernels_loops.inl.

constexpr std::uint32_t kWordBits = 16;
constexpr std::uint32_t kEmitBits =
    2 * kWordBits;  // a codeword that would bring a lane to 32 bits makes it write a word first

struct EncodeLanes {
    std::uint32_t bits[kLanes];
    std::uint32_t count[kLanes];
    bool started;          // a word has been written
    bool missing;          // a symbol had no codeword
    std::uint16_t* words;  // where the last word was written
};

// Codeword t of a block: entries[] of a symbol, or of a pair; the symbol behind an odd tail is the level zero.
QCOMM_INLINE std::uint32_t codeword(const std::uint16_t* symbols, int n, bool pairs, const std::uint32_t* entries,
                                    int t) {
    if (!pairs) return entries[symbols[t]];
    const std::uint32_t second =
        2 * t + 1 < n ? symbols[2 * t + 1] : static_cast<std::uint32_t>(sigma_radius(kPairBits));
    return entries[symbols[2 * t] | second << kPairBits];
}

// Pushes one step's codewords, lane 31 first.
inline void push_step(EncodeLanes& lanes, const std::uint32_t* codewords, int live) {
    bool full = false;
    for (int j = 0; j < live; ++j) {
        lanes.missing |= codewords[j] == 0;
        full |= lanes.count[j] + (codewords[j] >> 16) >= kEmitBits;
    }
    if (full && !lanes.started) {
        lanes.started = true;
        for (int j = 0; j < kLanes; ++j) lanes.count[j] = lanes.count[j] < kWordBits ? kWordBits : lanes.count[j];
    }
    for (int j = live - 1; j >= 0; --j) {
        const std::uint32_t code = codewords[j] & 0xFFFFu, length = codewords[j] >> 16;
        std::uint32_t x = lanes.bits[j], c = lanes.count[j];
        // The word is stored every time and kept only where the lane is full: no branch to mispredict.
        const bool emit = c + length >= kEmitBits;
        lanes.words[-1] = static_cast<std::uint16_t>(x >> ((c - kWordBits) & 31u));
        lanes.words -= emit;
        c -= emit ? kWordBits : 0u;
        x &= (1u << c) - 1u;
        lanes.bits[j] = x << length | code;
        lanes.count[j] = c + length;
    }
}

inline void begin_lanes(EncodeLanes& lanes, std::uint16_t* words_end) {
    for (int j = 0; j < kLanes; ++j) lanes.bits[j] = lanes.count[j] = 0;
    lanes.started = lanes.missing = false;
    lanes.words = words_end;
}

// One step through the scalar path.
inline void encode_step(EncodeLanes& lanes, const std::uint16_t* symbols, int n, bool pairs,
                        const std::uint32_t* entries, int step, int live) {
    std::uint32_t codewords[kLanes];
    for (int j = 0; j < live; ++j) codewords[j] = codeword(symbols, n, pairs, entries, step * kLanes + j);
    push_step(lanes, codewords, live);
}

inline int finish_lanes(const EncodeLanes& lanes, std::uint32_t* start, const std::uint16_t* words_end) {
    if (lanes.missing) return -1;
    for (int j = 0; j < kLanes; ++j) start[j] = lanes.bits[j] | 1u << lanes.count[j];
    return static_cast<int>(words_end - lanes.words);
}

inline void split_pairs(const std::uint16_t* pairs, int count, std::uint16_t* symbols) {
    for (int i = 0; i < count; ++i) {
        symbols[2 * i] = pairs[i] & ((1u << kPairBits) - 1u);
        symbols[2 * i + 1] = static_cast<std::uint16_t>(pairs[i] >> kPairBits);
    }
}

struct DecodeLanes {
    std::uint32_t bits[kLanes];
    std::int32_t count[kLanes];
    const std::uint8_t* words;  // unaligned u16
    std::int64_t left;          // words not taken yet
    std::int32_t least;         // the smallest count so far: negative when more bits were used than there were
};

inline bool begin_lanes(DecodeLanes& lanes, const CodedBlock& block) {
    __builtin_memcpy(lanes.bits, block.start, sizeof(lanes.bits));
    for (int j = 0; j < kLanes; ++j) {
        if (lanes.bits[j] == 0) return false;
        lanes.count[j] = 31 - __builtin_clz(lanes.bits[j]);
        lanes.bits[j] ^= 1u << lanes.count[j];
    }
    lanes.words = block.words;
    lanes.left = block.word_count;
    lanes.least = 0;
    return true;
}

inline void decode_step(DecodeLanes& lanes, const std::uint16_t* entries, std::uint32_t mask, int live,
                        std::uint16_t* symbols) {
    for (int j = 0; j < live; ++j) {
        const std::uint32_t entry = entries[lanes.bits[j] & mask];
        symbols[j] = static_cast<std::uint16_t>(entry & 0xFFFu);
        lanes.bits[j] >>= entry >> 12;
        lanes.count[j] -= static_cast<std::int32_t>(entry >> 12);
        lanes.least = lanes.count[j] < lanes.least ? lanes.count[j] : lanes.least;
    }
    for (int j = 0; j < live && lanes.left > 0; ++j) {
        if (lanes.count[j] >= static_cast<std::int32_t>(kWordBits)) continue;
        std::uint16_t word;
        __builtin_memcpy(&word, lanes.words, sizeof(word));
        // Only damaged input has a negative count; its result is thrown away, but the shift must stay defined.
        lanes.bits[j] |= static_cast<std::uint32_t>(word) << (lanes.count[j] & 31);
        lanes.count[j] += static_cast<std::int32_t>(kWordBits);
        lanes.words += sizeof(word);
        --lanes.left;
    }
}

// From symbol `begin`, with which a step begins, to the last.
inline void decode_rest(DecodeLanes& lanes, const CodedBlock& block, bool pairs, const DecodeTable& table, int begin) {
    const int per_codeword = pairs ? 2 : 1;
    for (; begin < block.count; begin += per_codeword * kLanes) {
        const int codewords = (block.count - begin + per_codeword - 1) / per_codeword;
        const int live = codewords < kLanes ? codewords : kLanes;
        std::uint16_t decoded[kLanes];
        decode_step(lanes, table.entries.data(), table.mask, live, pairs ? decoded : block.symbols + begin);
        if (pairs) split_pairs(decoded, live, block.symbols + begin);
    }
}

// Whether the bits end where the codewords do: nothing is left over, nothing was taken from beyond.
inline bool end_lanes(const DecodeLanes& lanes) {
    std::uint32_t left = 0;
    for (int j = 0; j < kLanes; ++j) left |= lanes.bits[j];
    return left == 0 && lanes.least >= 0;
}
