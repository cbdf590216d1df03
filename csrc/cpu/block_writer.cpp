// A block goes through three steps while its values are in a core's caches:
//
//   values   -> symbols   in runs of kRun, together with the new residual and a scan for escapes
//   symbols  -> words     encode_lanes, into words_; skipped where the block cannot be coded
//   all      -> bytes     choose_mode() of block.h picks one of four forms, which are put one part behind the other
//
// Nothing is allocated in these steps, so that they may run on a thread that must not throw.
#include "block_writer.h"

#include <algorithm>
#include <cstring>

#include "qcomm/block.h"
#include "qcomm/checksum.h"

namespace qcomm {
namespace {

constexpr std::int64_t kInfoBytes = sizeof(std::uint32_t);

// Returns the source of the block from `begin` on, if it is a whole one: its values, or its symbols if they are known.
// encode_lanes prefetches it while it computes, because a block's first pass would otherwise wait for memory.
Ahead ahead_of(const SegmentInput& in, const std::uint16_t* known, std::int64_t begin, std::int64_t count) {
    if (begin + count > in.values.count) return {};
    if (known != nullptr) return {known + begin, sizeof(*known), nullptr};
    const std::int64_t item = item_bytes(in.values.dtype);
    return {static_cast<const std::uint8_t*>(in.values.data) + begin * item, static_cast<int>(item),
            in.values.residual != nullptr ? in.values.residual + begin : nullptr};
}

}  // namespace

BlockWriter::BlockWriter(const EncodeOptions& options)
    : options_(options),
      kernels_(kernels()),
      scratch_(new double[kMaxBlockValues]),
      symbols_(new std::uint16_t[kMaxBlockValues]),
      positions_(new std::uint16_t[kMaxBlockValues + kPositionsSlack]),
      words_(new std::uint16_t[kWordsSlack + kMaxCodewords]) {}

// One array of float64 serves both arithmetics.
void* BlockWriter::scratch(int at) const {
    return reinterpret_cast<std::uint8_t*>(scratch_.get()) + at * (options_.dtype == DType::kFloat64 ? 8 : 4);
}

// Words grow downwards from here. In front of the most that a block can have there is room for a vector store.
std::uint16_t* BlockWriter::words_end() const { return words_.get() + kWordsSlack + kMaxCodewords; }

void BlockWriter::write(const SegmentInput& in, const Quantizer& q, const EncodeTable* table,
                        const std::uint16_t* known, std::int64_t first, std::int64_t last, std::uint8_t* out) {
    out_ = out;
    written.clear();
    const std::int64_t per_block = values_per_block(q.coding, options_.steps);
    // Symbols that were quantized before need values only for escapes, which range grids do not have. Nor are their
    // blocks ever raw: fixed width is shorter.
    const bool with_values = known == nullptr || !is_range(q.grid);
    for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t begin = i * per_block;
        const int n = static_cast<int>(std::min(per_block, in.values.count - begin));
        std::uint16_t* const quantized = symbols_.get();
        const std::uint16_t* symbols = known != nullptr ? known + begin : quantized;
        SymbolScan scan{0, true};
        // In runs that stay in the first-level cache from the values to the new residual.
        for (int at = 0; at < n; at += kRun) {
            const int m = std::min(kRun, n - at);
            float* const residual = in.residual_out != nullptr && with_values ? in.residual_out + begin + at : nullptr;
            SymbolScan part{0, true};
            if (known == nullptr && residual != nullptr) {
                part = kernels_.quantize_residual(in.values, begin + at, m, q, scratch(at), quantized + at, residual);
            } else {
                const void* u = with_values ? load_block(kernels_, in.values, begin + at, m, scratch(at)) : nullptr;
                part = known != nullptr ? kernels_.scan(symbols + at, m, q)
                                        : kernels_.quantize(u, options_.dtype, m, q, quantized + at);
                if (residual != nullptr) kernels_.update_residual(u, options_.dtype, symbols + at, m, q, residual);
            }
            scan.escapes += part.escapes;
            // A run compares its symbols with its first one; here the runs' first symbols are compared.
            scan.constant &= part.constant && symbols[at] == symbols[0];
        }
        // The residual may be part of u and has been overwritten by now, so u is taken from the scratch, unless it is
        // the values themselves.
        const void* u = in_place(in.values, begin);
        const BlockMode mode = write_block(u != nullptr ? u : scratch(0), symbols, n, scan, q, table,
                                           ahead_of(in, known, begin + per_block, per_block));
        // The residuals were computed before the mode was known, while u was at hand. A raw block loses nothing.
        if (mode == BlockMode::kRaw && in.residual_out != nullptr) std::fill_n(in.residual_out + begin, n, 0.0f);
    }
}

BlockMode BlockWriter::write_block(const void* u, const std::uint16_t* symbols, int n, const SymbolScan& scan,
                                   const Quantizer& q, const EncodeTable* table, const Ahead& ahead) {
    const bool constant = scan.constant && symbols[0] != escape_of(q);
    // Coding is the dear part. It is left out where the mode is decided without it: constant blocks, and raw ones by
    // their escapes. `words` is -1 where there is no code, or a symbol has no codeword in it.
    BlockShape shape{n, q.num_bits, static_cast<int>(item_bytes(options_.dtype)), scan.escapes, -1};
    if (!constant && !shape.has_too_many_escapes() && table != nullptr) {
        shape.words = kernels_.encode_lanes(symbols, n, q.coding == Coding::kPair, *table, ahead, start_, words_end());
    }
    const BlockMode mode = choose_mode(shape, constant, shape.words >= 0);

    // The order of the parts is the format's: info, start windows, escapes, and words, packed symbols or values.
    std::uint8_t* const begin = out_ + written.bytes;
    std::uint8_t* at = begin;
    const auto put = [&](const void* data, std::int64_t size) {
        std::memcpy(at, data, static_cast<std::size_t>(size));
        at += size;
    };
    const bool with_escapes = scan.escapes > 0 && (mode == BlockMode::kFixed || mode == BlockMode::kCoded);
    const std::uint32_t info = BlockInfo{mode, with_escapes ? scan.escapes : 0, constant ? symbols[0] : 0u}.pack();
    put(&info, kInfoBytes);
    if (mode == BlockMode::kCoded) put(start_, sizeof(start_));
    if (with_escapes) at = put_escapes(u, symbols, n, escape_of(q), at);
    if (mode == BlockMode::kCoded) put(words_end() - shape.words, 2 * std::int64_t{shape.words});
    if (mode == BlockMode::kFixed) {
        pack_bits(symbols, n, q.num_bits, at);
        at += packed_bytes(n, q.num_bits);
    }
    if (mode == BlockMode::kRaw) at = put_values(u, n, at);
    written.end_block(begin, at, options_.checksums);
    return mode;
}

// Puts values in the packet's dtype, unaligned; returns the end.
std::uint8_t* BlockWriter::put_values(const void* u, int n, std::uint8_t* at) const {
    return dispatch(options_.dtype, [&](auto traits) {
        using Tr = decltype(traits);
        for (int i = 0; i < n; ++i, at += sizeof(typename Tr::Storage)) {
            const typename Tr::Storage value = Tr::narrow(static_cast<const typename Tr::Arithmetic*>(u)[i]);
            std::memcpy(at, &value, sizeof(value));
        }
        return at;
    });
}

// Puts the values of the escape symbols, then their positions; returns the end.
std::uint8_t* BlockWriter::put_escapes(const void* u, const std::uint16_t* symbols, int n, int escape,
                                       std::uint8_t* at) const {
    const int count = kernels_.find_symbol(symbols, n, escape, positions_.get());
    return dispatch(options_.dtype, [&](auto traits) {
        using Tr = decltype(traits);
        const auto* const values = static_cast<const typename Tr::Arithmetic*>(u);
        for (int i = 0; i < count; ++i, at += sizeof(typename Tr::Storage)) {
            const typename Tr::Storage value = Tr::narrow(values[positions_[static_cast<std::size_t>(i)]]);
            std::memcpy(at, &value, sizeof(value));
        }
        std::memcpy(at, positions_.get(), 2 * static_cast<std::size_t>(count));
        return at + std::int64_t{2} * count;
    });
}

}  // namespace qcomm
