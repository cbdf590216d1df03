// Sectors and passes of requests.
#include "counts.h"

#include <algorithm>
#include <array>
#include <utility>

namespace ptx {
namespace {

constexpr int kLanes = 32, kBanks = 32, kWordBytes = 4, kSectorBytes = 32, kLargestAccess = 16;

int passes(const std::uint64_t* addresses, std::uint32_t mask, int bytes) {
    // The hardware serves accesses of 8 and 16 bytes in halves and quarters of a warp.
    const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
    int total = 0;
    for (int first = 0; first < kLanes; first += together) {
        std::array<std::uint64_t, kLanes * kLargestAccess / kWordBytes> words;
        std::size_t count = 0;
        for (int lane = first; lane < first + together; ++lane) {
            if ((mask >> lane & 1) == 0) continue;
            const std::uint64_t end = addresses[lane] + static_cast<std::uint64_t>(bytes);
            for (std::uint64_t word = addresses[lane] / kWordBytes; word * kWordBytes < end; ++word)
                words[count++] = word;
        }
        std::sort(words.begin(), words.begin() + count);
        const auto last = std::unique(words.begin(), words.begin() + count);
        std::array<int, kBanks> of_bank{};
        int most = 0;
        for (auto word = words.begin(); word != last; ++word) most = std::max(most, ++of_bank[*word % kBanks]);
        total += most;
    }
    return total;
}

}  // namespace

void Counts::global(Traffic& traffic, const std::uint64_t* addresses, std::uint32_t mask, int bytes) {
    std::array<std::uint64_t, 2 * kLanes> sectors;  // an aligned access touches one
    std::size_t count = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        if ((mask >> lane & 1) == 0) continue;
        sectors[count++] = addresses[lane] / kSectorBytes;
        traffic.bytes += static_cast<std::uint64_t>(bytes);
    }
    if (!std::is_sorted(sectors.begin(), sectors.begin() + count)) std::sort(sectors.begin(), sectors.begin() + count);
    const auto last = std::unique(sectors.begin(), sectors.begin() + count);
    traffic.sectors += static_cast<std::uint64_t>(last - sectors.begin());
    ++traffic.requests;
}

void Counts::shared(SharedTraffic& traffic, const std::uint64_t* addresses, std::uint32_t mask, int bytes) {
    ++traffic.requests;
    traffic.passes += static_cast<std::uint64_t>(passes(addresses, mask, bytes));
}

void Counts::shared_atomic(const std::uint64_t* addresses, std::uint32_t mask) {
    int most_alike = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        int alike = 0;
        for (int other = 0; other < kLanes; ++other)
            alike += (mask >> other & mask >> lane & 1) != 0 && addresses[other] == addresses[lane];
        most_alike = std::max(most_alike, alike);
    }
    ++shared_atomics.requests;
    shared_atomics.passes += static_cast<std::uint64_t>(std::max(most_alike, passes(addresses, mask, kWordBytes)));
}

void Counts::write_json(std::ostream& out) const {
    const std::pair<const char*, std::uint64_t> rows[] = {
        {"launches", launches},
        {"blocks", blocks},
        {"warps", warps},
        {"instructions", instructions},
        {"lane_instructions", lanes},
        {"longest_warp", longest_warp},
        {"branches", branches},
        {"divergent", divergent},
        {"load_requests", loads.requests},
        {"load_sectors", loads.sectors},
        {"load_bytes", loads.bytes},
        {"store_requests", stores.requests},
        {"store_sectors", stores.sectors},
        {"store_bytes", stores.bytes},
        {"shared_load_requests", shared_loads.requests},
        {"shared_load_passes", shared_loads.passes},
        {"shared_store_requests", shared_stores.requests},
        {"shared_store_passes", shared_stores.passes},
        {"shared_atomic_requests", shared_atomics.requests},
        {"shared_atomic_passes", shared_atomics.passes},
        {"global_atomics", global_atomics},
        {"local_accesses", local_accesses},
        {"barriers", barriers},
        {"shuffles", shuffles},
        {"votes", votes},
        {"float64", float64},
    };
    const char* separator = "{";
    for (const auto& [name, number] : rows) {
        out << separator << "\"" << name << "\": " << number;
        separator = ", ";
    }
}

void write_loops(const std::vector<LoopCounts>& loops, std::ostream& out) {
    out << ", \"loops\": [";
    const char* separator = "";
    for (const LoopCounts& loop : loops) {
        out << separator << "{\"turns\": " << loop.turns << ", \"instructions\": " << loop.instructions
            << ", \"votes\": " << loop.votes << ", \"loads\": " << loop.loads << ", \"stores\": " << loop.stores << "}";
        separator = ", ";
    }
    out << "]}";
}

}  // namespace ptx
