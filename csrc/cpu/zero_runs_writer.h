// Run blocks, writing: the values of all segments of coding runs, one behind the other, cut into blocks that do not
// care where a segment ends. Each thread has a writer of its own.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "qcomm/packet.h"
#include "qcomm/zero_runs.h"
#include "written_blocks.h"

namespace qcomm {

// The segments of coding runs, and where their values begin, as for_parts() takes them.
struct RunParts {
    std::vector<SegmentInput> segments;
    std::vector<std::int64_t> firsts{0};

    void add(const SegmentInput& segment) {
        segments.push_back(segment);
        firsts.push_back(firsts.back() + segment.values.count);
    }
    std::int64_t values() const { return firsts.back(); }
};

// Returns the most bytes of the run blocks of so many values: all of them fixed.
inline std::int64_t max_run_block_bytes(std::int64_t values, std::int64_t blocks) {
    return packed_bytes(values, kRunsBits) + 8 * blocks;
}

// Owns a block's scratch, about 1 MiB, of which mostly a third is used. It borrows the options.
class RunWriter {
public:
    explicit RunWriter(const EncodeOptions& options);

    // Writes blocks [first, last) of all parts to `out`, where max_run_block_bytes() of them fit.
    void write(const RunParts& parts, std::int64_t first, std::int64_t last, std::uint8_t* out);
    // Makes room for the results of `blocks` blocks with `parts` parts; `write` then allocates nothing.
    void reserve(std::int64_t blocks, std::int64_t parts);

    // Results of the last write: its blocks, and of each part in each block, in order, its number and its sample there.
    WrittenBlocks written;
    struct PartSample {
        std::size_t part;
        RunSample sample;
        bool is_lost;  // the block is not finite
    };
    std::vector<PartSample> samples;

private:
    int find_levels(const RunParts& parts, std::int64_t begin, std::int64_t end, bool* finite);
    void restore(const RunParts& parts, std::int64_t begin, std::int64_t end);
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
