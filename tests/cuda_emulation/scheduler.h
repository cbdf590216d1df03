// Runs a kernel's blocks one after the other and the threads of a block as fibers, one at a time. A thread runs until
// it waits for others (barrier, warp operation) or, by chance, until an atomic or a fence. Who goes on is decided by
// the seed: 0 the lowest thread first, 1 the highest, others at random; blocks likewise. So a run is a function of the
// seed, and a kernel that depends on an order which nothing enforces gives other results with another seed.
//
// What cannot complete on a GPU ends the program with the lines at which the threads wait: barriers that not all reach,
// warp operations whose mask names lanes that are elsewhere, a spin that makes no progress.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "fibers.h"

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

enum class Wait : std::uint8_t { kNothing, kExited, kBlock, kWarp, kBallot, kShuffle, kMatch };
inline const char* name_of(Wait wait) {
    static const char* const names[] = {"runnable", "exited",  "__syncthreads", "__syncwarp",
                                        "ballot",   "shuffle", "match"};
    return names[static_cast<int>(wait)];
}

struct Thread {
    Context context;
    dim3 index;
    unsigned rank, lane;
    Wait wait = Wait::kNothing;
    int line = 0;
    unsigned mask = 0;                                // of a warp operation
    std::uint64_t value = 0, source = 0, result = 0;  // what it brings, the lane it asks, what it gets
    bool fenced = false;                              // since its last atomic
    void* atomics[4] = {};                            // the last ones it has read, for a later fence to acquire
    unsigned next_atomic = 0;
};

constexpr unsigned kWarp = 32;
constexpr std::size_t kRedZone = 256 << 10;  // behind dynamic shared memory; AddressSanitizer's own is 2 KiB
constexpr std::uint64_t kPatience = 2'000'000;

inline std::uint64_t seed = 0, random_state = 1, idle_turns = 0;
inline dim3 grid_size, block_size, block_index;
inline std::vector<Thread> threads;
inline std::vector<unsigned> ready;  // a ring of ranks
inline unsigned ready_begin, ready_count, live, waiting;
// What ThreadSanitizer releases and acquires. Those of a block's warps, and behind them the block's, are its own:
// shared ones would order blocks that nothing orders.
struct Barrier {
    char sync[2];
    unsigned parity;
};
inline Barrier* barriers = nullptr;
inline char launch_sync;
inline Thread* current = nullptr;
inline Context scheduler;
inline const std::function<void()>* kernel_body = nullptr;
inline char* dynamic_memory = nullptr;
inline std::size_t dynamic_capacity = 0;  // kept from launch to launch, except under ThreadSanitizer

EMULATION_RAW inline unsigned random_below(unsigned n) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return static_cast<unsigned>((random_state >> 32) * n >> 32);
}

[[noreturn]] EMULATION_RAW inline void fail(const char* what, int line = 0, int other = 0) {
    std::fprintf(stderr, "cuda_emulation: %s (block %u, thread %u, line %d, other line %d, seed %llu)\n", what,
                 block_index.x, current != nullptr ? current->rank : 0, line, other,
                 static_cast<unsigned long long>(seed));
    const Thread* last = nullptr;
    for (const Thread& t : threads) {
        if (last != nullptr && last->wait == t.wait && last->line == t.line && last->mask == t.mask) continue;
        std::fprintf(stderr, "  from thread %u: %s, line %d, mask %08x\n", t.rank, name_of(t.wait), t.line, t.mask);
        last = &t;
    }
    std::abort();
}

EMULATION_RAW inline void wake(Thread& t) {
    t.wait = Wait::kNothing;
    ready[(ready_begin + ready_count++) % ready.size()] = t.rank;
}

EMULATION_RAW inline Thread& take_next() {
    if (seed > 1) {  // the first ready one changes places with any
        unsigned& first = ready[ready_begin];
        unsigned& any = ready[(ready_begin + random_below(ready_count)) % ready.size()];
        const unsigned rank = any;
        any = first;
        first = rank;
    }
    Thread& t = threads[ready[ready_begin]];
    ready_begin = (ready_begin + 1) % static_cast<unsigned>(ready.size());
    --ready_count;
    return t;
}

// The i-th of `count` threads from `first` in the order of the seed.
EMULATION_RAW inline Thread& in_order(Thread* first, unsigned count, unsigned i) {
    return first[seed == 1 ? count - 1 - i : i];
}

EMULATION_RAW inline void give_way() { suspend(current->context, scheduler, false); }

EMULATION_RAW inline void finish_block_barrier() {
    const Thread* first = nullptr;
    std::uint64_t ones = 0;
    for (const Thread& t : threads) {
        if (t.wait != Wait::kBlock) fail("__syncthreads after threads of the block have exited", threads[0].line);
        if (first != nullptr && first->line != t.line)
            fail("threads are in different __syncthreads", first->line, t.line);
        first = &t;
        ones += t.value;
    }
    for (unsigned i = 0; i < live; ++i) {
        Thread& t = in_order(threads.data(), live, i);
        t.result = ones;
        wake(t);
    }
    waiting = 0;
    barriers[threads.size() / kWarp + 1].parity ^= 1;
    idle_turns = 0;
}

// All threads of the block; returns for how many `predicate` holds.
EMULATION_RAW inline unsigned block_barrier(bool predicate, int line) {
    Thread& t = *current;
    Barrier& barrier = barriers[threads.size() / kWarp + 1];
    char* sync = &barrier.sync[barrier.parity];
    (void)sync;
    EMULATION_TSAN(__tsan_release(sync);)
    t.wait = Wait::kBlock;
    t.line = line;
    t.value = predicate;
    ++waiting;
    if (live != threads.size()) fail("__syncthreads after threads of the block have exited", line);
    if (waiting == live) finish_block_barrier();
    give_way();
    EMULATION_TSAN(__tsan_acquire(sync);)
    return static_cast<unsigned>(t.result);
}

inline unsigned lanes_of(const Thread& t) {
    const auto rest = static_cast<unsigned>(threads.size()) - (t.rank - t.lane);
    return rest < kWarp ? rest : kWarp;
}

// Completes a warp operation if every lane of the mask has come to it.
EMULATION_RAW inline void try_finish_warp(Thread& by) {
    Thread* lane = &by - by.lane;
    const unsigned lanes = lanes_of(by), mask = by.mask;
    for (unsigned l = 0; l < lanes; ++l) {
        const Thread& t = lane[l];
        if ((mask >> l & 1u) == 0) continue;
        if (t.wait == by.wait && t.mask == mask) continue;
        if (t.wait == Wait::kExited) fail("a lane of the mask has exited", by.line);
        if (t.wait == Wait::kBlock) fail("a lane of the mask is in __syncthreads", by.line, t.line);
        if (t.wait >= Wait::kWarp) fail("lanes of the mask are in different warp operations", by.line, t.line);
        return;  // it still runs
    }
    std::uint64_t ones = 0;
    for (unsigned l = 0; l < lanes; ++l) ones |= std::uint64_t{(mask >> l & 1u) != 0 && lane[l].value != 0} << l;
    for (unsigned l = 0; l < lanes; ++l) {
        Thread& t = lane[l];
        if ((mask >> l & 1u) == 0) continue;
        t.result = ones;
        if (by.wait == Wait::kShuffle) {
            const bool taken = t.source < lanes && (mask >> t.source & 1u) != 0;
            t.result = taken ? lane[t.source].value : 0xDEADDEADDEADDEADu;  // undefined on a GPU
        }
        if (by.wait == Wait::kMatch) {
            t.result = 0;
            for (unsigned o = 0; o < lanes; ++o)
                t.result |= std::uint64_t{(mask >> o & 1u) != 0 && lane[o].value == t.value} << o;
        }
    }
    for (unsigned i = 0; i < lanes; ++i) {
        Thread& t = in_order(lane, lanes, i);
        if ((mask >> t.lane & 1u) != 0) wake(t);
    }
    barriers[by.rank / kWarp].parity ^= 1;
    idle_turns = 0;
}

EMULATION_RAW inline std::uint64_t warp_operation(Wait operation, unsigned mask, std::uint64_t value,
                                                  std::uint64_t source, int line) {
    Thread& t = *current;
    Barrier& barrier = barriers[t.rank / kWarp];
    char* sync = &barrier.sync[barrier.parity];
    (void)sync;
    t.wait = operation;
    t.mask = mask;
    t.value = value;
    t.source = source;
    t.line = line;
    if ((mask >> t.lane & 1u) == 0) fail("the calling lane is not in the mask", line);
    EMULATION_TSAN(if (operation == Wait::kWarp) __tsan_release(sync);)  // no other warp operation orders memory
    try_finish_warp(t);
    give_way();
    EMULATION_TSAN(if (operation == Wait::kWarp) __tsan_acquire(sync);)
    return t.result;
}

// At every atomic another thread may go on.
EMULATION_RAW inline void pause() {
    if (random_below(4) != 0) return;
    if (++idle_turns > kPatience) fail("no progress: a spin waits for a thread or a block that does not run");
    wake(*current);
    give_way();
}

// A relaxed atomic orders nothing; with a fence before it, it releases; with a fence behind it, it acquires.
EMULATION_RAW inline void before_atomic(void* p) {
    pause();
    (void)p;
    EMULATION_TSAN(if (current->fenced) __tsan_release(p);)
    current->fenced = false;
    current->atomics[current->next_atomic++ % 4] = p;
}
EMULATION_RAW inline void fence() {
    for (void*& p : current->atomics) {
        EMULATION_TSAN(if (p != nullptr) __tsan_acquire(p);)
        p = nullptr;
    }
    current->fenced = true;
    pause();
}

EMULATION_RAW inline void progress() { idle_turns = 0; }

EMULATION_RAW inline void thread_main() {
    enter_fiber();
    (*kernel_body)();
    Thread& t = *current;
    t.wait = Wait::kExited;
    --live;
    idle_turns = 0;
    if (waiting > 0) fail("a thread has exited while others are in __syncthreads");
    for (unsigned l = 0; l < lanes_of(t); ++l) {
        const Thread& other = *(&t - t.lane + l);
        if (other.wait >= Wait::kWarp && (other.mask >> t.lane & 1u) != 0)
            fail("a lane of the mask has exited", other.line);
    }
    EMULATION_TSAN(__tsan_release(&launch_sync);)
    suspend(t.context, scheduler, true);
}

EMULATION_RAW inline void run_block(dim3 index) {
    block_index = index;
    const auto n = static_cast<unsigned>(threads.size());
    ready_begin = ready_count = waiting = 0;
    live = n;
    for (unsigned i = 0; i < n; ++i) {
        Thread& t = threads[i] = Thread();
        t.rank = i;
        t.lane = i % kWarp;
        t.index = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
        prepare(t.context, thread_main);
    }
    for (unsigned i = 0; i < n; ++i) wake(in_order(threads.data(), n, i));
    while (live > 0) {
        if (ready_count == 0) fail("deadlock: nobody can run");
        current = &take_next();
        resume(scheduler, current->context);
    }
    current = nullptr;
    for (Thread& t : threads) dispose(t.context);
}

// `dynamic_memory` has so many bytes, and what is behind them may not be touched.
EMULATION_RAW inline void reserve_dynamic_memory(std::size_t bytes) {
    if (dynamic_capacity < bytes + kRedZone) {
        EMULATION_ASAN(__asan_unpoison_memory_region(dynamic_memory, dynamic_capacity);)
        std::free(dynamic_memory);
        dynamic_capacity = 2 * bytes + kRedZone;
        dynamic_memory = static_cast<char*>(std::malloc(dynamic_capacity));
        if (dynamic_memory == nullptr) std::abort();
    }
    EMULATION_ASAN(__asan_unpoison_memory_region(dynamic_memory, bytes);)
    EMULATION_ASAN(__asan_poison_memory_region(dynamic_memory + bytes, dynamic_capacity - bytes);)
}

EMULATION_RAW inline void launch(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body) {
    grid_size = grid;
    block_size = block;
    kernel_body = &body;
    idle_turns = 0;
    random_state = (seed + 1) * 0x9E3779B97F4A7C15u;
    const unsigned total = grid.x * grid.y * grid.z, n = block.x * block.y * block.z;
    threads.resize(n);
    ready.resize(n);
    std::vector<unsigned> order(total);
    for (unsigned i = 0; i < total; ++i) {
        const unsigned j = seed > 1 ? random_below(i + 1) : seed == 1 ? 0 : i;
        if (seed == 1) {
            order[total - 1 - i] = i;
            continue;
        }
        order[i] = order[j];
        order[j] = i;
    }
#ifdef __SANITIZE_THREAD__
    // Each block has its own, to the end: otherwise ThreadSanitizer would take its reuse for a race between blocks.
    std::vector<std::unique_ptr<char[]>> shared;
    std::vector<std::unique_ptr<Barrier[]>> all_barriers;
#else
    // One for all blocks, one after the other: to allocate, poison and free it took a quarter of the run time.
    reserve_dynamic_memory(shared_bytes);
    const std::unique_ptr<Barrier[]> of_all_blocks(new Barrier[n / kWarp + 2]());
    barriers = of_all_blocks.get();
#endif
    for (const unsigned i : order) {
#ifdef __SANITIZE_THREAD__
        shared.emplace_back(new char[shared_bytes + 1]);
        dynamic_memory = shared.back().get();
        all_barriers.emplace_back(new Barrier[n / kWarp + 2]());
        barriers = all_barriers.back().get();
#endif
        std::memset(dynamic_memory, 0xA5, shared_bytes);
        run_block({i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y});
    }
    EMULATION_TSAN(__tsan_acquire(&launch_sync);)  // only now does the host come after the kernel's threads
}

}  // namespace emulation
