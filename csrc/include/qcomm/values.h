// The input of compression: u = values * inv_scale + residual, in the arithmetic T of the dtype with one rounding per
// operation. Without a residual and with inv_scale 1, u is the value itself.
//
// Error feedback adds to a gradient the part of earlier ones that quantization lost, and a scaled loss is unscaled on
// the way. Both happen while values are read, so that no tensor of sums is ever stored.
// The scale comes first, so residuals are in units of the unscaled gradient: they stay right when a loss scaler changes
// its factor from one step to the next.
#pragma once

#include <cstdint>

#include "qcomm/dtype.h"

namespace qcomm {

// Borrows all it points to. The elements must be contiguous; count may be 0, and `data` may then be null.
// Elements are aligned to their type, since they are read through typed pointers.
struct Values {
    const void* data = nullptr;  // `count` elements of `dtype`
    DType dtype = DType::kFloat32;
    std::int64_t count = 0;
    // Float32 for every dtype, as docs/format.md rounds a new residual.
    const float* residual = nullptr;  // `count` elements, or null
    double inv_scale = 1.0;           // rounded to T before use

    // Whether u needs a float32 or float64 dtype: a 16-bit packet could not carry it exactly.
    // The scale is compared as it was given: one that becomes 1 in T changes no value, but 16-bit dtypes are refused
    // all the same.
    bool is_adjusted() const { return residual != nullptr || inv_scale != 1.0; }
};

// Random access to u, for the compile-time dtype of `Tr`. It asks at every element whether there is a scale or
// residual, which loops over all values cannot afford: they take with_values() of csrc/cpu/kernels_loops.inl instead.
// Each call reads memory: where a new residual replaces the old one in place, u must have been read before. The index
// is not checked.
template <class Tr>
class Reader {
public:
    using T = typename Tr::Arithmetic;

    QCOMM_INLINE explicit Reader(const Values& values)
        : data_(static_cast<const typename Tr::Storage*>(values.data)),
          residual_(values.residual),
          inv_scale_(static_cast<T>(values.inv_scale)),
          scaled_(values.inv_scale != 1.0) {}

    // A product, then a sum, each rounded: a fused operation would round once and give other bits.
    QCOMM_INLINE T operator[](std::int64_t i) const {
        T u = Tr::widen(data_[i]);
        if (scaled_) u *= inv_scale_;
        if (residual_ != nullptr) u += static_cast<T>(residual_[i]);
        return u;
    }
    // Asks for the line of memory of value i, and that of its residual.
    QCOMM_INLINE void prefetch(std::int64_t i) const {
        __builtin_prefetch(data_ + i);
        if (residual_ != nullptr) __builtin_prefetch(residual_ + i);
    }

private:
    const typename Tr::Storage* data_;
    const float* residual_;
    T inv_scale_;
    bool scaled_;
};

}  // namespace qcomm
