// What the tests of the emulated kernels share: values, and failures that name their case.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "qcomm/dtype.h"

namespace qcomm::test {

[[noreturn]] inline void fail(const std::string& what) {
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    std::exit(1);
}
inline void require(bool holds, const std::string& what) {
    if (!holds) fail(what);
}

inline const char* name_of(DType dtype) {
    static const char* const names[] = {"float32", "float16", "bfloat16", "float64"};
    return names[static_cast<int>(dtype)];
}

class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed * 2 + 1) {}
    double uniform() {  // in (0, 1)
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return (static_cast<double>(state_ >> 33) + 0.5) * 0x1p-31;
    }
    double gaussian() { return std::sqrt(-2.0 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()); }

private:
    std::uint64_t state_;
};

enum class Kind { kGaussian, kUniform, kHeavy, kConstant, kZeros, kSpike, kSparse, kNonFinite, kTiny, kBursts, kLarge };
constexpr Kind kKinds[] = {Kind::kGaussian, Kind::kUniform,   Kind::kHeavy, Kind::kConstant, Kind::kZeros, Kind::kSpike,
                           Kind::kSparse,   Kind::kNonFinite, Kind::kTiny,  Kind::kBursts,   Kind::kLarge};
inline const char* name_of(Kind kind) {
    static const char* const names[] = {"gaussian", "uniform",    "heavy-tailed", "constant", "zeros", "spike",
                                        "sparse",   "non-finite", "tiny",         "bursts",   "large"};
    return names[static_cast<int>(kind)];
}

inline double value(Kind kind, Random& random, std::int64_t i, std::int64_t n) {
    switch (kind) {
        case Kind::kGaussian:
            return random.gaussian();
        case Kind::kUniform:
            return random.uniform() - 0.5;
        case Kind::kHeavy:  // Student's t with 2 degrees of freedom: many escapes, raw blocks among them
            return random.gaussian() / std::sqrt(-std::log(random.uniform()));
        case Kind::kConstant:
            return -0.375;
        case Kind::kZeros:
            return i % 3 == 0 ? -0.0 : 0.0;
        case Kind::kSpike:
            return i == n / 2 ? 1.0 : 0.0;
        case Kind::kSparse:
            return random.uniform() < 0.02 ? random.gaussian() : 0.0;
        case Kind::kNonFinite:
            return i == n - 1 ? std::numeric_limits<double>::infinity() : random.gaussian();
        case Kind::kTiny:  // the step is no normal float32
            return random.gaussian() * 1e-39;
        case Kind::kBursts:  // runs of zeros, of small values and of large ones: every mode of a block
            return i / 5000 % 3 == 0 ? 0.0 : random.gaussian() * (i / 5000 % 3 == 1 ? 0.05 : 20.0);
        case Kind::kLarge:  // a coarse sigma grid has levels that are no float16
            return std::fmin(60000.0, std::fmax(-60000.0, random.gaussian() * 2e4));
    }
    return 0.0;
}

template <class Tr>
std::vector<typename Tr::Storage> make_values(Kind kind, std::int64_t n, std::uint64_t seed) {
    Random random(seed);
    std::vector<typename Tr::Storage> values(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) values[static_cast<std::size_t>(i)] = Tr::narrow(value(kind, random, i, n));
    return values;
}

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Where two rows of bytes first differ, for a message.
inline std::string difference(const std::uint8_t* a, const std::uint8_t* b, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
        if (a[i] != b[i])
            return "byte " + std::to_string(i) + " of " + std::to_string(n) + " is " + std::to_string(a[i]) + ", not " +
                   std::to_string(b[i]);
    }
    return "equal";
}

}  // namespace qcomm::test
