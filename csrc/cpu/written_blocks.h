// Blocks that a writer has put one behind the other, and their entries in the metadata.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "qcomm/checksum.h"
#include "qcomm/format.h"

namespace qcomm {

struct WrittenBlocks {
    std::int64_t bytes = 0;                       // of all blocks
    std::vector<std::uint32_t> sizes, checksums;  // of each: in units of 4 bytes; 0 where none are wanted

    // Makes room for `blocks` blocks; end_block() then allocates nothing.
    void reserve(std::int64_t blocks) {
        sizes.reserve(static_cast<std::size_t>(blocks));
        checksums.reserve(static_cast<std::size_t>(blocks));
    }
    void clear() {
        bytes = 0;
        sizes.clear();
        checksums.clear();
    }
    // Ends the block [begin, at), which is filled with zeros to 4 bytes.
    void end_block(std::uint8_t* begin, std::uint8_t* at, bool has_checksum) {
        const std::int64_t used = at - begin, padded = align4(used);
        std::memset(at, 0, static_cast<std::size_t>(padded - used));
        bytes += padded;
        sizes.push_back(static_cast<std::uint32_t>(padded / 4));
        checksums.push_back(has_checksum ? checksum(begin, padded) : 0u);
    }
};

}  // namespace qcomm
