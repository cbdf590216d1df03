// The values of a tensor as they are quantized: u = values * inv_scale + residual, see values.h. kAdjusted is false
// where no tensor of a launch has a scale or a residual: then a value costs one load.
#pragma once

#include "coder.cuh"
#include "launch.h"
#include "qcomm/dtype.h"
#include "qcomm/entropy.h"
#include "tasks.h"

namespace qcomm::cuda {

template <class Tr, bool kAdjusted>
class Source {
public:
    using T = typename Tr::Arithmetic;

    // From value `offset` on. The scale is read once and stays in a register.
    __device__ __forceinline__ explicit Source(const TensorTask& tensor, std::int64_t offset = 0)
        : values_(static_cast<const typename Tr::Storage*>(tensor.values) + offset),
          has_residual_(kAdjusted && tensor.residual != nullptr),
          // Without a residual this is some other address of global memory, which both are said to be. A source is
          // never of an empty tensor.
          residual_(has_residual_ ? tensor.residual + offset : reinterpret_cast<const float*>(values_)),
          inv_scale_(kAdjusted && tensor.inv_scale != nullptr ? static_cast<T>(*tensor.inv_scale) : T(1)) {
        QCOMM_ASSUME_GLOBAL(values_);
        QCOMM_ASSUME_GLOBAL(residual_);
    }

    // A value as memory holds it, for a caller that loads some time before it needs u: arithmetic waits for loads.
    struct Raw {
        typename Tr::Storage value;
        float residual;
    };
    __device__ __forceinline__ Raw raw(std::int64_t i) const {
        if constexpr (!kAdjusted) return {values_[i], 0.0f};
        return {values_[i], has_residual_ ? residual_[i] : 0.0f};
    }
    // Whether raw_pair() may be called, for even numbers.
    __device__ __forceinline__ bool holds_pairs() const {
        return cuda::holds_pairs(values_) && (!has_residual_ || cuda::holds_pairs(residual_));
    }
    __device__ __forceinline__ void raw_pair(std::int64_t i, Raw (&raw)[2]) const {
        const auto values = *reinterpret_cast<const PairOf<typename Tr::Storage>*>(values_ + i);
        PairOf<float> residual{0.0f, 0.0f};
        if (kAdjusted && has_residual_) residual = *reinterpret_cast<const PairOf<float>*>(residual_ + i);
        raw[0] = {values.first, residual.first};
        raw[1] = {values.second, residual.second};
    }
    __device__ __forceinline__ T of(const Raw& raw) const {
        if constexpr (!kAdjusted) return Tr::widen(raw.value);
        const T u = Tr::widen(raw.value) * inv_scale_;  // by 1: exact
        return has_residual_ ? u + static_cast<T>(raw.residual) : u;
    }
    __device__ __forceinline__ T operator[](std::int64_t i) const { return of(raw(i)); }

    // Without scale and residual.
    __device__ __forceinline__ T value(std::int64_t i) const { return Tr::widen(values_[i]); }

    // As it is stored in a packet.
    __device__ __forceinline__ typename Tr::Storage stored(std::int64_t i) const {
        if constexpr (kAdjusted) return Tr::narrow((*this)[i]);
        return values_[i];
    }

private:
    const typename Tr::Storage* values_;
    bool has_residual_;
    const float* residual_;
    T inv_scale_;
};

// Neighbours 2a and 2a + 1 one after another, for the indices a of a sample.
template <class Values>
struct SampledPairs {
    const Values& u;
    std::int64_t n, count;  // sampled pairs, and the pairs from which they are drawn
    std::uint32_t seed;

    __device__ auto operator[](std::int64_t i) const { return u[2 * sample_index(i / 2, n, count, seed) + i % 2]; }
};

}  // namespace qcomm::cuda
