// A launch of one kernel: blocks one after the other, the warps of a block in slices, the lanes of a warp in step.
//
// schedule.cpp     blocks, slices, barriers, branches: who runs, in an order by seed
// lanes.cpp        instructions that a lane executes by itself, arithmetic.h what they compute
// warp.cpp         instructions for which the lanes of a warp wait for each other
// memory.cpp       loads, stores and atomics, and what is checked of each
// races.h          accesses that nothing orders
//
// Lanes that part at a branch go on one after the other and meet at its immediate post-dominator, which is one of the
// orders that a GPU may choose. Device memory is the host's. Any finding ends the program with the instruction's text:
// an undefined register that reaches an address, a branch, a vote, an atomic or global memory; accesses outside
// shared, local and parameter memory or to freed or foreign memory of the host; misaligned ones; warp operations and
// barriers that only some lanes reach; shuffles from lanes that are absent; division by zero; races.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "instruction.h"
#include "races.h"

namespace ptx {

// Generic addresses of shared and local memory have a bit that no pointer of the host has.
constexpr Bits kSharedTag = Bits{1} << 60, kLocalTag = Bits{1} << 61;

struct Options {
    std::uint64_t seed = 0;  // 0: in order; 1: in reverse; others: random orders and slices
    bool races = false;      // look for races, which takes several times as long
    bool counts = false;     // fill Kernel::counts
};

// Lanes that are at one instruction, and where they wait for the others.
struct Path {
    int at = 0, join = kNone;
    Lanes lanes = 0;
};

struct Warp {
    struct Row {
        Bits lane[kWarp];
    };
    int number = 0;
    Lanes alive = 0;
    std::vector<Path> paths;     // the last one runs
    std::vector<Row> registers;  // by number
    std::vector<Lanes> defined;  // by register
    std::vector<std::uint8_t> local, local_defined;
    std::uint32_t epoch = 0;  // increases where its lanes see each other's writes
    std::uint64_t executed = 0;
    std::vector<std::uint32_t> executions;  // by instruction, if they are counted
    bool at_barrier = false;
    int barrier = kNone;  // the instruction
    Lanes barrier_input = 0;

    Bits* row(int number_) { return registers[static_cast<std::size_t>(number_)].lane; }
    Lanes& defined_in(int number_) { return defined[static_cast<std::size_t>(number_)]; }
    // The lanes in which a predicate holds.
    Lanes holds(int number_) {
        const Bits* const bits = row(number_);
        Lanes lanes = 0;
        for (int lane = 0; lane < kWarp; ++lane) lanes |= static_cast<Lanes>(bits[lane] & 1) << lane;
        return lanes;
    }
};

class Machine {
public:
    // `warps` are those of the kernel's last launch, or none: their memory is taken over.
    Machine(Kernel& kernel, std::vector<Warp>& warps, const Options& options, std::uint32_t blocks,
            std::uint32_t threads, std::size_t shared_bytes, std::vector<std::uint8_t> parameters);
    void run();

private:
    // schedule.cpp
    void run_block(std::uint32_t block);
    void begin_block(std::uint32_t block);
    void begin_warp(Warp& warp);
    bool run_a_warp();
    void run_slice(Warp& warp, std::uint32_t instructions);
    bool step(Warp& warp);
    void branch(Warp& warp, const Instruction& i, Lanes taken);
    void arrive(Warp& warp, const Instruction& i, Lanes lanes);
    void open_barrier();
    std::uint32_t random(std::uint32_t n);

    // lanes.cpp
    void execute(Warp& warp, const Instruction& i, Lanes lanes);
    void compute(Warp& warp, const Instruction& i, Lanes lanes);
    void pack(Warp& warp, const Instruction& i, Lanes lanes);
    void unpack(Warp& warp, const Instruction& i, Lanes lanes);
    void select(Warp& warp, const Instruction& i, Lanes lanes);
    void to_address(Warp& warp, const Instruction& i, Lanes lanes);
    // A result is defined where all inputs are.
    void define(Warp& warp, const Instruction& i, Lanes lanes);

    // warp.cpp
    void together(Warp& warp, const Instruction& i, Lanes lanes);
    void shuffle(Warp& warp, const Instruction& i, Lanes lanes);
    void vote(Warp& warp, const Instruction& i, Lanes lanes);
    void match(Warp& warp, const Instruction& i, Lanes lanes);

    // memory.cpp
    struct Place {
        std::uint8_t* bytes;
        std::uint8_t* defined;  // of shared and local memory; else null
        Space space;
    };
    void access(Warp& warp, const Instruction& i, Lanes lanes);
    Place place(Warp& warp, const Instruction& i, int lane, Bits& address, int bytes);
    void load(Warp& warp, const Instruction& i, int lane, const Place& place);
    void store(Warp& warp, const Instruction& i, int lane, const Place& place, Bits address);
    void atomic(Warp& warp, const Instruction& i, int lane, const Place& place, Bits address);
    void note_race(Warp& warp, const Instruction& i, int lane, Bits address, const Place& place, int bytes, Use use);
    void count(const Instruction& i, const Bits* addresses, Lanes global, Lanes shared, Lanes local);

    void require_defined(Warp& warp, const Instruction& i, int number, Lanes lanes, const char* what);
    [[noreturn]] void complain(const Instruction& i, const std::string& what) const;

    Kernel& kernel_;
    const Options options_;
    const std::uint32_t blocks_, threads_;
    const std::vector<std::uint8_t> parameters_;
    std::vector<std::uint8_t> shared_, shared_defined_;
    std::vector<Warp>& warps_;
    std::uint32_t block_ = 0;
    std::uint32_t epoch_ = 0;  // of the block, increases at each barrier
    std::unique_ptr<Races> races_;
    std::uint64_t random_state_;
};

}  // namespace ptx
