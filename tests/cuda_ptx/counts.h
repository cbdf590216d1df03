// What a kernel's warps did: instructions, and what their requests ask of memory. Two versions can be compared by it;
// it says nothing of the time.
//
// A request is one instruction of one warp. Global memory is counted in the sectors of 32 bytes that it touches, shared
// memory in passes: in one pass, each of 32 banks of 4 bytes gives one word.
#pragma once

#include <cstdint>
#include <ostream>
#include <vector>

namespace ptx {

struct Traffic {
    std::uint64_t requests = 0, sectors = 0, bytes = 0;
};
struct SharedTraffic {
    std::uint64_t requests = 0, passes = 0;
};

struct Counts {
    std::uint64_t launches = 0, blocks = 0, warps = 0;
    std::uint64_t instructions = 0, lanes = 0;  // of warps, and of their active lanes
    std::uint64_t longest_warp = 0;             // the most instructions of one
    std::uint64_t branches = 0, divergent = 0;
    Traffic loads, stores;
    SharedTraffic shared_loads, shared_stores, shared_atomics;
    std::uint64_t global_atomics = 0, local_accesses = 0, barriers = 0, shuffles = 0, votes = 0, float64 = 0;

    // One request of the lanes of `mask` to addresses[lane], `bytes` each.
    void global(Traffic& traffic, const std::uint64_t* addresses, std::uint32_t mask, int bytes);
    void shared(SharedTraffic& traffic, const std::uint64_t* addresses, std::uint32_t mask, int bytes);
    // Atomics on one address follow each other.
    void shared_atomic(const std::uint64_t* addresses, std::uint32_t mask);

    // All but the closing brace.
    void write_json(std::ostream& out) const;
};

// A loop of a kernel, without those inside it, as the warp with the most instructions ran it: turns and instructions,
// and what a turn has of votes and of loads and stores of global memory, by which ptxas's version is found.
struct LoopCounts {
    std::uint64_t turns = 0, instructions = 0;
    int votes = 0, loads = 0, stores = 0;
};
// Ends what Counts::write_json() has begun.
void write_loops(const std::vector<LoopCounts>& loops, std::ostream& out);

}  // namespace ptx
