// What an x86 processor and its operating system can run, asked of the processor itself: the compiler's own answer
// (__builtin_cpu_supports) needs a runtime library that not every compiler of wheels brings.
#pragma once

#include <cstdint>

#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif

namespace qcomm {

// The instruction sets that a version of the inner loops is compiled with (CMakeLists.txt).
struct X86Features {
    bool avx2 = false;    // and FMA, BMI2
    bool avx512 = false;  // F, BW, DQ, VL, VBMI, VBMI2 and GFNI
};

namespace x86 {

struct Registers {
    std::uint32_t a, b, c, d;
};

// All zeros for a leaf that the processor does not have.
inline Registers cpuid(std::uint32_t leaf) {
    Registers r{};
#if defined(_MSC_VER)
    int words[4];
    __cpuid(words, 0);
    if (static_cast<std::uint32_t>(words[0]) < leaf) return r;
    __cpuidex(words, static_cast<int>(leaf), 0);
    r = {static_cast<std::uint32_t>(words[0]), static_cast<std::uint32_t>(words[1]),
         static_cast<std::uint32_t>(words[2]), static_cast<std::uint32_t>(words[3])};
#else
    __get_cpuid_count(leaf, 0, &r.a, &r.b, &r.c, &r.d);
#endif
    return r;
}

// The registers that the operating system saves. Only where the processor says that there is such an instruction.
inline std::uint32_t saved_registers() {
#if defined(_MSC_VER)
    return static_cast<std::uint32_t>(_xgetbv(0));
#else
    std::uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
#endif
}

constexpr bool has_bits(std::uint32_t word, std::uint32_t bits) { return (word & bits) == bits; }

// Bits by Intel's manual (volume 2A, CPUID; volume 1, 13.3, for XCR0).
inline X86Features ask() {
    constexpr std::uint32_t kFma = 1u << 12, kXsaveUsed = 1u << 27;                               // leaf 1, c
    constexpr std::uint32_t kAvx2 = 1u << 5, kBmi2 = 1u << 8;                                     // leaf 7, b
    constexpr std::uint32_t kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;                  // F, DQ, BW, VL
    constexpr std::uint32_t kVbmi = 1u << 1, kVbmi2 = 1u << 6, kGfni = 1u << 8;                   // leaf 7, c
    constexpr std::uint32_t kYmm = 1u << 1 | 1u << 2, kZmm = kYmm | 1u << 5 | 1u << 6 | 1u << 7;  // XCR0
    X86Features found;
    const std::uint32_t first = cpuid(1).c;
    if (!has_bits(first, kFma | kXsaveUsed)) return found;
    const std::uint32_t saved = saved_registers();
    const Registers more = cpuid(7);
    found.avx2 = has_bits(more.b, kAvx2 | kBmi2) && has_bits(saved, kYmm);
    found.avx512 =
        found.avx2 && has_bits(more.b, kAvx512) && has_bits(more.c, kVbmi | kVbmi2 | kGfni) && has_bits(saved, kZmm);
    return found;
}

}  // namespace x86

// Asked once: a virtual machine leaves to its host for each question, which takes as long as decoding a small packet.
inline X86Features x86_features() {
    static const X86Features found = x86::ask();
    return found;
}

}  // namespace qcomm
