// The sample that forecasts a tensor's next step: which values are in it, and what is kept of them.
#pragma once

#include <cstdint>

#include "qcomm/format.h"

namespace qcomm {

// The squares of a sample, one row of 32 values of each kSampledRows (sampled_row), in lanes of float64, which are then
// folded.
struct RunSample {
    double values, residuals;  // scaled values, and new residuals
    double count;
};
constexpr int kSampledRows = 8;

// Returns the row of a group of kSampledRows that is in the sample of n values. It is another one in each group without
// a pattern: tensors are as wide as powers of two, and a pattern would always meet the same columns.
inline __attribute__((always_inline)) int sampled_row(int group, int n) {
    constexpr int kGroup = kLanes * kSampledRows;
    const int rest = n - group * kGroup;
    const int rows = rest < kGroup ? (rest + kLanes - 1) / kLanes : kSampledRows;
    const std::uint32_t mixed = (static_cast<std::uint32_t>(group) + 1u) * 0x9E3779B1u;
    return group * kSampledRows + static_cast<int>((mixed ^ mixed >> 15) * 0x85EBCA6Bu >> 16) % rows;
}
// Returns the number of values in the sample of n values.
inline __attribute__((always_inline)) int sampled_values(int n) {
    constexpr int kGroup = kLanes * kSampledRows;
    const int groups = n / kGroup;
    if (n % kGroup == 0) return groups * kLanes;
    const int left = n - sampled_row(groups, n) * kLanes;
    return groups * kLanes + (left < kLanes ? left : kLanes);
}

}  // namespace qcomm
