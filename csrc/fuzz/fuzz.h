// Helpers of the fuzz targets: how they report, buffers that notice an access beside them, a hash that decides what is
// tested with an input, and a loop over versions of the inner loops.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

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

// Memory whose first and last page cannot be touched: an access outside ends the process, in a build without
// sanitizers, too. Arenas are used again and never unmapped, since page faults would take longer than what is tested.
struct Arena {
    std::uint8_t* begin = nullptr;
    std::size_t bytes = 0;  // without the two pages

    static Arena take(std::size_t bytes) {
        // The last one that was returned is in the cache.
        for (auto arena = unused().rbegin(); arena != unused().rend(); ++arena) {
            if (arena->bytes < bytes) continue;
            const Arena found = *arena;
            unused().erase(std::next(arena).base());
            return found;
        }
        const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
        const std::size_t room = (std::max(bytes, kLeast) + page - 1) / page * page;
        void* const mapped = mmap(nullptr, room + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) std::abort();
        std::uint8_t* const begin = static_cast<std::uint8_t*>(mapped) + page;
        if (mprotect(begin, room, PROT_READ | PROT_WRITE) != 0) std::abort();
        return {begin, room};
    }
    void give_back() const { unused().push_back(*this); }

private:
    static constexpr std::size_t kLeast = 1 << 20;
    static std::vector<Arena>& unused() {
        static std::vector<Arena> list;
        return list;
    }
};

// `size` bytes, all `fill` at first, up to the end of an arena, with canaries before them: the sanitizer does not see
// what a vector instruction with a mask writes, and a single far store may jump over its red zones.
class Guarded {
public:
    // A size that is a multiple of an item's gives an address that is one, since pages are.
    explicit Guarded(std::int64_t size = 0, std::uint8_t fill = kCanary)
        : size_(size), arena_(Arena::take(static_cast<std::size_t>(size) + kMargin)) {
        std::memset(data() - kMargin, kCanary, kMargin);
        std::memset(data(), fill, static_cast<std::size_t>(size));
    }
    ~Guarded() { arena_.give_back(); }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;

    std::uint8_t* begin() { return arena_.begin; }  // of the arena, which cannot be touched before it
    std::uint8_t* data() { return arena_.begin + arena_.bytes - size_; }
    const std::uint8_t* data() const { return arena_.begin + arena_.bytes - size_; }
    std::int64_t size() const { return size_; }
    // Tells whether nothing has been written before the bytes, and whether they are still as they were filled.
    bool intact() const { return holds(data() - kMargin, kMargin, kCanary); }
    bool holds_only(std::uint8_t fill) const { return holds(data(), size_, fill); }

    static constexpr std::uint8_t kCanary = 0xC5;

private:
    static constexpr int kMargin = 256;

    // All bytes equal the first one where each equals the next. memcmp() compares many of them at once, where a loop
    // with an exit would be one of the slowest parts of a fuzz target.
    static bool holds(const std::uint8_t* bytes, std::int64_t n, std::uint8_t fill) {
        return n == 0 || (bytes[0] == fill && std::memcmp(bytes, bytes + 1, static_cast<std::size_t>(n - 1)) == 0);
    }

    std::int64_t size_;
    Arena arena_;
};

// Decides what is tested with an input, beside its meaning: costly tests are for a share of all inputs, and an input
// that grew from one of those is hardly ever another one.
inline std::uint64_t hash(const std::uint8_t* data, std::size_t size) {
    std::uint64_t h = size, word = 0;
    const auto mix = [&] { h = (h ^ word) * 0x9E3779B97F4A7C15u, h ^= h >> 29; };
    for (; size >= sizeof(word); data += sizeof(word), size -= sizeof(word)) {
        std::memcpy(&word, data, sizeof(word));
        mix();
    }
    word = 0;
    if (size > 0) std::memcpy(&word, data, size);
    mix();
    return h * 0x9E3779B97F4A7C15u >> 32;
}

// As values these would not do: a NaN differs from itself, and two zeros do not differ.
inline bool same_bytes(const void* a, const void* b, std::size_t bytes) {
    return bytes == 0 || std::memcmp(a, b, bytes) == 0;
}

// The text and the place count, too: which of several faults is found must not depend on the version.
inline bool same_status(const Status& a, const Status& b) {
    return a.code == b.code && a.where == b.where && std::strcmp(a.what, b.what) == 0;
}

// Calls f(number) with the scalar version, number 0, and then with one that `choice` chooses among the others that this
// processor can run.
template <class F>
void on_two_versions(std::uint64_t choice, F f) {
    static const std::vector<std::string> versions = kernel_versions();
    const auto run = [&](std::size_t i) {
        require(use_kernel_version(versions[i].c_str()), "a listed version can be used");
        f(static_cast<int>(i));
    };
    run(0);
    if (versions.size() > 1) run(1 + choice % (versions.size() - 1));
}

}  // namespace qcomm::fuzz
