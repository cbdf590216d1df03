// A request to encode, as EncodePlan gets it: whether it is one, and what its tensors may come to, since their
// quantizers are found on the device.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "qcomm/block.h"
#include "qcomm/cuda.h"
#include "qcomm/huffman.h"
#include "qcomm/sigma_code.h"
#include "tasks.h"

namespace qcomm::cuda {

// As in a packet, so that no multiplication by a value's bits overflows.
constexpr std::int64_t kMaxElements = kMaxSegmentValues;

// On a range grid the plan is narrower than a packet: lo and hi, and perhaps N, are yet to be measured, and a code is
// always the segment's own.
inline Status check_range(const Tensor& tensor, std::int64_t index) {
    const Quantizer& q = tensor.quantizer;
    const SampleRule& rule = tensor.sample;
    if (q.num_bits > 16 || q.table != kTableOnWire)
        return bad_argument("a range grid has 1..16 bits, or 0, and table 0", index);
    if (q.num_bits == 0) {
        const bool good = rule.entropy_bits >= 1 && rule.entropy_bits <= kMaxEntropyBits && rule.c >= 0.0 &&
                          rule.c <= 16.0 && rule.fraction > 0.0 && rule.fraction <= 1.0 && rule.max_bits >= 1 &&
                          rule.max_bits <= 16;
        return good ? Status{} : bad_argument("a range grid's sample rule is out of range", index);
    }
    const bool good =
        (q.coding == Coding::kSingle || q.coding == Coding::kFixed) && check_coding(q, {}) == QuantizerFault::kNone;
    return good ? Status{} : bad_argument("a range grid is coded single up to 12 bits, and fixed", index);
}

// Whether a grid's parameters are usable is left to the device, which makes a tensor raw where they are not.
inline Status check_tensor(const Tensor& tensor, DType dtype, std::int64_t index) {
    const Quantizer& q = tensor.quantizer;
    if (tensor.count < 0 || tensor.count > kMaxElements) return bad_argument("a tensor's count is out of range", index);
    // The scale is on the device: that it is 1 cannot be seen from here.
    if (item_bytes(dtype) < 4 && (tensor.residual != nullptr || tensor.inv_scale != nullptr)) {
        return bad_argument("a residual or a scale needs float32 or float64 values: 16 bits cannot carry them exactly",
                            index);
    }
    if (tensor.as_it_is && q.coding != Coding::kRaw) return bad_argument("a tensor that is not measured is raw", index);
    if (q.coding == Coding::kRaw) return {};
    if (is_range(q.grid)) return check_range(tensor, index);
    const bool coded = is_block_coded(q.coding) || (q.coding == Coding::kRuns && !tensor.sample.choose_code);
    if (q.grid != Grid::kSigma || !coded || check_levels(q) != QuantizerFault::kNone)
        return bad_argument("a tensor is raw, on a range grid, or single, pair or runs on a sigma grid of 2..16 bits",
                            index);
    Quantizer checked = q;
    if (tensor.sample.choose_code) checked.table = kNoTable;  // the device puts another in its place
    const QuantizerFault fault = check_coding(checked, static_alphabet(checked));
    return fault == QuantizerFault::kNone ? Status{} : bad_argument(refusal_of(fault), index);
}

// Offset and count are compared so that no sum of them can overflow.
inline Status check_segment(const Segment& segment, const std::vector<Tensor>& tensors, std::int64_t index) {
    if (segment.tensor < 0 || segment.tensor >= static_cast<std::int32_t>(tensors.size()))
        return bad_argument("a segment's tensor does not exist", index);
    const std::int64_t count = tensors[static_cast<std::size_t>(segment.tensor)].count;
    if (segment.offset < 0 || segment.count < 0 || segment.offset > count || segment.count > count - segment.offset)
        return bad_argument("a segment lies outside its tensor", index);
    const Coding coding = tensors[static_cast<std::size_t>(segment.tensor)].quantizer.coding;
    if (coding == Coding::kRuns && segment.count > 0 && segment.residual_out == nullptr)
        return bad_argument("coding runs needs a residual, which keeps what levels beyond 3 would lose", index);
    return {};
}

// Returns the number of the static table for a step of k times the RMS, or kNoTable.
inline std::uint8_t nearest_table(Coding coding, int num_bits, double k) {
    const StaticCode* code = nearest_static_code(coding, num_bits, k);
    return code != nullptr ? code->id : kNoTable;
}

// Returns the most bits that a symbol on the tensor's grid can have; where the entropy decides, that is c + M rounded
// down.
inline int most_bits(const Tensor& t) {
    if (!is_range(t.quantizer.grid) || t.quantizer.num_bits > 0) return t.quantizer.num_bits;
    return std::max(1, std::min(static_cast<int>(std::floor(t.sample.c + t.sample.entropy_bits)), t.sample.max_bits));
}

// Tells whether a segment of the tensor may get a code of its own, so that it needs counts, packages and a list.
inline bool may_own_code(const Tensor& t) {
    if (t.quantizer.grid == Grid::kNone ||
        (is_range(t.quantizer.grid) && t.quantizer.coding == Coding::kFixed && t.quantizer.num_bits > 0))
        return false;
    const bool sigma = t.quantizer.grid == Grid::kSigma;
    if (t.quantizer.coding == Coding::kRuns) return false;
    return sigma ? (t.sample.choose_code || t.quantizer.table == kTableOnWire) && t.quantizer.num_bits <= kMaxCodedBits
                 : t.quantizer.num_bits <= kMaxCodedBits;
}

// Returns the largest alphabet of a code of its own. A sigma grid of 4 bits may come to code pairs. A multiple of 4
// keeps the lists of neighbouring segments apart by whole words.
inline int own_alphabet(const Tensor& t) {
    if (t.quantizer.grid == Grid::kSigma && t.quantizer.num_bits == kPairBits) return 256;
    return std::max(4, 1 << std::min(most_bits(t), kMaxCodedBits));
}

// Returns the task of a tensor's sample, whose count is 0 where nothing is left to decide.
inline SampleTask make_sample(const Tensor& t, std::int64_t first_bin) {
    SampleTask task;
    task.first_bin = first_bin;
    const Quantizer& q = t.quantizer;
    if (is_range(q.grid) && q.num_bits == 0) {
        task.count = sample_size(t.count, t.sample.fraction);
        task.seed = t.sample.seed;
        task.bins = 1 << t.sample.entropy_bits;
        task.c = t.sample.c;
        task.most = most_bits(t);
    } else if (q.grid == Grid::kSigma && t.sample.choose_code && q.num_bits <= kMaxCodedBits) {
        task.count = sampled_pairs(t.count);
        task.bins = alphabet_size(q.num_bits == kPairBits ? Coding::kPair : Coding::kSingle, q.num_bits);
        task.single_table = nearest_table(Coding::kSingle, q.num_bits, t.k);
        task.pair_table = q.num_bits == kPairBits ? nearest_table(Coding::kPair, q.num_bits, t.k) : kNoTable;
    }
    return task;
}

// Returns the tensor's quantizer if it is neither constant nor raw, as far as that is known before it is measured.
inline Quantizer make_wanted(const Tensor& t) {
    Quantizer q = t.quantizer;
    if (is_range(q.grid) && q.num_bits == 0) q.coding = Coding::kSingle;
    if (q.grid == Grid::kSigma && t.sample.choose_code) {
        q.coding = Coding::kSingle;
        q.table = kNoTable;
    }
    return q;
}

// The most blocks of its own that `count` values of the tensor come to, and the bytes of their slots: those of single
// symbols and of pairs, whichever is more, where either may be chosen.
struct BlockSpace {
    std::int64_t blocks, slots;
};
// Short segments have one block with either coding, and that of pairs needs the larger slot.
inline BlockSpace block_space(const Tensor& t, std::int64_t count, int steps, std::int64_t item) {
    const Quantizer& q = t.quantizer;
    const bool choose = q.grid == Grid::kSigma && t.sample.choose_code;
    const bool single = choose || q.coding == Coding::kSingle || (is_range(q.grid) && q.num_bits == 0);
    const bool pair = q.coding == Coding::kPair || (choose && q.num_bits == kPairBits);
    BlockSpace space{0, 0};
    for (const Coding coding : {Coding::kSingle, Coding::kPair}) {
        if (!(coding == Coding::kPair ? pair : single)) continue;
        const std::int64_t blocks = ceil_div(count, values_per_block(coding, steps));
        const SlotShape shape(steps, coding == Coding::kPair, static_cast<int>(item));
        space.blocks = std::max(space.blocks, blocks);
        space.slots = std::max(space.slots, blocks * shape.bytes);
    }
    return space;
}

}  // namespace qcomm::cuda
