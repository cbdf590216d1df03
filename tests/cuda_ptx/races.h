// Races: two accesses to a byte, one of them a write of another value, that nothing orders.
//
// In a block, a barrier orders accesses, and for the lanes of a warp so does bar.warp.sync; shuffles and votes do not.
// Between blocks it takes a fence and then an atomic of the first, and an atomic and then a fence of the second. Two
// atomics do not race. A byte remembers its last write and its last reads of two warps, so that some races go
// unnoticed; what is noticed is one.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace ptx {

enum class Use : std::uint8_t { kRead, kWrite, kRewrite, kAtomic };  // kRewrite: of the value that is there

struct Access {
    std::int32_t thread = -1;
    std::uint32_t block = 0;
    std::uint32_t block_epoch = 0, warp_epoch = 0;
    std::uint64_t time = 0;
    bool atomic = false;
};

class Races {
public:
    Races(std::uint32_t blocks, std::size_t shared_bytes) : handed_(blocks), shared_(shared_bytes) {}

    void begin_block() { shared_.assign(shared_.size(), {}); }
    void fence(std::uint32_t block);
    void global_atomic(std::uint32_t block);
    // Returns what is wrong with an access to `bytes` bytes at an offset of shared memory, or "".
    std::string shared(std::size_t offset, int bytes, Access now, Use use);
    // The same at an address of global memory.
    std::string global(std::uint64_t address, int bytes, Access now, Use use);

private:
    static constexpr std::size_t kPageBytes = 4096;
    struct Byte {
        Access write, read, other_read;
    };
    // When a block has last handed its writes over, and last taken over those of others.
    struct Handed {
        std::uint64_t given = 0, taken = 0;
        bool fenced = false, met = false;
    };
    bool ordered(const Access& before, const Access& now) const;
    std::string touch(Byte& byte, const Access& now, Use use) const;

    std::uint64_t time_ = 0;
    std::vector<Handed> handed_;
    std::vector<Byte> shared_;
    std::unordered_map<std::uint64_t, std::array<Byte, kPageBytes>> pages_;
};

}  // namespace ptx
