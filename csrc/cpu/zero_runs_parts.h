// Where run blocks and segments meet: a block's values belong to one segment or to many.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace qcomm {

// Calls f(part, from, to) for the parts of values [begin, end): they are values [from, to) of that part. `firsts` has
// the number of values in front of each part, and at its end the number of all.
template <class F>
void for_parts(const std::vector<std::int64_t>& firsts, std::int64_t begin, std::int64_t end, F f) {
    // The last part that begins at `begin` or before; empty ones before it do not matter.
    auto behind = static_cast<std::size_t>(std::upper_bound(firsts.begin(), firsts.end(), begin) - firsts.begin());
    for (std::int64_t from = begin; from < end; ++behind) {
        const std::int64_t to = std::min(end, firsts[behind]), first = firsts[behind - 1];
        if (from < to) f(behind - 1, from - first, to - first);
        from = to;
    }
}

}  // namespace qcomm
