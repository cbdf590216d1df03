// Zero runs on the device: what the encoding kernels and the decoding ones share, and a run block's place between the
// encoding ones. csrc/include/qcomm/zero_runs.h has the layout of a block and its choices.
#pragma once

#include "coder.cuh"
#include "qcomm/zero_runs.h"
#include "warp.cuh"

namespace qcomm::cuda {

// Where a run block lies between encode_run_blocks and write_run_blocks. Words are written from the last to the first.
//
//   32 start windows u32 | words u16 <-- (or packed levels, from the front) | tokens u16
//
// A coded block has fewer words than the same block fixed, or it is fixed. An encoder notices some steps later that it
// has more, so there is room for these.
struct RunSlotShape {
    static constexpr int kSpareWords = 8 * kLanes;

    int words_at, tokens_at, bytes;  // tokens_at is where the words end

    QCOMM_HOST_DEVICE constexpr explicit RunSlotShape(int steps)
        : words_at(4 * kLanes),
          tokens_at(words_at + 4 * kLanes * steps * kRunsBits / 8 + 2 * kSpareWords),
          bytes((tokens_at + 2 * 4 * kLanes * steps + 15) / 16 * 16) {}
};

// A token between the two passes of an encoder: run << 3 | level + 3. The skip is a run of 512 zeros, and of its class,
// which is the one behind the last, the first token.
constexpr int kTokenRunAt = 3;
constexpr std::uint32_t kSkip = std::uint32_t{kSkipZeros} << kTokenRunAt;

// Whether a float32 residual may not be finite, although its value is: then the block is not coded, and the old
// residual must still be there. What a level leaves of a value of float32 is no larger than the value.
template <class Tr>
constexpr bool kResidualMayOverflow = sizeof(typename Tr::Arithmetic) > sizeof(float);

// Calls f(number of the segment, begin in it, n, position in [begin, end)) for the parts of segments that values
// [begin, end) of zero runs consist of. Segments have the fields of a RunPlace.
template <class Segment, class F>
__device__ __forceinline__ void for_run_parts(const Segment* segments, int count, std::int64_t begin, std::int64_t end,
                                              const F& f) {
    for (std::int64_t at = begin; at < end;) {
        const int s = find_task(segments, count, at, &Segment::first_run);
        const std::int64_t offset = at - segments[s].first_run, rest = segments[s].count - offset;
        const std::int64_t n = rest < end - at ? rest : end - at;
        f(s, offset, static_cast<int>(n), static_cast<int>(at - begin));
        at += n;
    }
}

}  // namespace qcomm::cuda
