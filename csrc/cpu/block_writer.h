// Blocks, writing: values are quantized, coded and put into one of the four modes. Each thread has a writer of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "qcomm/packet.h"
#include "written_blocks.h"

namespace qcomm {

constexpr int kRun = 2048;  // values that are worked on at a time: they stay in the first-level cache

// Returns the most bytes that n values take in blocks, whatever their modes: raw values, an info word, and at most 3
// zeros behind them.
inline std::int64_t max_block_bytes(std::int64_t values, std::int64_t blocks, DType dtype) {
    return values * item_bytes(dtype) + 8 * blocks;
}

// Owns a block's scratch, about 350 KiB, which is why writers are kept from one segment of a packet to the next. It
// borrows the options.
class BlockWriter {
public:
    explicit BlockWriter(const EncodeOptions& options);

    // Writes blocks [first, last) of a segment to `out`. `known` are the segment's symbols, or null: then each block is
    // quantized just before it is coded. Without a table there are no coded blocks.
    void write(const SegmentInput& in, const Quantizer& q, const EncodeTable* table, const std::uint16_t* known,
               std::int64_t first, std::int64_t last, std::uint8_t* out);

    WrittenBlocks written;  // by the last write, which allocates nothing if there is room for its blocks

    // Returns the room for u from value `at` of a block on, in the arithmetic of the dtype.
    void* scratch(int at) const;

private:
    BlockMode write_block(const void* u, const std::uint16_t* symbols, int n, const SymbolScan& scan,
                          const Quantizer& q, const EncodeTable* table, const Ahead& ahead);
    std::uint8_t* put_values(const void* u, int n, std::uint8_t* at) const;
    std::uint8_t* put_escapes(const void* u, const std::uint16_t* symbols, int n, int escape, std::uint8_t* at) const;
    std::uint16_t* words_end() const;

    const EncodeOptions& options_;
    const Kernels& kernels_;
    std::uint8_t* out_ = nullptr;
    // Left uninitialised: clearing them would cost more than encoding a small packet.
    std::unique_ptr<double[]> scratch_;  // room for a block in either arithmetic
    std::unique_ptr<std::uint16_t[]> symbols_;
    std::unique_ptr<std::uint16_t[]> positions_;  // of escapes
    std::unique_ptr<std::uint16_t[]> words_;
    std::uint32_t start_[kLanes] = {};
};

}  // namespace qcomm
