#include "qcomm/checksum.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "qcomm/format.h"

namespace qcomm {
namespace {

void absorb(std::uint32_t* h, const std::uint32_t* words, int count) {
    for (int j = 0; j < count; ++j) {
        h[j] = (h[j] ^ words[j]) * 0x85EBCA6Bu;
        h[j] ^= h[j] >> 15;
    }
}

}  // namespace

std::uint32_t checksum(const std::uint8_t* data, std::int64_t bytes) {
    std::uint32_t h[kLanes];
    for (int j = 0; j < kLanes; ++j) h[j] = 0x9E3779B9u * static_cast<std::uint32_t>(j + 1);
    std::uint32_t row[kLanes];
    std::int64_t at = 0;
    for (; bytes - at >= static_cast<std::int64_t>(sizeof(row)); at += sizeof(row)) {
        std::memcpy(row, data + at, sizeof(row));
        absorb(h, row, kLanes);
    }
    if (at < bytes) {
        std::memset(row, 0, sizeof(row));
        std::memcpy(row, data + at, static_cast<std::size_t>(bytes - at));
        absorb(h, row, static_cast<int>(ceil_div(bytes - at, 4)));
    }
    for (int d = kLanes / 2; d > 0; d /= 2) {
        for (int j = 0; j < d; ++j) h[j] = h[j] * 0xC2B2AE35u ^ (h[j + d] << 13 | h[j + d] >> 19);
    }
    return h[0] ^ static_cast<std::uint32_t>(bytes);
}

std::uint32_t checksum_pieces(const std::uint8_t* data, std::int64_t bytes) {
    std::vector<std::uint32_t> pieces(static_cast<std::size_t>(ceil_div(bytes, kChecksumPiece)));
    for (std::size_t i = 0; i < pieces.size(); ++i) {
        const std::int64_t at = static_cast<std::int64_t>(i) * kChecksumPiece;
        pieces[i] = checksum(data + at, std::min<std::int64_t>(kChecksumPiece, bytes - at));
    }
    return checksum(reinterpret_cast<const std::uint8_t*>(pieces.data()), 4 * static_cast<std::int64_t>(pieces.size()));
}

}  // namespace qcomm
