#include "qcomm/checksum.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "qcomm/format.h"

namespace qcomm {

std::uint32_t checksum(const std::uint8_t* data, std::int64_t bytes) { return kernels().checksum(data, bytes); }

std::uint32_t checksum_pieces(const std::uint8_t* data, std::int64_t bytes) {
    std::vector<std::uint32_t> pieces(static_cast<std::size_t>(ceil_div(bytes, kChecksumPiece)));
    for (std::size_t i = 0; i < pieces.size(); ++i) {
        const std::int64_t at = static_cast<std::int64_t>(i) * kChecksumPiece;
        pieces[i] = checksum(data + at, std::min<std::int64_t>(kChecksumPiece, bytes - at));
    }
    return checksum(reinterpret_cast<const std::uint8_t*>(pieces.data()), 4 * static_cast<std::int64_t>(pieces.size()));
}

}  // namespace qcomm
