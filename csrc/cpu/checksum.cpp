// A long segment's checksum has two levels: pieces are independent of each other, so any number of threads, or of
// warps, computes the same result.
#include "qcomm/checksum.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "qcomm/format.h"
#include "qcomm/parallel.h"

namespace qcomm {
namespace {

constexpr std::int64_t kPiecesPerThread = 32;  // 2 MiB: a checksum is an order of magnitude cheaper than coding

}  // namespace

std::uint32_t checksum(const std::uint8_t* data, std::int64_t bytes) { return kernels().checksum(data, bytes); }

// The inner checksums are words in memory, so the outer one is a checksum like any other. An empty segment has no
// pieces.
std::uint32_t checksum_pieces(const std::uint8_t* data, std::int64_t bytes, int threads) {
    const std::int64_t count = ceil_div(bytes, kChecksumPiece);
    std::vector<std::uint32_t> pieces(static_cast<std::size_t>(count));
    parallel_for(count, part_count(count, kPiecesPerThread, threads), [&](int, std::int64_t first, std::int64_t last) {
        for (std::int64_t i = first; i < last; ++i) {
            const std::int64_t at = i * kChecksumPiece;
            pieces[static_cast<std::size_t>(i)] =
                checksum(data + at, std::min<std::int64_t>(kChecksumPiece, bytes - at));
        }
    });
    return checksum(reinterpret_cast<const std::uint8_t*>(pieces.data()), 4 * count);
}

}  // namespace qcomm
