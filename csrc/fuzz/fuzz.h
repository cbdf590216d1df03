// Helpers of the fuzz targets: how they report, buffers that notice a write beside them, and a loop over the versions
// of the inner loops.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "qcomm/processor.h"
#include "qcomm/status.h"

namespace qcomm::fuzz {

// Ends the process unless `holds`: libFuzzer then keeps the input.
inline void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "fuzz: violated on kernels %s: %s\n", kernel_version().c_str(), what);
    std::abort();
}

// `size` bytes, all `fill` at first, between two canaries: the sanitizer does not see what a vector instruction with a
// mask writes, and a single far store may jump over its red zones.
class Guarded {
public:
    explicit Guarded(std::int64_t size, std::uint8_t fill = kCanary)
        : size_(size), arena_(static_cast<std::size_t>(size) + 2 * kMargin, kCanary) {
        std::fill_n(data(), size, fill);
    }
    std::uint8_t* data() { return arena_.data() + kMargin; }
    std::int64_t size() const { return size_; }
    // Tells whether nothing has been written beside the bytes, and whether they are still as they were filled.
    bool intact() const {
        const auto is_canary = [](std::uint8_t byte) { return byte == kCanary; };
        return std::all_of(arena_.begin(), arena_.begin() + kMargin, is_canary) &&
               std::all_of(arena_.end() - kMargin, arena_.end(), is_canary);
    }
    bool holds_only(std::uint8_t fill) {
        return std::all_of(data(), data() + size_, [&](std::uint8_t byte) { return byte == fill; });
    }

    static constexpr std::uint8_t kCanary = 0xC5;

private:
    static constexpr int kMargin = 256;
    std::int64_t size_;
    std::vector<std::uint8_t> arena_;
};

// As values these would not do: a NaN differs from itself, and two zeros do not differ.
inline bool same_bytes(const void* a, const void* b, std::size_t bytes) {
    return bytes == 0 || std::memcmp(a, b, bytes) == 0;
}

// The text and the place count, too: which of several faults is found must not depend on the version.
inline bool same_status(const Status& a, const Status& b) {
    return a.code == b.code && a.where == b.where && std::strcmp(a.what, b.what) == 0;
}

// Calls f(number) with each version that this processor can run, the scalar one, number 0, first.
template <class F>
void on_every_version(F f) {
    static const std::vector<std::string> versions = kernel_versions();
    for (std::size_t i = 0; i < versions.size(); ++i) {
        require(use_kernel_version(versions[i].c_str()), "a listed version can be used");
        f(static_cast<int>(i));
    }
}

}  // namespace qcomm::fuzz
