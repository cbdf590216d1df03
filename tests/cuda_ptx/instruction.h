// PTX as the interpreter keeps it: instructions over numbered registers, and the kernels that consist of them.
//
// The language is NVIDIA's, "Parallel Thread Execution ISA", version 9.0; what of it is known here is what nvcc writes
// for csrc/cuda. parser.h makes these structs from text, machine.h runs them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "counts.h"

namespace ptx {

using Bits = std::uint64_t;   // a register of one lane; a narrower value is in the low bits
using Lanes = std::uint32_t;  // a bit for each lane of a warp

constexpr int kWarp = 32;
constexpr Lanes kAllLanes = ~Lanes{0};
constexpr int kNone = -1;  // no register, no instruction

enum class Type : std::uint8_t { kPredicate, kU8, kS8, kU16, kS16, kU32, kS32, kU64, kS64, kF32, kF64, kMissing };

enum class Op : std::uint8_t {
    // of lanes by themselves
    kAdd,
    kSub,
    kMulLow,
    kMulHigh,
    kMulWide,
    kMadLow,
    kMadWide,
    kFma,
    kDiv,
    kRem,
    kMin,
    kMax,
    kNegate,
    kAbs,
    kReciprocal,
    kSquareRoot,
    kNot,
    kAnd,
    kOr,
    kXor,
    kShiftLeft,
    kShiftRight,
    kFunnelShift,
    kPopCount,
    kLeadingZeros,
    kFindBit,
    kReverse,
    kInsertField,
    kExtractField,
    kPermute,
    kLogic3,
    kSelect,
    kCompare,
    kConvert,
    kMove,
    kPack,
    kUnpack,
    kToAddress,
    kLoad,
    kStore,
    kAtomic,
    // of several lanes
    kShuffle,
    kVote,
    kMatch,
    kWarpBarrier,
    kBarrier,
    kBarrierReduce,
    kFence,
    kBranch,
    kReturn,
};

enum class Space : std::uint8_t { kGeneric, kGlobal, kShared, kLocal, kParameter };

// Instruction::variant
enum Comparison : std::uint8_t { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNan, kNum };
enum Rounding : std::uint8_t { kAsTypeDoes, kToZero, kDown, kToNearest, kUp };
enum AtomicOp : std::uint8_t { kAtomicAdd, kAtomicMax, kAtomicMin, kAtomicOr, kAtomicAnd, kAtomicExchange, kAtomicCas };
enum ShuffleMode : std::uint8_t { kShuffleUp, kShuffleDown, kShuffleXor, kShuffleIndex };
enum VoteMode : std::uint8_t { kBallot, kVoteAll, kVoteAny };
enum Reduction : std::uint8_t { kReduceOr, kReduceAnd, kReduceCount };
enum Direction : std::uint8_t { kLeft, kRight };
enum Counted : std::uint8_t { kFromLowest, kFromHighest };

struct Instruction {
    Op op = Op::kReturn;
    Type type = Type::kMissing;
    Type from = Type::kMissing;  // of a conversion
    Space space = Space::kGeneric;
    std::uint8_t variant = 0;
    int guard = kNone;  // a predicate, without which a lane takes no part
    bool guard_negated = false;
    int out = kNone, predicate_out = kNone;
    int a = kNone, b = kNone, c = kNone, d = kNone;
    int parts[4] = {kNone, kNone, kNone, kNone};  // what is loaded, stored, packed or unpacked
    int width = 1;                                // how many parts
    std::int64_t offset = 0;                      // added to an address
    int target = kNone;                           // of a branch
    int join =
        kNone;     // where the lanes of a branch meet again: the immediate post-dominator; kNone: at the kernel's end
    int line = 0;  // of the file
    std::string text;
};

struct Parameter {
    std::size_t bytes = 0, offset = 0;
};

// Registers that the hardware sets, kNone where a kernel does not read them.
struct SpecialRegisters {
    int thread = kNone, threads = kNone, block = kNone, blocks = kNone, lane = kNone;
};

struct Kernel {
    std::string name;  // plain_name() of the mangled one
    std::string file;
    std::vector<Instruction> code;
    std::vector<Parameter> parameters;
    std::size_t parameter_bytes = 0;
    std::size_t local_bytes = 0;  // of a lane
    int registers = 0;
    std::vector<std::pair<int, Bits>> constants;  // registers that stand for numbers
    SpecialRegisters special;
    std::vector<bool> written;  // by register: whether any instruction does so
    Counts counts;
    std::vector<std::uint32_t> longest;  // of the warp that had the most, how often by instruction
};

int bytes_of(Type type);
Type type_named(const std::string& name);  // "b32" is as good as "u32"; kNone: no type
// Sets Instruction::join of all branches.
void find_joins(Kernel& kernel);
// Ends the program.
[[noreturn]] void stop(const std::string& what);

}  // namespace ptx
