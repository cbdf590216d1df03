// What PTX computes of one lane's operands, on registers' bits. Floating point is the host's IEEE arithmetic, compiled
// without contraction; integers wrap; shifts by a width or more give what PTX documents.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "instruction.h"

namespace ptx {

template <class T>
T value_of(Bits bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T>
Bits bits_of(T value) {
    Bits bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}

// Calls f with a value of the type's C++ type.
template <class F>
void with_type(Type type, F f) {
    switch (type) {
        case Type::kPredicate:
        case Type::kU8:
            return f(std::uint8_t{});
        case Type::kS8:
            return f(std::int8_t{});
        case Type::kU16:
            return f(std::uint16_t{});
        case Type::kS16:
            return f(std::int16_t{});
        case Type::kU32:
            return f(std::uint32_t{});
        case Type::kS32:
            return f(std::int32_t{});
        case Type::kU64:
            return f(std::uint64_t{});
        case Type::kS64:
            return f(std::int64_t{});
        case Type::kF32:
            return f(float{});
        case Type::kF64:
            return f(double{});
        case Type::kMissing:
            break;
    }
    stop("an instruction without a type");
}

template <class T>
constexpr int kWidth = 8 * static_cast<int>(sizeof(T));
// Twice as wide, for products.
__extension__ using Int128 = __int128;
__extension__ using UInt128 = unsigned __int128;
template <class T>
using Wide = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, Int128, UInt128>,
                                std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>>;

// PTX's min and max return the number where the other operand is a NaN, and take -0 to be less than 0.
template <class T>
T least(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
        if (std::isnan(a)) return b;
        if (std::isnan(b)) return a;
        if (a == b) return std::signbit(a) ? a : b;
    }
    return a < b ? a : b;
}
template <class T>
T greatest(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
        if (std::isnan(a)) return b;
        if (std::isnan(b)) return a;
        if (a == b) return std::signbit(a) ? b : a;
    }
    return a > b ? a : b;
}

template <class T>
T shifted_left(T value, std::uint32_t by) {
    using U = std::make_unsigned_t<T>;
    return by >= static_cast<std::uint32_t>(kWidth<T>) ? T{0} : static_cast<T>(static_cast<U>(value) << by);
}
template <class T>
T shifted_right(T value, std::uint32_t by) {
    if (by < static_cast<std::uint32_t>(kWidth<T>)) return static_cast<T>(value >> by);
    return value < 0 ? static_cast<T>(-1) : T{0};
}

inline std::uint64_t low_bits(std::uint32_t count) {
    return count >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
}

// bfi: the low `count` bits of a in the place of b's from `first` on.
template <class T>
T with_field(T a, T b, std::uint32_t first, std::uint32_t count) {
    first &= 255, count &= 255;
    if (first >= static_cast<std::uint32_t>(kWidth<T>) || count == 0) return b;
    const std::uint64_t mask = low_bits(count) << first;
    return static_cast<T>((static_cast<std::uint64_t>(a) << first & mask) | (static_cast<std::uint64_t>(b) & ~mask));
}
// bfe: `count` bits from `first` on; of a signed number, its sign above them.
template <class T>
T field(T value, std::uint32_t first, std::uint32_t count) {
    first &= 255, count &= 255;
    if (count == 0) return T{0};
    const std::uint32_t width = kWidth<T>;
    const std::uint32_t sign_at = first + count - 1 < width - 1 ? first + count - 1 : width - 1;
    const bool sign = std::is_signed_v<T> && (static_cast<std::uint64_t>(value) >> sign_at & 1) != 0;
    std::uint64_t result = sign ? ~std::uint64_t{0} : 0;
    for (std::uint32_t n = 0; n < count && first + n < width; ++n) {
        const std::uint64_t bit = static_cast<std::uint64_t>(value) >> (first + n) & 1;
        result = (result & ~(std::uint64_t{1} << n)) | bit << n;
    }
    return static_cast<T>(result);
}

template <class T>
std::uint64_t reversed(T value) {
    std::uint64_t result = 0;
    for (int n = 0; n < kWidth<T>; ++n) result |= (static_cast<std::uint64_t>(value) >> n & 1) << (kWidth<T> - 1 - n);
    return result;
}
// Zeros above the highest one.
template <class T>
std::uint64_t leading_zeros(T value) {
    const auto bits = static_cast<std::uint64_t>(static_cast<std::make_unsigned_t<T>>(value));
    return static_cast<std::uint64_t>(bits == 0 ? kWidth<T> : __builtin_clzll(bits) - (64 - kWidth<T>));
}

// bfind: the number of the highest bit that is not the sign, counted from the lowest or the highest one.
template <class T>
std::uint32_t found_bit(T value, std::uint8_t counted) {
    const std::uint64_t zeros = leading_zeros(value < 0 ? static_cast<T>(~value) : value);
    if (zeros == kWidth<T>) return ~std::uint32_t{0};
    return static_cast<std::uint32_t>(counted == kFromHighest ? zeros : kWidth<T> - 1 - zeros);
}

// prmt: bytes of the eight of a and b, chosen by c's digits; 8 added to a digit repeats the byte's sign.
inline std::uint32_t permuted(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    const std::uint64_t all = a | static_cast<std::uint64_t>(b) << 32;
    std::uint32_t result = 0;
    for (int n = 0; n < 4; ++n) {
        const std::uint32_t digit = c >> 4 * n & 15;
        std::uint32_t byte = all >> 8 * (digit & 7) & 255;
        if ((digit & 8) != 0) byte = (byte & 128) != 0 ? 255 : 0;
        result |= byte << 8 * n;
    }
    return result;
}
// lop3: bit by bit, the table's entry number abc.
inline std::uint32_t logic3(std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t table) {
    std::uint32_t result = 0;
    for (int n = 0; n < 8; ++n)
        if ((table >> n & 1) != 0)
            result |= ((n & 4) != 0 ? a : ~a) & ((n & 2) != 0 ? b : ~b) & ((n & 1) != 0 ? c : ~c);
    return result;
}

// Comparisons that end in u hold where an operand is a NaN, the others do not.
template <class T>
bool compared(T a, T b, std::uint8_t comparison) {
    switch (comparison) {
        case kEq:
            return a == b;
        case kNe:
            return a < b || a > b;
        case kLt:
            return a < b;
        case kLe:
            return a <= b;
        case kGt:
            return a > b;
        case kGe:
            return a >= b;
        case kEqu:
            return !(a < b || a > b);
        case kNeu:
            return !(a == b);
        case kLtu:
            return !(a >= b);
        case kLeu:
            return !(a > b);
        case kGtu:
            return !(a <= b);
        case kGeu:
            return !(a < b);
        case kNan:
            return a != a || b != b;
        default:
            return a == a && b == b;
    }
}

template <class T>
T rounded(T value, std::uint8_t rounding) {
    switch (rounding) {
        case kToZero:
            return std::trunc(value);
        case kDown:
            return std::floor(value);
        case kToNearest:
            return std::nearbyint(value);
        case kUp:
            return std::ceil(value);
        default:
            return value;
    }
}

// A number of floating point as an integer: the nearest one that there is. A NaN becomes 0 in 32 bits from float32, and
// the lone highest bit otherwise.
template <class To, class From>
Bits to_integer(From value) {
    if (std::isnan(value)) return sizeof(From) == 4 && sizeof(To) == 4 ? 0 : Bits{1} << (kWidth<To> - 1);
    const From above = std::ldexp(From{1}, kWidth<To> - (std::is_signed_v<To> ? 1 : 0));
    const From lowest = std::is_signed_v<To> ? -above : From{0};
    if (value >= above) return bits_of(std::numeric_limits<To>::max());
    return bits_of(value <= lowest ? std::numeric_limits<To>::min() : static_cast<To>(value));
}

template <class From>
Bits converted(From value, Type to, std::uint8_t rounding) {
    if constexpr (std::is_floating_point_v<From>) {
        value = rounded(value, rounding);
        if (to == Type::kS32) return to_integer<std::int32_t>(value);
        if (to == Type::kU32) return to_integer<std::uint32_t>(value);
        if (to == Type::kS64) return to_integer<std::int64_t>(value);
        if (to == Type::kU64) return to_integer<std::uint64_t>(value);
    }
    if (to == Type::kF32) return bits_of(static_cast<float>(value));
    if (to == Type::kF64) return bits_of(static_cast<double>(value));
    if constexpr (std::is_integral_v<From>) {
        Bits bits = 0;
        // The register may be wider than the type, and has the number then, too.
        with_type(to, [&](auto type) {
            using To = decltype(type);
            if constexpr (std::is_integral_v<To>) {
                using Extended = std::conditional_t<std::is_signed_v<To>, std::int64_t, std::uint64_t>;
                bits = bits_of(static_cast<Extended>(static_cast<To>(value)));
            }
        });
        return bits;
    }
    stop("a conversion of floating point to an integer of fewer than 32 bits");
}

}  // namespace ptx
