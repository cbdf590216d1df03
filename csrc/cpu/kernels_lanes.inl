// The 32 lanes of a block, one at a time: the definition (see block.h), and the path of the vector versions for a short
// last step. Included like kernels_loops.inl.

// Encoding is decoding backwards. A decoder drops a codeword and then, below 16 bits, takes a word, so that it holds 16
// to 31 bits before each codeword. An encoder therefore pushes codewords from the last to the first, and writes a word
// just before a lane would hold 32 bits: it then holds 16 or more, of which it gives the highest 16. Both lanes hold
// the same bits between any two steps, which is why the words come out in the order in which they are asked for.
//
//   bit 31                                 0
//   | 1 | last codeword ... | next codeword |      a lane: x, with its sentinel in a start window only
//         ^ words arrive here   ^ dropped from here by a decoder, pushed here by an encoder

constexpr std::uint32_t kWordBits = 16;
// A codeword that would bring a lane to this number of bits makes it write a word first.
constexpr std::uint32_t kEmitBits = 2 * kWordBits;

// All bits or none. The compiler cannot see that there are only two values, so it makes no branch of them, which would
// be mispredicted.
QCOMM_INLINE std::uint32_t mask_of(bool condition) {
    std::uint32_t mask = 0u - static_cast<std::uint32_t>(condition);
    __asm__("" : "+r"(mask));
    return mask;
}

// Each lane's bits as a number: the first bit that a decoder uses is the lowest. Bits above `count` are 0.
struct EncodeLanes {
    std::uint32_t bits[kLanes];
    std::uint32_t count[kLanes];
    bool started;          // a word has been written
    bool missing;          // a symbol had no codeword
    std::uint16_t* words;  // where the last word was written
};

// Returns codeword t of a block: entries[] of a symbol, or of a pair; the symbol behind an odd tail is the level zero.
QCOMM_INLINE std::uint32_t codeword(const std::uint16_t* symbols, int n, bool pairs, const std::uint32_t* entries,
                                    int t) {
    if (!pairs) return entries[symbols[t]];
    const std::uint32_t second =
        2 * t + 1 < n ? symbols[2 * t + 1] : static_cast<std::uint32_t>(sigma_radius(kPairBits));
    return entries[symbols[2 * t] | second << kPairBits];
}

// Before a first word is written every lane is raised to 16 bits: those that are full can then give one. The zeros that
// this adds come behind a lane's last codeword, so no decoder uses them. A block that writes no word stays as short as
// its codewords.
inline void start_if_full(EncodeLanes& lanes, const std::uint32_t* codewords, int live) {
    bool full = false;
    for (int j = 0; j < live; ++j) full |= lanes.count[j] + (codewords[j] >> 16) >= kEmitBits;
    if (!full) return;
    lanes.started = true;
    for (int j = 0; j < kLanes; ++j) lanes.count[j] = lanes.count[j] < kWordBits ? kWordBits : lanes.count[j];
}

// Pushes one step's codewords, lane 31 first: words are written downwards and read upwards. No word is written before
// the lanes have started, since until then no lane is full.
QCOMM_INLINE void push_step(EncodeLanes& lanes, const std::uint32_t* codewords, int live) {
    if (!lanes.started) start_if_full(lanes, codewords, live);
    bool missing = false;
    std::uint16_t* words = lanes.words;
    for (int j = live - 1; j >= 0; --j) {
        const std::uint32_t code = codewords[j] & 0xFFFFu, length = codewords[j] >> 16;
        std::uint32_t x = lanes.bits[j], c = lanes.count[j];
        missing |= codewords[j] == 0;
        // The word is stored every time and kept only where the lane is full.
        const std::uint32_t full = mask_of(c + length >= kEmitBits);
        words[-1] = static_cast<std::uint16_t>(x >> ((c - kWordBits) & 31u));
        words -= full & 1u;
        c -= full & kWordBits;
        x &= (1u << c) - 1u;
        lanes.bits[j] = x << length | code;
        lanes.count[j] = c + length;
    }
    lanes.words = words;
    lanes.missing |= missing;
}

inline void begin_lanes(EncodeLanes& lanes, std::uint16_t* words_end) {
    for (int j = 0; j < kLanes; ++j) lanes.bits[j] = lanes.count[j] = 0;
    lanes.started = lanes.missing = false;
    lanes.words = words_end;
}

// Prefetches row `step` of `bytes` bytes, to the first-level cache (kNear) or the second.
template <bool kNear>
QCOMM_INLINE void fetch_row(const void* from, std::int64_t bytes, int step) {
    constexpr int kLine = 64;
    const char* const at = static_cast<const char*>(from) + bytes * step;
    for (std::int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(at + i, 0, kNear ? 3 : 2);
}

// Prefetches the source of the `symbols` symbols of step `step` of the next block. With a residual there is more to
// read than can be hidden, and the nearer cache was 5 % faster; without one it was slower.
QCOMM_INLINE void fetch(const Ahead& ahead, int step, int symbols) {
    if (ahead.residual != nullptr) {
        fetch_row<true>(ahead.first, std::int64_t{ahead.bytes} * symbols, step);
        fetch_row<true>(ahead.residual, std::int64_t{sizeof(float)} * symbols, step);
    } else if (ahead.first != nullptr) {
        fetch_row<false>(ahead.first, std::int64_t{ahead.bytes} * symbols, step);
    }
}

// One step through the scalar path.
QCOMM_INLINE void encode_step(EncodeLanes& lanes, const std::uint16_t* symbols, int n, bool pairs,
                              const std::uint32_t* entries, int step, int live) {
    std::uint32_t codewords[kLanes];
    for (int j = 0; j < live; ++j) codewords[j] = codeword(symbols, n, pairs, entries, step * kLanes + j);
    push_step(lanes, codewords, live);
}

// A start window is a lane's bits below a sentinel, a 1 that says where they end. Returns the number of words, or -1.
inline int finish_lanes(const EncodeLanes& lanes, std::uint32_t* start, const std::uint16_t* words_end) {
    if (lanes.missing) return -1;
    for (int j = 0; j < kLanes; ++j) start[j] = lanes.bits[j] | 1u << lanes.count[j];
    return static_cast<int>(words_end - lanes.words);
}

// A decoder's alphabet is pairs; values are of single symbols.
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

// Takes the start windows; false if one has no sentinel, which no encoder writes.
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

// Decodes one codeword in each of the lanes [0, live). kChecked: there may be fewer words left than lanes ask for.
//
// Nothing is refused here, for a branch would cost more than all the rest. Damaged input leaves its mark: a lane that
// used more bits than it had makes `least` negative, and end_lanes() tells. A lookup stays inside the table, since it
// is masked, and a word is only read where there is one.
template <bool kChecked>
QCOMM_INLINE void decode_step(DecodeLanes& lanes, const std::uint16_t* entries, std::uint32_t mask, int live,
                              std::uint16_t* symbols) {
    const std::uint8_t* words = lanes.words;
    std::int64_t left = lanes.left;
    std::int32_t least = lanes.least;
    for (int j = 0; j < live; ++j) {
        std::uint32_t x = lanes.bits[j];
        const std::uint32_t entry = entries[x & mask];
        symbols[j] = static_cast<std::uint16_t>(entry & 0xFFFu);
        x >>= entry >> 12;
        std::int32_t c = lanes.count[j] - static_cast<std::int32_t>(entry >> 12);
        least = c < least ? c : least;
        // A word is read every time and taken only where one is needed.
        const std::uint32_t taken = mask_of(c < static_cast<std::int32_t>(kWordBits) && (!kChecked || left > 0));
        std::uint16_t word = 0;
        if (!kChecked || left > 0) __builtin_memcpy(&word, words, sizeof(word));
        // Only damaged input has a negative count; its result is thrown away, but the shift must stay defined.
        lanes.bits[j] = x | (static_cast<std::uint32_t>(word) << (c & 31) & taken);
        lanes.count[j] = c + static_cast<std::int32_t>(kWordBits & taken);
        words += sizeof(word) & taken;
        left -= taken & 1u;
    }
    lanes.words = words;
    lanes.left = left;
    lanes.least = least;
}

// From symbol `begin`, with which a step begins, to the last.
inline void decode_rest(DecodeLanes& lanes, const CodedBlock& block, bool pairs, const DecodeTable& table, int begin) {
    const std::uint16_t* entries = table.entries.data();
    const int per_codeword = pairs ? 2 : 1;
    for (; begin < block.count; begin += per_codeword * kLanes) {
        const int codewords = (block.count - begin + per_codeword - 1) / per_codeword;
        std::uint16_t decoded[kLanes];
        std::uint16_t* const symbols = pairs ? decoded : block.symbols + begin;
        const int live = codewords < kLanes ? codewords : kLanes;
        if (live == kLanes && lanes.left >= kLanes) {
            decode_step<false>(lanes, entries, table.mask, kLanes, symbols);
        } else {
            decode_step<true>(lanes, entries, table.mask, live, symbols);
        }
        if (pairs) split_pairs(decoded, live, block.symbols + begin);
    }
}

// Whether the bits end where the codewords do: nothing is left over, nothing was taken from beyond.
inline bool end_lanes(const DecodeLanes& lanes) {
    std::uint32_t left = 0;
    for (int j = 0; j < kLanes; ++j) left |= lanes.bits[j];
    return left == 0 && lanes.least >= 0;
}
