// Instructions that a lane executes by itself.
#include "arithmetic.h"
#include "machine.h"

namespace ptx {
namespace {

constexpr int kHalf = 32;

// Writes f(lane) to the register `out` of the lanes.
template <class F>
void each(Warp& warp, Lanes lanes, int out, F f) {
    Bits* const to = warp.row(out);
    if (lanes == kAllLanes) {
        for (int lane = 0; lane < kWarp; ++lane) to[lane] = f(lane);
        return;
    }
    for (int lane = 0; lane < kWarp; ++lane)
        if ((lanes >> lane & 1) != 0) to[lane] = f(lane);
}

// Operands of an instruction; those that it has not are null.
struct Operands {
    const Bits *a, *b, *c, *d;
    Operands(Warp& warp, const Instruction& i)
        : a(row(warp, i.a)), b(row(warp, i.b)), c(row(warp, i.c)), d(row(warp, i.d)) {}
    static const Bits* row(Warp& warp, int number) { return number == kNone ? nullptr : warp.row(number); }
};

// Arithmetic in any type; false for what is not.
template <class T>
bool compute_number(Warp& warp, const Instruction& i, Lanes lanes) {
    const Operands x(warp, i);
    const auto binary = [&](auto f) {
        each(warp, lanes, i.out, [&](int l) { return bits_of<T>(f(value_of<T>(x.a[l]), value_of<T>(x.b[l]))); });
        return true;
    };
    // Signed numbers wrap as the unsigned ones of their bits do. Products of 16 bits would be of signed ints.
    using Wrapping = std::conditional_t<std::is_floating_point_v<T>, T,
                                        std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint32_t>>;
    const auto wrapping = [](T value) { return static_cast<Wrapping>(value); };
    switch (i.op) {
        case Op::kAdd:
            return binary([&](T a, T b) { return static_cast<T>(wrapping(a) + wrapping(b)); });
        case Op::kSub:
            return binary([&](T a, T b) { return static_cast<T>(wrapping(a) - wrapping(b)); });
        case Op::kMulLow:
            return binary([&](T a, T b) { return static_cast<T>(wrapping(a) * wrapping(b)); });
        case Op::kMin:
            return binary([](T a, T b) { return least(a, b); });
        case Op::kMax:
            return binary([](T a, T b) { return greatest(a, b); });
        case Op::kCompare:
            each(warp, lanes, i.out,
                 [&](int l) { return Bits{compared(value_of<T>(x.a[l]), value_of<T>(x.b[l]), i.variant)}; });
            return true;
        case Op::kConvert:
            each(warp, lanes, i.out, [&](int l) { return converted(value_of<T>(x.a[l]), i.type, i.variant); });
            return true;
        default:
            return false;
    }
}

template <class T>
bool compute_float(Warp& warp, const Instruction& i, Lanes lanes) {
    const Operands x(warp, i);
    constexpr Bits kSign = Bits{1} << (kWidth<T> - 1);
    const auto of = [](Bits bits) { return value_of<T>(bits); };
    switch (i.op) {
        case Op::kFma:
            each(warp, lanes, i.out, [&](int l) { return bits_of<T>(std::fma(of(x.a[l]), of(x.b[l]), of(x.c[l]))); });
            return true;
        case Op::kDiv:
            each(warp, lanes, i.out, [&](int l) { return bits_of<T>(of(x.a[l]) / of(x.b[l])); });
            return true;
        case Op::kReciprocal:
            each(warp, lanes, i.out, [&](int l) { return bits_of<T>(T{1} / of(x.a[l])); });
            return true;
        case Op::kSquareRoot:
            each(warp, lanes, i.out, [&](int l) { return bits_of<T>(std::sqrt(of(x.a[l]))); });
            return true;
        case Op::kNegate:
            each(warp, lanes, i.out, [&](int l) { return x.a[l] ^ kSign; });
            return true;
        case Op::kAbs:
            each(warp, lanes, i.out, [&](int l) { return x.a[l] & (kSign - 1); });
            return true;
        default:
            return false;
    }
}

template <class T>
bool compute_integer(Warp& warp, const Instruction& i, Lanes lanes) {
    const Operands x(warp, i);
    using U = std::make_unsigned_t<T>;
    const auto of = [](Bits bits) { return value_of<T>(bits); };
    const auto u32 = [](Bits bits) { return static_cast<std::uint32_t>(bits); };
    const auto product = [&](int l) { return static_cast<Wide<T>>(of(x.a[l])) * of(x.b[l]); };
    const auto set = [&](auto f) {
        each(warp, lanes, i.out, f);
        return true;
    };
    switch (i.op) {
        case Op::kMadLow:
            return set([&](int l) { return bits_of<U>(static_cast<U>(x.a[l] * x.b[l] + x.c[l])); });
        case Op::kMulHigh:
            return set([&](int l) { return bits_of<U>(static_cast<U>(product(l) >> kWidth<T>)); });
        case Op::kMulWide:
            return set([&](int l) { return static_cast<Bits>(product(l)); });
        case Op::kMadWide:
            return set([&](int l) { return static_cast<Bits>(product(l)) + x.c[l]; });
        case Op::kDiv:  // the least number by -1 wraps, and would trap here
            return set([&](int l) {
                if (std::is_signed_v<T> && of(x.b[l]) == static_cast<T>(-1))
                    return bits_of<U>(static_cast<U>(0 - x.a[l]));
                return bits_of<T>(static_cast<T>(of(x.a[l]) / of(x.b[l])));
            });
        case Op::kRem:
            return set([&](int l) {
                if (std::is_signed_v<T> && of(x.b[l]) == static_cast<T>(-1)) return Bits{0};
                return bits_of<T>(static_cast<T>(of(x.a[l]) % of(x.b[l])));
            });
        case Op::kNegate:
            return set([&](int l) { return bits_of<U>(static_cast<U>(0 - x.a[l])); });
        case Op::kAbs:
            return set([&](int l) { return bits_of<U>(static_cast<U>(of(x.a[l]) < 0 ? 0 - x.a[l] : x.a[l])); });
        case Op::kNot:
            return set([&](int l) { return bits_of<U>(static_cast<U>(~x.a[l])); });
        case Op::kAnd:
            return set([&](int l) { return bits_of<U>(static_cast<U>(x.a[l] & x.b[l])); });
        case Op::kOr:
            return set([&](int l) { return bits_of<U>(static_cast<U>(x.a[l] | x.b[l])); });
        case Op::kXor:
            return set([&](int l) { return bits_of<U>(static_cast<U>(x.a[l] ^ x.b[l])); });
        case Op::kShiftLeft:
            return set([&](int l) { return bits_of<T>(shifted_left(of(x.a[l]), u32(x.b[l]))); });
        case Op::kShiftRight:
            return set([&](int l) { return bits_of<T>(shifted_right(of(x.a[l]), u32(x.b[l]))); });
        case Op::kPopCount:
            return set([&](int l) { return static_cast<Bits>(__builtin_popcountll(static_cast<U>(x.a[l]))); });
        case Op::kLeadingZeros:
            return set([&](int l) { return leading_zeros(of(x.a[l])); });
        case Op::kFindBit:
            return set([&](int l) { return Bits{found_bit(of(x.a[l]), i.variant)}; });
        case Op::kReverse:
            return set([&](int l) { return reversed(of(x.a[l])); });
        case Op::kInsertField:
            return set([&](int l) { return bits_of<T>(with_field(of(x.a[l]), of(x.b[l]), u32(x.c[l]), u32(x.d[l]))); });
        case Op::kExtractField:
            return set([&](int l) { return bits_of<T>(field(of(x.a[l]), u32(x.b[l]), u32(x.c[l]))); });
        case Op::kPermute:
            return set([&](int l) { return Bits{permuted(u32(x.a[l]), u32(x.b[l]), u32(x.c[l]))}; });
        case Op::kLogic3:
            return set([&](int l) { return Bits{logic3(u32(x.a[l]), u32(x.b[l]), u32(x.c[l]), u32(x.d[l]))}; });
        case Op::kFunnelShift:
            return set([&](int l) {
                const Bits both = u32(x.a[l]) | x.b[l] << kHalf;
                const Bits by = x.c[l] % kHalf;
                return Bits{u32(i.variant == kLeft ? both << by >> kHalf : both >> by)};
            });
        default:
            return false;
    }
}

// Lanes in which one operand of a predicate's `and` or `or` decides the result, defined or not as the other one may be.
Lanes decided(Warp& warp, const Instruction& i) {
    if (i.type != Type::kPredicate || (i.op != Op::kAnd && i.op != Op::kOr)) return 0;
    const Lanes flip = i.op == Op::kAnd ? kAllLanes : 0;
    return (warp.defined_in(i.a) & (warp.holds(i.a) ^ flip)) | (warp.defined_in(i.b) & (warp.holds(i.b) ^ flip));
}

}  // namespace

void Machine::execute(Warp& warp, const Instruction& i, Lanes lanes) {
    switch (i.op) {
        case Op::kLoad:
        case Op::kStore:
        case Op::kAtomic:
            return access(warp, i, lanes);
        case Op::kShuffle:
        case Op::kVote:
        case Op::kMatch:
        case Op::kWarpBarrier:
        case Op::kFence:
            return together(warp, i, lanes);
        case Op::kMove:
            each(warp, lanes, i.out, [row = warp.row(i.a)](int lane) { return row[lane]; });
            return define(warp, i, lanes);
        case Op::kPack:
            return pack(warp, i, lanes);
        case Op::kUnpack:
            return unpack(warp, i, lanes);
        case Op::kSelect:
            return select(warp, i, lanes);
        case Op::kToAddress:
            return to_address(warp, i, lanes);
        default:
            return compute(warp, i, lanes);
    }
}

void Machine::compute(Warp& warp, const Instruction& i, Lanes lanes) {
    const Lanes known = decided(warp, i);
    const Type type = i.op == Op::kConvert ? i.from : i.type;
    if (type == Type::kF64 || i.type == Type::kF64) ++kernel_.counts.float64;
    with_type(type, [&](auto value) {
        using T = decltype(value);
        if constexpr (std::is_integral_v<T>) {
            if (i.op == Op::kDiv || i.op == Op::kRem)
                for (int lane = 0; lane < kWarp; ++lane)
                    if ((lanes >> lane & 1) != 0 && value_of<T>(warp.row(i.b)[lane]) == 0)
                        complain(i, "division by zero");
            if (compute_number<T>(warp, i, lanes) || compute_integer<T>(warp, i, lanes)) return;
        } else {
            if (compute_number<T>(warp, i, lanes) || compute_float<T>(warp, i, lanes)) return;
        }
        stop("no arithmetic for " + i.text);
    });
    define(warp, i, lanes);
    warp.defined_in(i.out) |= known & lanes;
}

void Machine::define(Warp& warp, const Instruction& i, Lanes lanes) {
    Lanes defined = kAllLanes;
    for (int input : {i.a, i.b, i.c, i.d})
        if (input != kNone) defined &= warp.defined_in(input);
    Lanes& out = warp.defined_in(i.out);
    out = (out & ~lanes) | (defined & lanes);
}

void Machine::pack(Warp& warp, const Instruction& i, Lanes lanes) {
    const int part_bits = 8 * bytes_of(i.type) / i.width;
    Lanes defined = kAllLanes;
    each(warp, lanes, i.out, [&](int lane) {
        Bits bits = 0;
        for (int n = 0; n < i.width; ++n)
            bits |= (warp.row(i.parts[n])[lane] & low_bits(static_cast<std::uint32_t>(part_bits))) << n * part_bits;
        return bits;
    });
    // nvcc fills up with registers that no instruction writes.
    for (int n = 0; n < i.width; ++n)
        if (kernel_.written[static_cast<std::size_t>(i.parts[n])]) defined &= warp.defined_in(i.parts[n]);
    Lanes& out = warp.defined_in(i.out);
    out = (out & ~lanes) | (defined & lanes);
}

void Machine::unpack(Warp& warp, const Instruction& i, Lanes lanes) {
    const int part_bits = 8 * bytes_of(i.type) / i.width;
    const Warp::Row whole = warp.registers[static_cast<std::size_t>(i.a)];
    const Lanes defined = warp.defined_in(i.a);
    for (int n = 0; n < i.width; ++n) {
        if (i.parts[n] == kNone) continue;
        each(warp, lanes, i.parts[n], [&](int lane) {
            return whole.lane[lane] >> n * part_bits & low_bits(static_cast<std::uint32_t>(part_bits));
        });
        Lanes& out = warp.defined_in(i.parts[n]);
        out = (out & ~lanes) | (defined & lanes);
    }
}

void Machine::select(Warp& warp, const Instruction& i, Lanes lanes) {
    const Lanes first = warp.holds(i.c);
    const Lanes defined = warp.defined_in(i.c) & ((warp.defined_in(i.a) & first) | (warp.defined_in(i.b) & ~first));
    each(warp, lanes, i.out,
         [&, a = warp.row(i.a), b = warp.row(i.b)](int lane) { return (first >> lane & 1) != 0 ? a[lane] : b[lane]; });
    Lanes& out = warp.defined_in(i.out);
    out = (out & ~lanes) | (defined & lanes);
}

// The parser's variant is 1 for an address of the space from a generic one.
void Machine::to_address(Warp& warp, const Instruction& i, Lanes lanes) {
    const Bits tag = i.space == Space::kShared ? kSharedTag : i.space == Space::kLocal ? kLocalTag : 0;
    const Bits* const from = warp.row(i.a);
    each(warp, lanes, i.out, [&](int lane) { return i.variant != 0 ? from[lane] & ~tag : from[lane] | tag; });
    define(warp, i, lanes);
}

}  // namespace ptx
