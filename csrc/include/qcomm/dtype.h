// Element types: storage, the arithmetic T in which their grids compute, and conversions that are the same bits on
// every machine. Those of 16-bit types use integers and additions of normal float32 numbers only, so that a mode which
// flushes subnormals to zero changes nothing.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

// Marks functions that the CUDA kernels share with the host: one text, so that both compute the same.
#ifdef __CUDACC__
#define QCOMM_HOST_DEVICE __host__ __device__
#else
#define QCOMM_HOST_DEVICE
#endif

// Small helpers are always inlined: they are compiled for several instruction sets, and a linker must never pick one's
// copy for another. csrc/cuda uses them on the device, too.
#define QCOMM_INLINE QCOMM_HOST_DEVICE inline __attribute__((always_inline))

namespace qcomm {

// The numbers are those of a packet's header, and of DTYPES in qcomm/codec/checks.py. A header is copied before it is
// checked, so a variable of this type may hold any byte until is_valid() has been asked.
enum class DType : std::uint8_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

// Tells whether a number that comes from a packet is a dtype.
inline bool is_valid(DType dtype) { return static_cast<unsigned>(dtype) <= 3; }

// std::bit_cast of C++20.
// A copy is the conversion that C++17 defines: a pointer of another type would break its aliasing rules, and compilers
// make one instruction of either.
template <class To, class From>
QCOMM_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

// float16 -> float32, exact. An exponent of float16 is rebased by adding 127 - 15 = 112 to it; the 10 bits of the
// fraction become the highest of 23.
QCOMM_INLINE float half_to_float(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
    const std::uint32_t magnitude = h & 0x7FFFu;
    // Infinity and NaN: the highest exponent of one type is that of the other, without rebasing.
    if (magnitude >= 0x7C00u) return bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    // A subnormal's fraction is put on top of 2^-14, which is then taken away: no float32 subnormal appears, so flush
    // modes do not matter.
    if (magnitude < 0x400u)
        return bit_cast<float>(sign |
                               bit_cast<std::uint32_t>(bit_cast<float>(magnitude << 13 | 0x38800000u) - 0x1p-14f));
    return bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
}

// float32 -> float16, to nearest even; overflow becomes infinity. In the ordinary case the 13 bits that do not fit are
// rounded by one addition: 0xFFF, and 1 more where the last bit that stays is odd, carries into it exactly when the
// rest is above half, or half and odd. A carry out of the fraction rightly raises the exponent.
QCOMM_INLINE std::uint16_t float_to_half(float f) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(f);
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    // A NaN's payload means nothing in a packet, so all become the same quiet one.
    if (magnitude > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7E00u);
    // Half way between 65504, the largest finite value, and 65536: the fraction of 65504 is odd, so the tie goes up.
    if (magnitude >= 0x477FF000u) return static_cast<std::uint16_t>(sign | 0x7C00u);  // 65520 and above
    // A subnormal of float32 becomes 0, whether or not a flush mode makes it 0 before the addition.
    if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 lets the adder round at the subnormal's last bit, 2^-24
        const float shifted = bit_cast<float>(magnitude) + 0.5f;
        return static_cast<std::uint16_t>(sign | (bit_cast<std::uint32_t>(shifted) - 0x3F000000u));
    }
    const std::uint32_t rounded = magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1u);
    return static_cast<std::uint16_t>(sign | rounded >> 13);
}

// bfloat16 -> float32, exact: it is the upper half of one.
QCOMM_INLINE float bfloat_to_float(std::uint16_t b) { return bit_cast<float>(static_cast<std::uint32_t>(b) << 16); }

// The parts of float_to_bfloat(), which divide_to_bfloat() of rounding.h puts together in another way.
QCOMM_INLINE bool is_nan(std::uint32_t float_bits) { return (float_bits & 0x7FFFFFFFu) > 0x7F800000u; }
// Leaves a bfloat16 in the upper half, by the addition that float_to_half() explains. The lower half is to be cut off.
// Of a NaN the result means nothing, since the carry may turn it into an infinity.
// Infinity stays one: its lower half is 0, from which nothing is carried.
QCOMM_INLINE std::uint32_t round_to_upper_half(std::uint32_t float_bits) {
    return float_bits + 0x7FFFu + (float_bits >> 16 & 1u);
}
// Keeps a NaN one where its payload was in the lower half.
QCOMM_INLINE std::uint16_t quiet_bfloat(std::uint32_t nan_bits) {
    return static_cast<std::uint16_t>(nan_bits >> 16 | 0x40u);
}
// float32 -> bfloat16, to nearest even; overflow becomes infinity.
QCOMM_INLINE std::uint16_t float_to_bfloat(float f) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(f);
    return is_nan(bits) ? quiet_bfloat(bits) : static_cast<std::uint16_t>(round_to_upper_half(bits) >> 16);
}

// A dtype at compile time. Storage is the type in memory and in packets, Arithmetic is T. kMax is the largest finite
// value: levels of a grid beyond it would overflow when they are decoded. widen(): storage -> T, exact. narrow(): one
// rounding from T, except that a float64 goes to the 16-bit types by way of float32, as docs/format.md says.
// Float32 and the 16-bit types have two overloads of narrow(): sigma grids compute in T, range grids in float64
// whatever the dtype. Both 16-bit types are stored as std::uint16_t, so nothing may be chosen by Storage alone, and
// kMax is written out: std::numeric_limits would tell the integer's.
template <DType>
struct Traits;

template <>
struct Traits<DType::kFloat32> {
    using Storage = float;
    using Arithmetic = float;
    static constexpr double kMax = std::numeric_limits<float>::max();
    static QCOMM_INLINE float widen(float v) { return v; }
    static QCOMM_INLINE float narrow(float v) { return v; }
    static QCOMM_INLINE float narrow(double v) { return static_cast<float>(v); }
};
template <>
struct Traits<DType::kFloat16> {
    using Storage = std::uint16_t;
    using Arithmetic = float;
    // It is (2 - 2^-10) * 2^15: the fraction has 10 bits, and the highest exponent is infinity's.
    static constexpr double kMax = 65504.0;
    static QCOMM_INLINE float widen(std::uint16_t v) { return half_to_float(v); }
    static QCOMM_INLINE std::uint16_t narrow(float v) { return float_to_half(v); }
    static QCOMM_INLINE std::uint16_t narrow(double v) { return float_to_half(static_cast<float>(v)); }
};
template <>
struct Traits<DType::kBFloat16> {
    using Storage = std::uint16_t;
    using Arithmetic = float;
    // It is (2 - 2^-7) * 2^127: float32's exponents, and a fraction of 7 bits.
    static constexpr double kMax = 0x1.FEp127;
    static QCOMM_INLINE float widen(std::uint16_t v) { return bfloat_to_float(v); }
    static QCOMM_INLINE std::uint16_t narrow(float v) { return float_to_bfloat(v); }
    static QCOMM_INLINE std::uint16_t narrow(double v) { return float_to_bfloat(static_cast<float>(v)); }
};
template <>
struct Traits<DType::kFloat64> {
    using Storage = double;
    using Arithmetic = double;
    static constexpr double kMax = std::numeric_limits<double>::max();
    static QCOMM_INLINE double widen(double v) { return v; }
    static QCOMM_INLINE double narrow(double v) { return v; }
};

// Calls f(Traits<dtype>{}); the one place where a run-time dtype becomes a compile-time one. Precondition: is_valid.
template <class F>
QCOMM_INLINE decltype(auto) dispatch(DType dtype, F&& f) {
    // Without a default the compiler warns where a new dtype is missing. A number that is no dtype takes float32's way,
    // so the function ends with a return for it, too.
    switch (dtype) {
        case DType::kFloat16:
            return f(Traits<DType::kFloat16>{});
        case DType::kBFloat16:
            return f(Traits<DType::kBFloat16>{});
        case DType::kFloat64:
            return f(Traits<DType::kFloat64>{});
        case DType::kFloat32:
            break;
    }
    return f(Traits<DType::kFloat32>{});
}

// Returns the bytes of an element, in memory and in packets.
// It is 64-bit because it multiplies counts: with an int a tensor of 2 GiB would overflow.
inline std::int64_t item_bytes(DType dtype) {
    return dispatch(dtype,
                    [](auto traits) { return static_cast<std::int64_t>(sizeof(typename decltype(traits)::Storage)); });
}

}  // namespace qcomm
