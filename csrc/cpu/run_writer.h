// Run blocks, writing: the values of all segments of coding runs, one behind the other, cut into blocks that do not
// care where a segment ends. Each thread has a writer of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "qcomm/packet.h"
#include "qcomm/zero_runs.h"

namespace qcomm {

// A segment of coding runs, and the number of such values in front of it.
struct RunPart {
    SegmentInput in;
    std::int64_t first = 0;
};

// Returns the most bytes of the run blocks of so many values: all of them fixed.
inline std::int64_t max_run_block_bytes(std::int64_t values, std::int64_t blocks) {
    return packed_bytes(values, kRunsBits) + 8 * blocks;
}

// Owns a block's scratch, about 1 MiB, of which mostly a third is used. It borrows the options.
class RunWriter {
public:
    explicit RunWriter(const EncodeOptions& options);

    // Writes blocks [first, last) of the `values` values of all parts to `out`, where max_run_block_bytes() of them
    // fit.
    void write(const std::vector<RunPart>& parts, std::int64_t values, std::int64_t first, std::int64_t last,
               std::uint8_t* out);
    // Makes room for the results of `blocks` blocks with `parts` parts; `write` then allocates nothing.
    void reserve(std::int64_t blocks, std::int64_t parts);

    // Results of the last write: bytes in all, and for each block its size in units of 4 bytes, and its checksum.
    std::int64_t bytes = 0;
    std::vector<std::uint32_t> sizes, checksums;
    // And of each part in each block, in order: the number of the part, and its sample there.
    struct PartSample {
        std::size_t part;
        RunSample sample;
        bool is_lost;  // the block is not finite
    };
    std::vector<PartSample> samples;

private:
    int find_levels(const std::vector<RunPart>& parts, std::int64_t begin, std::int64_t end, bool* finite);
    void restore(const std::vector<RunPart>& parts, std::int64_t begin, std::int64_t end);
    void write_block(int n, int nonzeros, bool finite, std::uint8_t* out);
    std::uint8_t* put_fixed(int n, int nonzeros, std::uint8_t* at);

    const EncodeOptions& options_;
    const Kernels& kernels_;
    std::unique_ptr<float[]> old_;  // residuals before the block
    std::unique_ptr<std::uint16_t[]> positions_;
    std::unique_ptr<std::int8_t[]> levels_;
    std::unique_ptr<std::uint16_t[]> symbols_;  // of a fixed block, which is rare
    std::unique_ptr<std::uint32_t[]> tokens_;
    std::unique_ptr<std::uint16_t[]> words_;
};

}  // namespace qcomm
