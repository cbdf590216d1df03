// The interpreter itself: instructions whose results PTX documents, and kernels with a fault that must be noticed. It
// has the names of tests/cuda_emulation/test_emulation.cpp, which does the same for the emulation.
#include <cstddef>
#include <cstdint>

#include "cases.h"
#include "runtime.h"
#include "suite.h"

namespace qcomm::test {
namespace {

// A kernel with one parameter, an address that is in %rd0.
std::string kernel(const std::string& body) {
    return ".version 9.0\n.target sm_75\n.address_size 64\n.extern .shared .align 16 .b8 shared[];\n"
           ".visible .entry tested(.param .u64 tested_param_0)\n{\n"
           ".reg .b32 %r<9>; .reg .b64 %rd<9>; .reg .pred %p<9>;\nld.param.u64 %rd0, [tested_param_0];\n"
           "mov.u32 %r0, %tid.x;\nmul.wide.u32 %rd8, %r0, 16;\nadd.s64 %rd8, %rd8, %rd0;\n" +
           body + "\nret;\n}\n";
}

void run(const std::string& body, unsigned threads, std::size_t shared_bytes, void* out) {
    ptx::launch(kernel(body), "tested", 1, threads, shared_bytes, {&out});
}

struct Example {
    const char* instruction;  // its result is in %r1, or in %rd1
    std::uint64_t result;
};
constexpr Example kExamples32[] = {
    {"add.s32 %r1, 0x7FFFFFFF, 1", 0x80000000},
    {"mad.lo.s32 %r1, -2, 3, 7", 1},
    {"rem.s32 %r1, -7, 3", 0xFFFFFFFF},
    {"div.s32 %r1, 0x80000000, -1", 0x80000000},
    {"shl.b32 %r1, 1, 32", 0},
    {"shr.s32 %r1, -8, 40", 0xFFFFFFFF},
    {"shr.u32 %r1, -8, 40", 0},
    {"shf.l.wrap.b32 %r1, 0x80000000, 1, 33", 3},
    {"shf.r.wrap.b32 %r1, 0x80000000, 1, 1", 0xC0000000},
    {"prmt.b32 %r1, 0x33221180, 0x77665544, 0x8074", 0xFF807744},
    {"bfi.b32 %r1, 0xFF, 0xF000000F, 4, 8", 0xF0000FFF},
    {"bfe.s32 %r1, 0x80, 4, 4", 0xFFFFFFF8},
    {"bfe.u32 %r1, 0x80, 4, 4", 8},
    {"lop3.b32 %r1, 12, 10, 7, 0x96", 1},
    {"popc.b64 %r1, -1", 64},
    {"clz.b32 %r1, 1", 31},
    {"clz.b32 %r1, 0", 32},
    {"brev.b32 %r1, 1", 0x80000000},
    {"bfind.u32 %r1, 0x00100000", 20},
    {"bfind.shiftamt.u32 %r1, 0x00100000", 11},
    {"bfind.s32 %r1, -2", 0},
    {"bfind.u32 %r1, 0", 0xFFFFFFFF},
    {"min.f32 %r1, 0f7FC00000, 0f3F800000", 0x3F800000},
    {"max.f32 %r1, 0f80000000, 0f00000000", 0},
    {"fma.rn.f32 %r1, 0f3F800800, 0f3F800800, 0fBF800000", 0x3A000400},
    {"mul.f32 %r2, 0f3F800800, 0f3F800800; add.f32 %r1, %r2, 0fBF800000", 0x3A000000},
    {"cvt.rzi.s32.f32 %r1, 0f4F32D05E", 0x7FFFFFFF},
    {"cvt.rzi.u32.f32 %r1, 0fBF800000", 0},
    {"cvt.rni.s32.f32 %r1, 0f40200000", 2},
    {"cvt.rn.f32.f64 %r1, 0d3FB999999999999A", 0x3DCCCCCD},
    {"cvt.s32.s8 %r1, 200", 0xFFFFFFC8},
    {"cvt.u16.u32 %r1, 0x12345678", 0x5678},
    {"setp.neu.f32 %p1, 0f7FC00000, 0f7FC00000; selp.u32 %r1, 1, 0, %p1", 1},
    {"setp.ne.f32 %p1, 0f7FC00000, 0f7FC00000; selp.u32 %r1, 1, 0, %p1", 0},
    {"setp.nan.f32 %p1, 0f7FC00000, 0f3F800000; selp.u32 %r1, 1, 0, %p1", 1},
    {"mov.b64 {%r1, %r2}, 0x1122334455667788", 0x55667788},
};
constexpr Example kExamples64[] = {
    {"mul.wide.s32 %rd1, -3, 5", ~std::uint64_t{0} - 14},
    {"mul.hi.u64 %rd1, 0xFFFFFFFFFFFFFFFF, 2", 1},
    {"cvt.s64.s32 %rd1, -1", ~std::uint64_t{0}},
    {"cvt.rni.f64.f64 %rd1, 0d4004000000000000", 0x4000000000000000},
    {"cvt.rzi.s64.f64 %rd1, 0d7FF8000000000000", std::uint64_t{1} << 63},
    {"sqrt.rn.f64 %rd1, 0d4000000000000000", 0x3FF6A09E667F3BCD},
    {"mov.b64 %rd1, {3, 4}", 0x0000000400000003},
};

template <std::size_t n>
void examples(const Example (&rows)[n], const std::string& stored) {
    for (const Example& row : rows) {
        std::vector<std::uint64_t> out(2);
        run(std::string(row.instruction) + "; st.global." + stored + ";", 1, 0, out.data());
        require(out[0] == row.result, std::string(row.instruction) + " is " + std::to_string(out[0]));
    }
}

// Lanes that part and meet again, and what they then tell each other.
void warps() {
    constexpr std::uint32_t kThreads = 64;
    std::vector<std::uint32_t> out(4 * kThreads);
    run("and.b32 %r1, %r0, 1; setp.eq.s32 %p1, %r1, 0; mov.u32 %r2, 5;\n"
        "@%p1 bra $even;\nadd.s32 %r2, %r0, 100;\n$even:\n"
        "vote.sync.ballot.b32 %r3, %p1, -1; shfl.sync.up.b32 %r4|%p2, %r2, 1, 0, -1;\n"
        "bar.red.popc.u32 %r5, 0, %p1; shl.b32 %r6, %r0, 2; mov.u32 %r7, shared; add.s32 %r6, %r6, %r7;\n"
        "st.shared.u32 [%r6], %r2; bar.sync 0; xor.b32 %r6, %r6, 252; ld.shared.u32 %r7, [%r6];\n"
        "st.global.v4.u32 [%rd8], {%r3, %r4, %r5, %r7};",
        kThreads, 4 * kThreads, out.data());
    const auto value = [](std::uint32_t t) { return t % 2 == 0 ? 5 : t + 100; };
    for (std::uint32_t t = 0; t < kThreads; ++t) {
        require(out[4 * t] == 0x55555555, "a vote after lanes have met");
        require(out[4 * t + 1] == value(t % 32 == 0 ? t : t - 1), "a shuffle");
        require(out[4 * t + 2] == kThreads / 2, "a barrier's count");
        require(out[4 * t + 3] == value(63 - t), "shared memory behind a barrier");
    }
}

struct Fault {
    const char* name;
    const char* body;
};
// Two warps, 64 bytes of shared memory, and 1024 bytes in %rd0.
constexpr Fault kFaults[] = {
    {"misuse-instruction", "tanh.approx.f32 %r1, %r0;"},
    {"misuse-modifier", "add.sat.s32 %r1, %r0, 1;"},
    {"misuse-division", "div.u32 %r1, 1, %r0;"},
    {"misuse-barrier", "setp.lt.u32 %p1, %r0, 16; @%p1 bra $some; bar.sync 0; $some:"},
    {"misuse-barriers", "setp.lt.u32 %p1, %r0, 32; @%p1 bra $one; bar.sync 0; ret; $one: bar.sync 0;"},
    {"misuse-lanes", "setp.lt.u32 %p1, %r0, 16; @%p1 bra $some; bar.warp.sync -1; $some:"},
    {"misuse-shuffle",
     "setp.ge.u32 %p1, %r0, 16; @%p1 bra $rest; shfl.sync.idx.b32 %r1|%p2, %r0, 20, 31, 0xFFFF; $rest:"},
    {"misuse-vote", "vote.sync.ballot.b32 %r1, %p1, -1;"},
    {"misuse-branch", "@%p1 bra $on; $on:"},
    {"misuse-address", "ld.global.u32 %r1, [%rd1];"},
    {"misuse-register", "st.global.u32 [%rd8], %r1;"},
    {"misuse-unwritten", "ld.shared.u32 %r1, [shared]; st.global.u32 [%rd8], %r1;"},
    {"misuse-shared", "st.shared.u32 [shared+64], 1;"},
    {"misuse-aligned", "st.global.u64 [%rd8+4], 1;"},
    {"misuse-heap", "st.global.u32 [%rd8+16], 1;"},
    {"misuse-null", "mov.u64 %rd1, 8; ld.global.u64 %rd2, [%rd1];"},
    {"misuse-race-lanes", "st.shared.u32 [shared], %r0;"},
    {"misuse-race-warps", "shr.u32 %r1, %r0, 5; st.global.u32 [%rd0], %r1;"},
};

}  // namespace

void emulator_group() {
    examples(kExamples32, "u32 [%rd0], %r1");
    examples(kExamples64, "u64 [%rd0], %rd1");
    warps();
}

void misuse(const std::string& which) {
    std::vector<std::uint64_t> memory(128);
    for (const Fault& fault : kFaults)
        if (which == fault.name) run(fault.body, 64, 64, memory.data());
}

}  // namespace qcomm::test
