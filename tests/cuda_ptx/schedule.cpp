// Who runs: blocks, warps, the lanes of a branch, barriers.
#include <algorithm>
#include <filesystem>
#include <numeric>

#include "machine.h"

namespace ptx {
namespace {

constexpr int kNever = -2;                        // the join of a warp's first path: its lanes run to the end
constexpr std::uint32_t kMostInstructions = 400;  // of a random slice
constexpr std::uint8_t kGarbage = 0xA5;

}  // namespace

Machine::Machine(Kernel& kernel, std::vector<Warp>& warps, const Options& options, std::uint32_t blocks,
                 std::uint32_t threads, std::size_t shared_bytes, std::vector<std::uint8_t> parameters)
    : kernel_(kernel),
      options_(options),
      blocks_(blocks),
      threads_(threads),
      parameters_(std::move(parameters)),
      shared_(shared_bytes),
      shared_defined_(shared_bytes),
      warps_(warps),
      random_state_(88172645463325252u ^ options.seed * 0x9E3779B97F4A7C15u) {
    if (options.races) races_ = std::make_unique<Races>(blocks, shared_bytes);
    const auto registers = static_cast<std::size_t>(kernel.registers);
    warps_.resize((threads + kWarp - 1) / kWarp);
    for (std::size_t n = 0; n < warps_.size(); ++n) {
        warps_[n].number = static_cast<int>(n);
        warps_[n].registers.resize(registers);
        warps_[n].defined.resize(registers);
        warps_[n].local.resize(kernel.local_bytes * kWarp);
        warps_[n].local_defined.resize(kernel.local_bytes * kWarp);
    }
}

// Marsaglia, "Xorshift RNGs", 2003.
std::uint32_t Machine::random(std::uint32_t n) {
    random_state_ ^= random_state_ << 13;
    random_state_ ^= random_state_ >> 7;
    random_state_ ^= random_state_ << 17;
    return static_cast<std::uint32_t>((random_state_ >> 32) * n >> 32);
}

void Machine::run() {
    std::vector<std::uint32_t> order(blocks_);
    std::iota(order.begin(), order.end(), 0u);
    if (options_.seed == 1) std::reverse(order.begin(), order.end());
    if (options_.seed > 1)
        for (std::uint32_t i = blocks_; i-- > 1;) std::swap(order[i], order[random(i + 1)]);
    for (std::uint32_t block : order) run_block(block);
    ++kernel_.counts.launches;
    kernel_.counts.blocks += blocks_;
    kernel_.counts.warps += blocks_ * warps_.size();
}

void Machine::run_block(std::uint32_t block) {
    begin_block(block);
    while (run_a_warp()) {
    }
    for (const Warp& warp : warps_) {
        kernel_.counts.instructions += warp.executed;
        if (warp.executed <= kernel_.counts.longest_warp) continue;
        kernel_.counts.longest_warp = warp.executed;
        kernel_.longest = warp.executions;
    }
}

void Machine::begin_block(std::uint32_t block) {
    block_ = block;
    epoch_ = 0;
    std::fill(shared_.begin(), shared_.end(), kGarbage);
    std::fill(shared_defined_.begin(), shared_defined_.end(), std::uint8_t{0});
    if (races_) races_->begin_block();
    for (Warp& warp : warps_) begin_warp(warp);
}

void Machine::begin_warp(Warp& warp) {
    const std::uint32_t first = static_cast<std::uint32_t>(warp.number) * kWarp, lanes = threads_ - first;
    warp.alive = lanes >= kWarp ? kAllLanes : (Lanes{1} << lanes) - 1;
    warp.paths.assign(1, {0, kNever, warp.alive});
    warp.at_barrier = false;
    warp.epoch = 0;
    warp.executed = 0;
    warp.executions.assign(options_.counts ? kernel_.code.size() : 0, 0);
    std::fill(warp.defined.begin(), warp.defined.end(), 0u);
    std::fill(warp.local_defined.begin(), warp.local_defined.end(), std::uint8_t{0});
    const auto set = [&](int number, Bits first_lane, Bits next) {
        if (number == kNone) return;
        for (Bits lane = 0; lane < kWarp; ++lane) warp.row(number)[lane] = first_lane + next * lane;
        warp.defined_in(number) = kAllLanes;
    };
    for (const auto& [number, value] : kernel_.constants) set(number, value, 0);
    set(kernel_.special.thread, first, 1);
    set(kernel_.special.threads, threads_, 0);
    set(kernel_.special.block, block_, 0);
    set(kernel_.special.blocks, blocks_, 0);
    set(kernel_.special.lane, 0, 1);
}

// Returns whether the block goes on.
bool Machine::run_a_warp() {
    std::vector<Warp*> ready;
    bool any_alive = false;
    for (Warp& warp : warps_) {
        any_alive |= warp.alive != 0;
        if (warp.alive != 0 && !warp.at_barrier) ready.push_back(&warp);
    }
    if (!any_alive) return false;
    if (ready.empty()) {
        open_barrier();
    } else if (options_.seed == 0) {
        run_slice(*ready.front(), ~0u);
    } else if (options_.seed == 1) {
        run_slice(*ready.back(), ~0u);
    } else {
        Warp& chosen = *ready[random(static_cast<std::uint32_t>(ready.size()))];
        run_slice(chosen, 1 + random(kMostInstructions));
    }
    return true;
}

void Machine::run_slice(Warp& warp, std::uint32_t instructions) {
    while (instructions-- > 0 && step(warp)) {
    }
}

// Executes one instruction of a warp. Returns whether it can go on.
bool Machine::step(Warp& warp) {
    while (!warp.paths.empty() && (warp.paths.back().lanes == 0 || warp.paths.back().at == warp.paths.back().join))
        warp.paths.pop_back();
    if (warp.paths.empty()) {
        warp.alive = 0;
        return false;
    }
    Path& path = warp.paths.back();
    const auto at = static_cast<std::size_t>(path.at);
    const Instruction& i = kernel_.code[at];
    Lanes lanes = path.lanes;
    if (i.guard != kNone) {
        require_defined(warp, i, i.guard, lanes, "a condition");
        lanes &= i.guard_negated ? ~warp.holds(i.guard) : warp.holds(i.guard);
    }
    ++warp.executed;
    if (options_.counts) {
        kernel_.counts.lanes += static_cast<std::uint64_t>(__builtin_popcount(path.lanes));
        ++warp.executions[at];
    }
    if (i.op == Op::kBranch) {
        branch(warp, i, lanes);
        return true;
    }
    ++path.at;
    if (lanes == 0) return true;
    if (i.op == Op::kReturn) {
        warp.alive &= ~lanes;
        for (Path& other : warp.paths) other.lanes &= ~lanes;
    } else if (i.op == Op::kBarrier || i.op == Op::kBarrierReduce) {
        arrive(warp, i, lanes);
    } else {
        execute(warp, i, lanes);
    }
    return warp.alive != 0 && !warp.at_barrier;
}

void Machine::branch(Warp& warp, const Instruction& i, Lanes taken) {
    Path& path = warp.paths.back();
    const Lanes rest = path.lanes & ~taken;
    const int next = path.at + 1;
    ++kernel_.counts.branches;
    if (rest == 0 || taken == 0) {
        path.at = rest == 0 ? i.target : next;
        return;
    }
    ++kernel_.counts.divergent;
    // Both parts end where they join: the path that was waits there, unless it ends there, too.
    const int outer = path.join, join = i.join == kNone ? outer : i.join;
    if (i.join == kNone || i.join == outer) {
        warp.paths.pop_back();
    } else {
        path.at = i.join;
    }
    if (next != join) warp.paths.push_back({next, join, rest});
    if (i.target != join) warp.paths.push_back({i.target, join, taken});
}

void Machine::arrive(Warp& warp, const Instruction& i, Lanes lanes) {
    if (lanes != warp.alive) complain(i, "a barrier that only some lanes of the warp reach");
    warp.at_barrier = true;
    warp.barrier = static_cast<int>(&i - kernel_.code.data());
    warp.barrier_input = 0;
    if (i.op == Op::kBarrierReduce) {
        require_defined(warp, i, i.a, lanes, "a barrier's input");
        warp.barrier_input = warp.holds(i.a) & lanes;
    }
    ++kernel_.counts.barriers;
}

void Machine::open_barrier() {
    int barrier = kNone;
    bool any = false, all = true;
    std::uint32_t count = 0;
    for (const Warp& warp : warps_) {
        if (warp.alive == 0) continue;
        if (barrier != kNone && barrier != warp.barrier)
            complain(kernel_.code[static_cast<std::size_t>(barrier)], "warps wait at different barriers");
        barrier = warp.barrier;
        any |= warp.barrier_input != 0;
        all &= warp.barrier_input == warp.alive;
        count += static_cast<std::uint32_t>(__builtin_popcount(warp.barrier_input));
    }
    const Instruction& i = kernel_.code[static_cast<std::size_t>(barrier)];
    const Bits result = i.variant == kReduceOr ? any : i.variant == kReduceAnd ? all : count;
    for (Warp& warp : warps_) {
        warp.at_barrier = false;
        if (warp.alive == 0 || i.op != Op::kBarrierReduce) continue;
        std::fill_n(warp.row(i.out), kWarp, result);
        warp.defined_in(i.out) = kAllLanes;
    }
    ++epoch_;
}

void Machine::require_defined(Warp& warp, const Instruction& i, int number, Lanes lanes, const char* what) {
    if ((warp.defined_in(number) & lanes) != lanes) complain(i, std::string(what) + " is undefined");
}

void Machine::complain(const Instruction& i, const std::string& what) const {
    const std::string file = std::filesystem::path(kernel_.file).filename().string();
    stop(what + "\n  block " + std::to_string(block_) + " of " + kernel_.name + "\n  " + file + ":" +
         std::to_string(i.line) + ": " + i.text);
}

}  // namespace ptx
