// Instructions for which the lanes of a warp wait for each other. All lanes that a mask names must come, unless they
// have ended, and no others.
#include "arithmetic.h"
#include "machine.h"

namespace ptx {
namespace {

constexpr std::uint32_t kLaneBits = 31;

int first_of(Lanes lanes) { return __builtin_ctz(lanes); }

// The lane that one asks in a shuffle, or the lane itself where it asks beyond its segment. b is the distance or lane,
// c has the segment's bounds.
int source(std::uint8_t mode, int lane, Bits b, Bits c) {
    const int distance = static_cast<int>(b & kLaneBits);
    const int clamp = static_cast<int>(c & kLaneBits), segment = static_cast<int>(c >> 8 & kLaneBits);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    const int asked = mode == kShuffleUp     ? lane - distance
                      : mode == kShuffleDown ? lane + distance
                      : mode == kShuffleXor  ? lane ^ distance
                                             : first | (distance & ~segment);
    const bool inside = mode == kShuffleUp ? asked >= last : asked <= last;
    return inside ? asked : -1;
}

}  // namespace

void Machine::together(Warp& warp, const Instruction& i, Lanes lanes) {
    if (i.op == Op::kFence) {
        if (races_) races_->fence(block_);
        return;
    }
    require_defined(warp, i, i.d, lanes, "the mask of lanes");
    const auto named = static_cast<Lanes>(warp.row(i.d)[first_of(lanes)]);
    if ((named & warp.alive) != lanes) complain(i, "a warp operation that only some of its lanes reach");
    if (i.op == Op::kWarpBarrier) {
        ++warp.epoch;
    } else if (i.op == Op::kShuffle) {
        shuffle(warp, i, lanes);
    } else if (i.op == Op::kVote) {
        vote(warp, i, lanes);
    } else {
        match(warp, i, lanes);
    }
}

void Machine::shuffle(Warp& warp, const Instruction& i, Lanes lanes) {
    ++kernel_.counts.shuffles;
    require_defined(warp, i, i.b, lanes, "the lane of a shuffle");
    const Warp::Row values = warp.registers[static_cast<std::size_t>(i.a)];
    const Lanes defined = warp.defined_in(i.a);
    const Warp::Row b = warp.registers[static_cast<std::size_t>(i.b)];
    const Warp::Row c = warp.registers[static_cast<std::size_t>(i.c)];
    for (int lane = 0; lane < kWarp; ++lane) {
        if ((lanes >> lane & 1) == 0) continue;
        const int asked = source(i.variant, lane, b.lane[lane], c.lane[lane]), from = asked < 0 ? lane : asked;
        if ((lanes >> from & 1) == 0) complain(i, "a shuffle from a lane that takes no part");
        const Lanes bit = Lanes{1} << lane;
        warp.row(i.out)[lane] = values.lane[from];
        Lanes& out = warp.defined_in(i.out);
        out = (defined >> from & 1) != 0 ? out | bit : out & ~bit;
        if (i.predicate_out == kNone) continue;
        warp.row(i.predicate_out)[lane] = asked >= 0;
        warp.defined_in(i.predicate_out) |= bit;
    }
}

void Machine::vote(Warp& warp, const Instruction& i, Lanes lanes) {
    ++kernel_.counts.votes;
    require_defined(warp, i, i.a, lanes, "a vote");
    const Lanes ones = warp.holds(i.a) & lanes;
    const Bits result = i.variant == kBallot ? ones : i.variant == kVoteAll ? ones == lanes : ones != 0;
    for (int lane = 0; lane < kWarp; ++lane)
        if ((lanes >> lane & 1) != 0) warp.row(i.out)[lane] = result;
    warp.defined_in(i.out) |= lanes;
}

void Machine::match(Warp& warp, const Instruction& i, Lanes lanes) {
    ++kernel_.counts.votes;
    require_defined(warp, i, i.a, lanes, "a value to match");
    const Warp::Row values = warp.registers[static_cast<std::size_t>(i.a)];
    const Bits compared = low_bits(static_cast<std::uint32_t>(8 * bytes_of(i.type)));
    for (int lane = 0; lane < kWarp; ++lane) {
        if ((lanes >> lane & 1) == 0) continue;
        Lanes alike = 0;
        for (int other = 0; other < kWarp; ++other)
            if (((values.lane[other] ^ values.lane[lane]) & compared) == 0) alike |= Lanes{1} << other;
        warp.row(i.out)[lane] = alike & lanes;
    }
    warp.defined_in(i.out) |= lanes;
}

}  // namespace ptx
