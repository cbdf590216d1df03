// Loops that a compiler vectorises by itself, compiled once for each instruction set. Included inside a namespace of
// that set; includes nothing and calls only always-inlined helpers, so that no function compiled for one processor can
// be linked into code for another.

// u in the arithmetic of the dtype, behind the untyped pointer that the table of kernels has.
template <class Tr>
inline typename Tr::Arithmetic* as_arithmetic(void* u) {
    return static_cast<typename Tr::Arithmetic*>(u);
}
template <class Tr>
inline const typename Tr::Arithmetic* as_arithmetic(const void* u) {
    return static_cast<const typename Tr::Arithmetic*>(u);
}

// Calls f(u) with u(i), the i-th of the values behind `begin`. The branches are taken once, so loops over i vectorise;
// a factor of 1 changes nothing.
template <class Tr, class F>
QCOMM_INLINE decltype(auto) with_values(const Values& values, std::int64_t begin, F&& f) {
    using T = typename Tr::Arithmetic;
    const auto* data = static_cast<const typename Tr::Storage*>(values.data) + begin;
    const auto inv_scale = static_cast<T>(values.inv_scale);
    if (!values.is_adjusted()) return f([=](int i) { return Tr::widen(data[i]); });
    if (values.residual == nullptr) return f([=](int i) { return Tr::widen(data[i]) * inv_scale; });
    const float* residual = values.residual + begin;
    return f([=](int i) { return Tr::widen(data[i]) * inv_scale + static_cast<T>(residual[i]); });
}

// u in memory, for blocks whose values are not their own u.
void load(const Values& values, std::int64_t begin, int n, void* u) {
    dispatch(values.dtype, [&](auto traits) {
        using Tr = decltype(traits);
        with_values<Tr>(values, begin, [&](const auto& value) {
            auto* const out = as_arithmetic<Tr>(u);
            for (int i = 0; i < n; ++i) out[i] = value(i);
        });
    });
}

// Tells whether squares of T, and sums of a block of them, neither overflow nor round in float64: they are finite where
// the values are, and a fused addition changes nothing.
template <class T>
constexpr bool kHasWideSquares = sizeof(T) < sizeof(double);

// Returns sum + x * x. The product of two float32 is exact in float64, so a fused addition rounds where the plain one
// does; the product of two float64 is not, so there it may not be fused.
template <class T>
QCOMM_INLINE double add_square(double sum, T x) {
    const auto wide = static_cast<double>(x);
#ifdef QCOMM_HAS_FMA
    if (kHasWideSquares<T>) return __builtin_fma(wide, wide, sum);
#endif
    return sum + wide * wide;
}

// Lane j has the values j, j + 32, ... of a block.
template <class T>
struct LaneStatistics {
    T low[kLanes], high[kLanes], poison[kLanes];  // poison: x * 0 is NaN for every non-finite x
    double squares[kLanes];
};

// Folds 32 lanes to one: lane j takes lane j + 16, then 8, 4, 2, 1. The order is the format's, and a warp's.
template <class T>
BlockStatistics fold(LaneStatistics<T>& lanes) {
    for (int d = kLanes / 2; d > 0; d /= 2) {
        for (int j = 0; j < d; ++j) {
            lanes.low[j] = lanes.low[j + d] < lanes.low[j] ? lanes.low[j + d] : lanes.low[j];
            lanes.high[j] = lanes.high[j + d] > lanes.high[j] ? lanes.high[j + d] : lanes.high[j];
            lanes.poison[j] += lanes.poison[j + d];
            lanes.squares[j] += lanes.squares[j + d];
        }
    }
    const bool finite = lanes.poison[0] == T(0) && (kHasWideSquares<T> ? __builtin_isfinite(lanes.squares[0]) : true);
    return {static_cast<double>(lanes.low[0]), static_cast<double>(lanes.high[0]), lanes.squares[0], finite};
}

// Lanes hold independent accumulators, so vectorising reorders no addition. Comparisons are written so that a NaN never
// replaces an extreme. Where squares are wide a NaN or an infinity shows in their sum, and needs no sum of its own.
// fetch(i) comes before the row that begins with value i.
template <class T, class Value, class Fetch>
QCOMM_INLINE BlockStatistics measure_values(const Value& value, int n, const Fetch& fetch) {
    LaneStatistics<T> lanes;
    for (int j = 0; j < kLanes; ++j) {
        lanes.low[j] = static_cast<T>(__builtin_inf());
        lanes.high[j] = -static_cast<T>(__builtin_inf());
        lanes.poison[j] = 0;
        lanes.squares[j] = 0;
    }
    const auto add_row = [&](int begin, int width) {
        for (int j = 0; j < width; ++j) {
            const T x = value(begin + j);
            lanes.low[j] = x < lanes.low[j] ? x : lanes.low[j];
            lanes.high[j] = x > lanes.high[j] ? x : lanes.high[j];
            if (!kHasWideSquares<T>) lanes.poison[j] += x * T(0);
            lanes.squares[j] = add_square(lanes.squares[j], x);
        }
    };
    // Whole rows have a constant width, for which compilers make vector code; the last row may be short.
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        fetch(i);
        add_row(i, kLanes);
    }
    add_row(i, n - i);
    return fold(lanes);
}

BlockStatistics measure(const Values& values, std::int64_t begin, int n) {
    return dispatch(values.dtype, [&](auto traits) {
        using Tr = decltype(traits);
        // The next block is asked for meanwhile: it often lies on another page, where no processor looks ahead.
        const bool has_next = begin + 2 * n <= values.count;
        const auto* const next = static_cast<const typename Tr::Storage*>(values.data) + (has_next ? begin + n : begin);
        constexpr int kLine = 64 / static_cast<int>(sizeof(*next));
        const auto fetch = [&](int i) {
            for (int line = 0; line < kLanes; line += kLine) __builtin_prefetch(next + i + line);
        };
        return with_values<Tr>(
            values, begin, [&](const auto& value) { return measure_values<typename Tr::Arithmetic>(value, n, fetch); });
    });
}

// Two passes over symbols in the nearest cache: one that mostly ends after a group, and one that counts, where there
// can be escapes. Each is a loop that compilers turn into a few vector instructions.
SymbolScan scan(const std::uint16_t* symbols, int n, const Quantizer& quantizer) {
    // A block of equal symbols is rare: the first few tell.
    constexpr int kGroup = 128;
    std::uint16_t different = 0;
    for (int begin = 0; begin < n && different == 0; begin += kGroup) {
        const int end = begin + kGroup < n ? begin + kGroup : n;
        for (int i = begin; i < end; ++i) different |= static_cast<std::uint16_t>(symbols[i] ^ symbols[0]);
    }
    // Range grids have no escapes to count.
    if (quantizer.grid != Grid::kSigma) return {0, different == 0};
    const auto escape = static_cast<std::uint16_t>(escape_of(quantizer));
    int escapes = 0;
    for (int i = 0; i < n; ++i) escapes += symbols[i] == escape;
    return {escapes, different == 0};
}

// Positions of a rare symbol: whole groups are passed over with a comparison that compilers turn into vector
// instructions. In the others a branch at each symbol would be guessed wrong at each one that is found.
QCOMM_INLINE int find_symbol_in_groups(const std::uint16_t* symbols, int n, int symbol, std::uint16_t* positions) {
    constexpr int kGroup = 64;
    int count = 0;
    for (int begin = 0; begin < n; begin += kGroup) {
        const int end = begin + kGroup < n ? begin + kGroup : n;
        int found = 0;
        for (int i = begin; i < end; ++i) found |= symbols[i] == symbol;
        for (int i = begin; found != 0 && i < end; ++i) {
            positions[count] = static_cast<std::uint16_t>(i);
            count += symbols[i] == symbol;
        }
    }
    return count;
}

// The first loop has no condition in it, so it vectorises on every processor; the scan is a second loop over symbols
// that are still in the nearest cache.
SymbolScan quantize(const void* u, DType dtype, int n, const Quantizer& quantizer, std::uint16_t* symbols) {
    dispatch(dtype, [&](auto traits) {
        using Tr = decltype(traits);
        const auto* values = as_arithmetic<Tr>(u);
        with_grid<Tr>(quantizer, [&](const auto& grid) {
            for (int i = 0; i < n; ++i) symbols[i] = static_cast<std::uint16_t>(grid(values[i]));
        });
    });
    return scan(symbols, n, quantizer);
}

// Computes symbols and residuals of values [begin, begin + n) of a run; calls keep(i, u) for each. Residuals may be
// written where they were read: each value's own.
template <class Tr, class Grid, class Value, class Keep>
QCOMM_INLINE void quantize_row(const Grid& grid, const Value& value, int escape, int begin, int n,
                               std::uint16_t* symbols, float* residual, const Keep& keep) {
    QCOMM_INDEPENDENT
    for (int i = begin; i < begin + n; ++i) {
        const typename Tr::Arithmetic x = value(i);
        const std::uint32_t symbol = grid(x);
        const auto lost = static_cast<float>(x - Tr::widen(Tr::narrow(grid.decode(symbol))));
        keep(i, x);
        symbols[i] = static_cast<std::uint16_t>(symbol);
        residual[i] = static_cast<int>(symbol) == escape ? 0.0f : lost;
    }
}

// In one pass: values and residuals come from memory, and are far more bytes than symbols.
SymbolScan quantize_residual(const Values& values, std::int64_t begin, int n, const Quantizer& quantizer, void* u,
                             std::uint16_t* symbols, float* residual) {
    dispatch(values.dtype, [&](auto traits) {
        using Tr = decltype(traits);
        using T = typename Tr::Arithmetic;
        auto* const loaded = as_arithmetic<Tr>(u);
        const int escape = escape_of(quantizer);
        with_grid<Tr>(quantizer, [&](const auto& grid) {
            const auto copy = grid;
            with_values<Tr>(values, begin, [&](const auto& value) {
                quantize_row<Tr>(copy, value, escape, 0, n, symbols, residual, [=](int i, T x) { loaded[i] = x; });
            });
        });
    });
    return scan(symbols, n, quantizer);
}

// The arithmetic of the next values and the increments of earlier ones run side by side. Symbols that were stored only
// just now are left for later: the processor would wait for them.
template <class Quantize>
QCOMM_INLINE void count_behind(const Quantize& quantize_batch, int n, const std::uint16_t* symbols,
                               CodewordCounts* counts) {
    // A batch is a few vector instructions; the lag is longer than a store takes to reach the cache.
    constexpr int kBatch = 32, kLag = 4 * kBatch;
    int done = 0, counted = 0;
    for (; done + kBatch <= n; done += kBatch) {
        quantize_batch(done, kBatch);
        if (done - counted < kLag) continue;
        counts->add(symbols + counted, kBatch);
        counted += kBatch;
    }
    quantize_batch(done, n - done);
    counts->add(symbols + counted, n - counted);
}

// The branches on dtype, grid, scale and residual are taken once, outside: the innermost loop is straight code of which
// a version is compiled for each combination.
void quantize_counted(const Values& values, std::int64_t begin, int n, const Quantizer& quantizer,
                      std::uint16_t* symbols, CodewordCounts* counts, float* residual) {
    dispatch(values.dtype, [&](auto traits) {
        using Tr = decltype(traits);
        const int escape = escape_of(quantizer);
        with_grid<Tr>(quantizer, [&](const auto& grid) {
            const auto copy = grid;  // which stores cannot be taken to change
            with_values<Tr>(values, begin, [&](const auto& value) {
                if (residual == nullptr) {
                    const auto batch = [&](int at, int count) __attribute__((always_inline)) {
                        for (int i = at; i < at + count; ++i) symbols[i] = static_cast<std::uint16_t>(copy(value(i)));
                    };
                    count_behind(batch, n, symbols, counts);
                } else {
                    const auto batch = [&](int at, int count) __attribute__((always_inline)) {
                        quantize_row<Tr>(copy, value, escape, at, count, symbols, residual,
                                         [](int, typename Tr::Arithmetic) {});
                    };
                    count_behind(batch, n, symbols, counts);
                }
            });
        });
    });
}

// decode() of an escape symbol means nothing, but is a number: it is computed for all and chosen against, without a
// branch.
void update_residual(const void* u, DType dtype, const std::uint16_t* symbols, int n, const Quantizer& quantizer,
                     float* residual) {
    dispatch(dtype, [&](auto traits) {
        using Tr = decltype(traits);
        const auto* values = as_arithmetic<Tr>(u);
        const int escape = escape_of(quantizer);
        with_grid<Tr>(quantizer, [&](const auto& grid) {
            for (int i = 0; i < n; ++i) {
                const auto lost = static_cast<float>(values[i] - Tr::widen(Tr::narrow(grid.decode(symbols[i]))));
                residual[i] = symbols[i] == escape ? 0.0f : lost;
            }
        });
    });
}

// An escape's value is 0 here, so that adding it changes nothing; the decoder puts its own in place afterwards.
template <class Tr, bool kAccumulates, class Grid>
QCOMM_INLINE void dequantize_row(const Grid& grid, int escape, const std::uint16_t* symbols, int n,
                                 typename Tr::Storage* values) {
    using V = decltype(grid.decode(0u));
    for (int i = 0; i < n; ++i) {
        const typename Tr::Storage value = Tr::narrow(symbols[i] == escape ? V(0) : grid.decode(symbols[i]));
        values[i] = kAccumulates ? Tr::narrow(Tr::widen(values[i]) + Tr::widen(value)) : value;
    }
}

#ifndef QCOMM_HAS_FMA
// Without an instruction for it a fused multiply-add is a call: an alphabet's values are computed once a block.
class TabledGrid {
public:
    static constexpr int kMaxBits = 10;

    TabledGrid(const RangeQuantizer& grid, int num_bits) {
        for (std::uint32_t s = 0; s < 1u << num_bits; ++s) values_[s] = grid.decode(s);
    }
    QCOMM_INLINE double decode(std::uint32_t symbol) const { return values_[symbol & ((1u << kMaxBits) - 1u)]; }

private:
    double values_[1 << kMaxBits];
};
#endif

// The destination may hold values to which these are added, in the arithmetic of the dtype and rounded once.
void dequantize(const std::uint16_t* symbols, int n, const Quantizer& quantizer, DType dtype, void* out,
                bool accumulate) {
    const int escape = escape_of(quantizer);
    dispatch(dtype, [&](auto traits) {
        using Tr = decltype(traits);
        auto* values = static_cast<typename Tr::Storage*>(out);
        const auto dequantize_with = [&](const auto& grid) {
            if (accumulate) {
                dequantize_row<Tr, true>(grid, escape, symbols, n, values);
            } else {
                dequantize_row<Tr, false>(grid, escape, symbols, n, values);
            }
        };
#ifndef QCOMM_HAS_FMA
        // Pays where there are more values than symbols.
        if (is_range(quantizer.grid) && quantizer.num_bits <= TabledGrid::kMaxBits && n >> quantizer.num_bits > 1)
            return dequantize_with(TabledGrid(range_quantizer(quantizer), quantizer.num_bits));
#endif
        with_grid<Tr>(quantizer, dequantize_with);
    });
}

// For versions whose lanes only decode symbols: the values follow while these are in the nearest cache.
inline void dequantize_block(const CodedBlock& block, const LaneDecoding& how) {
    if (block.whole && block.values != nullptr)
        dequantize(block.symbols, block.count, how.quantizer, how.dtype, block.values, how.accumulate);
}

// One row of the checksum: lane j takes word j. Each step can be undone, as the multiplier is odd, so two words that
// differ leave lanes that differ; and lanes are independent, so the row is one vector operation.
QCOMM_INLINE void absorb(std::uint32_t* h, const std::uint32_t* words, int count) {
    for (int j = 0; j < count; ++j) {
        h[j] = (h[j] ^ words[j]) * 0x85EBCA6Bu;
        h[j] ^= h[j] >> 15;
    }
}

// Rows of 32 words, then lanes fold in the order of a warp: 16, 8, 4, 2, 1. The rotation tells the upper half from the
// lower.
std::uint32_t checksum(const std::uint8_t* data, std::int64_t bytes) {
    std::uint32_t h[kLanes];
    for (int j = 0; j < kLanes; ++j) h[j] = 0x9E3779B9u * static_cast<std::uint32_t>(j + 1);
    std::uint32_t row[kLanes];
    constexpr std::int64_t kRow = sizeof(row);
    std::int64_t at = 0;
    for (; bytes - at >= kRow; at += kRow) {
        __builtin_memcpy(row, data + at, sizeof(row));
        absorb(h, row, kLanes);
    }
    // The last row may be short: words that are not there are not absorbed, bytes that are not there are 0.
    if (at < bytes) {
        __builtin_memset(row, 0, sizeof(row));
        __builtin_memcpy(row, data + at, static_cast<std::size_t>(bytes - at));
        absorb(h, row, static_cast<int>((bytes - at + 3) / 4));
    }
    for (int d = kLanes / 2; d > 0; d /= 2) {
        for (int j = 0; j < d; ++j) h[j] = h[j] * 0xC2B2AE35u ^ (h[j + d] << 13 | h[j + d] >> 19);
    }
    return h[0] ^ static_cast<std::uint32_t>(bytes);
}

void divide_to_bfloat(const float* values, std::int64_t count, float divisor, std::uint16_t* out) {
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint32_t bits = bit_cast<std::uint32_t>(values[i]);
        // Whether it is a NaN is asked once, not for each rounding, which took a fifth longer.
        const auto once = bit_cast<float>(round_to_upper_half(bits) & 0xFFFF0000u);
        const std::uint32_t twice = round_to_upper_half(bit_cast<std::uint32_t>(once / divisor));
        out[i] = is_nan(bits) ? quiet_bfloat(bits) : static_cast<std::uint16_t>(twice >> 16);
    }
}
