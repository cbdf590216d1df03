// Work split over threads that live as long as the call: starting one costs some tens of microseconds, no more than
// waking one that waits for work, and `grain` has to make up for it. Nothing stays behind, so a process may fork, and
// libraries with threads of their own are left alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace qcomm {

// The least number of values that a thread is started for: about 0.1 ms of encoding.
constexpr std::int64_t kValuesPerThread = 1 << 17;

// Returns how many parts of `count` units are worth a thread each, if each has at least `grain` units: 1 to `threads`.
// A grain of 0, which dividing one size by another may give, counts as 1. So does a number of threads below 1.
inline int part_count(std::int64_t count, std::int64_t grain, int threads) {
    const std::int64_t parts = std::min<std::int64_t>(threads, count / std::max<std::int64_t>(1, grain));
    return static_cast<int>(std::max<std::int64_t>(1, parts));
}

// Calls f(part, begin, end) for `parts` contiguous parts of [0, count), each on a thread of its own, the first on the
// caller's. It returns when all have. f must not throw, and no part may write memory that another touches. Where no
// thread can be started the part runs on the caller's, so memory that is short costs time and never a result.
// Preconditions: parts >= 1, and count * parts fits 63 bits. The borders are count * part / parts, by which
// segment_encoder.h finds a part's blocks again. A part may be empty, as that of a count of 0 is.
template <class F>
void parallel_for(std::int64_t count, int parts, F f) {
    // On another thread an exception ends the process anyway; noexcept makes it so on the caller's as well, where it
    // would leave threads that nobody joins.
    const auto run = [&](int part) noexcept { f(part, count * part / parts, count * (part + 1) / parts); };
    std::vector<std::thread> others;
    others.reserve(static_cast<std::size_t>(parts - 1));
    for (int part = 1; part < parts; ++part) {
        try {
            others.emplace_back(run, part);
        } catch (const std::exception&) {
            run(part);  // the system has no thread, or no memory for one, left
        }
    }
    run(0);
    // A join orders all that its thread has written before what the caller does next, so results need no atomics.
    for (std::thread& other : others) other.join();
}

// The same for `count` values, on up to `threads` threads where there are enough values: calls f(begin, end).
// Borders fall on any value: data in larger units, such as blocks or packed symbols, is split by parallel_for() over
// those.
template <class F>
void parallel_for_values(std::int64_t count, int threads, F f) {
    parallel_for(count, part_count(count, kValuesPerThread, threads),
                 [&](int, std::int64_t begin, std::int64_t end) { f(begin, end); });
}

}  // namespace qcomm
