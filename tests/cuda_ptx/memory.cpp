// Loads, stores and atomics, lane by lane, and what is checked of each.
//
// The program is linked with AddressSanitizer's runtime, which knows of every byte of the heap whether it is allocated.
#include <sanitizer/asan_interface.h>

#include "arithmetic.h"
#include "machine.h"

namespace ptx {
namespace {

constexpr Bits kFirstPage = 4096, kEndOfUserSpace = Bits{1} << 47;
constexpr int kLargestAccess = 16;

Bits extended(Bits bits, Type type) {
    if (type == Type::kS8) return bits_of(std::int64_t{value_of<std::int8_t>(bits)});
    if (type == Type::kS16) return bits_of(std::int64_t{value_of<std::int16_t>(bits)});
    if (type == Type::kS32) return bits_of(std::int64_t{value_of<std::int32_t>(bits)});
    return bits;
}

template <class T>
T combined(AtomicOp op, T old, T value, T swapped) {
    switch (op) {
        case kAtomicAdd:
            return static_cast<T>(old + value);
        case kAtomicMax:
            return old < value ? value : old;
        case kAtomicMin:
            return value < old ? value : old;
        case kAtomicExchange:
            return value;
        case kAtomicCas:
            return old == value ? swapped : old;
        default:
            break;
    }
    if constexpr (std::is_integral_v<T>) return static_cast<T>(op == kAtomicOr ? old | value : old & value);
    stop("an atomic on the bits of a floating-point number");
}

void set_bit(Lanes& lanes, int lane, bool value) {
    const Lanes bit = Lanes{1} << lane;
    lanes = value ? lanes | bit : lanes & ~bit;
}

}  // namespace

void Machine::access(Warp& warp, const Instruction& i, Lanes lanes) {
    require_defined(warp, i, i.a, lanes, "an address");
    Bits addresses[kWarp] = {};
    Lanes of_space[5] = {};
    for (int lane = 0; lane < kWarp; ++lane) {
        if ((lanes >> lane & 1) == 0) continue;
        // Addresses of shared memory alone have 32 bits.
        const Bits base = warp.row(i.a)[lane];
        addresses[lane] = (i.space == Space::kShared ? base & low_bits(32) : base) + static_cast<Bits>(i.offset);
        const Place at = place(warp, i, lane, addresses[lane], bytes_of(i.type) * i.width);
        of_space[static_cast<int>(at.space)] |= Lanes{1} << lane;
        if (i.op == Op::kLoad) {
            load(warp, i, lane, at);
        } else if (i.op == Op::kStore) {
            store(warp, i, lane, at, addresses[lane]);
        } else {
            atomic(warp, i, lane, at, addresses[lane]);
        }
        if (races_ && i.op == Op::kLoad)
            note_race(warp, i, lane, addresses[lane], at, bytes_of(i.type) * i.width, Use::kRead);
    }
    if (options_.counts)
        count(i, addresses, of_space[static_cast<int>(Space::kGlobal)], of_space[static_cast<int>(Space::kShared)],
              of_space[static_cast<int>(Space::kLocal)]);
}

// Where an access goes, which it must be allowed to. Of shared and local memory `address` becomes the offset.
Machine::Place Machine::place(Warp& warp, const Instruction& i, int lane, Bits& address, int bytes) {
    const auto size = static_cast<std::size_t>(bytes);
    Space space = i.space;
    if (space == Space::kGeneric)
        space = (address & kSharedTag) != 0  ? Space::kShared
                : (address & kLocalTag) != 0 ? Space::kLocal
                                             : Space::kGlobal;
    if (space == Space::kShared) address &= ~kSharedTag;
    if (space == Space::kLocal) address &= ~kLocalTag;
    if (address % size != 0) complain(i, "a misaligned access of " + std::to_string(bytes) + " bytes");
    const auto require_inside = [&](std::size_t all, const char* what) {
        if (address >= all || all - address < size)
            complain(i, std::string("an access outside ") + what + ": " + std::to_string(bytes) + " bytes at " +
                            std::to_string(address) + " of " + std::to_string(all));
    };
    if (space == Space::kShared) {
        require_inside(shared_.size(), "shared memory");
        return {&shared_[address], &shared_defined_[address], space};
    }
    if (space == Space::kLocal) {
        require_inside(kernel_.local_bytes, "local memory");
        const std::size_t at = static_cast<std::size_t>(lane) * kernel_.local_bytes + address;
        return {&warp.local[at], &warp.local_defined[at], space};
    }
    if (space == Space::kParameter) {
        require_inside(parameters_.size(), "the parameters");
        return {const_cast<std::uint8_t*>(&parameters_[address]), nullptr, space};  // which nothing writes
    }
    auto* const host = reinterpret_cast<std::uint8_t*>(address);
    if (address < kFirstPage || address >= kEndOfUserSpace || __asan_address_is_poisoned(host) != 0 ||
        __asan_address_is_poisoned(host + bytes - 1) != 0)
        complain(i, "an access outside the host's allocations");
    return {host, nullptr, space};
}

void Machine::load(Warp& warp, const Instruction& i, int lane, const Place& at) {
    const auto bytes = static_cast<std::size_t>(bytes_of(i.type));
    for (int n = 0; n < i.width; ++n) {
        if (i.parts[n] == kNone) continue;
        const std::size_t offset = static_cast<std::size_t>(n) * bytes;
        Bits bits = 0;
        std::memcpy(&bits, at.bytes + offset, bytes);
        warp.row(i.parts[n])[lane] = extended(bits, i.type);
        bool defined = true;
        for (std::size_t b = 0; at.defined != nullptr && b < bytes; ++b) defined &= at.defined[offset + b] != 0;
        set_bit(warp.defined_in(i.parts[n]), lane, defined);
    }
}

void Machine::store(Warp& warp, const Instruction& i, int lane, const Place& at, Bits address) {
    const auto bytes = static_cast<std::size_t>(bytes_of(i.type));
    std::uint8_t stored[kLargestAccess];
    for (int n = 0; n < i.width; ++n) {
        const std::size_t offset = static_cast<std::size_t>(n) * bytes;
        std::memcpy(stored + offset, &warp.row(i.parts[n])[lane], bytes);
        const bool defined = (warp.defined_in(i.parts[n]) >> lane & 1) != 0;
        if (at.defined != nullptr) {
            std::memset(at.defined + offset, defined ? 1 : 0, bytes);
        } else if (!defined) {
            complain(i, "a value that is stored to global memory is undefined");
        }
    }
    const std::size_t all = bytes * static_cast<std::size_t>(i.width);
    if (races_) {
        const bool same = std::memcmp(at.bytes, stored, all) == 0;
        note_race(warp, i, lane, address, at, static_cast<int>(all), same ? Use::kRewrite : Use::kWrite);
    }
    std::memcpy(at.bytes, stored, all);
}

void Machine::atomic(Warp& warp, const Instruction& i, int lane, const Place& at, Bits address) {
    const auto bytes = static_cast<std::size_t>(bytes_of(i.type));
    for (int input : {i.b, i.c})
        if (input != kNone) require_defined(warp, i, input, Lanes{1} << lane, "an atomic's operand");
    for (std::size_t b = 0; at.defined != nullptr && b < bytes; ++b)
        if (at.defined[b] == 0) complain(i, "an atomic on memory that has not been written");
    if (races_) {
        note_race(warp, i, lane, address, at, static_cast<int>(bytes), Use::kAtomic);
        if (at.space == Space::kGlobal) races_->global_atomic(block_);
    }
    Bits old = 0;
    std::memcpy(&old, at.bytes, bytes);
    with_type(i.type, [&](auto type) {
        using T = decltype(type);
        const T value = value_of<T>(warp.row(i.b)[lane]),
                swapped = i.c == kNone ? T{} : value_of<T>(warp.row(i.c)[lane]);
        const T changed = combined(static_cast<AtomicOp>(i.variant), value_of<T>(old), value, swapped);
        std::memcpy(at.bytes, &changed, sizeof changed);
    });
    if (i.out == kNone) return;
    warp.row(i.out)[lane] = old;
    set_bit(warp.defined_in(i.out), lane, true);
}

void Machine::note_race(Warp& warp, const Instruction& i, int lane, Bits address, const Place& at, int bytes, Use use) {
    if (at.space != Space::kShared && at.space != Space::kGlobal) return;
    Access now;
    now.thread = warp.number * kWarp + lane;
    now.block = block_;
    now.block_epoch = epoch_;
    now.warp_epoch = warp.epoch;
    const std::string found = at.space == Space::kShared ? races_->shared(address, bytes, now, use)
                                                         : races_->global(address, bytes, now, use);
    if (!found.empty()) complain(i, found);
}

void Machine::count(const Instruction& i, const Bits* addresses, Lanes global, Lanes shared, Lanes local) {
    Counts& counts = kernel_.counts;
    const int bytes = bytes_of(i.type) * i.width;
    const bool loads = i.op == Op::kLoad;
    if (local != 0) ++counts.local_accesses;
    if (i.op == Op::kAtomic) {
        if (global != 0) ++counts.global_atomics;
        if (shared != 0) counts.shared_atomic(addresses, shared);
        return;
    }
    if (global != 0) counts.global(loads ? counts.loads : counts.stores, addresses, global, bytes);
    if (shared != 0) counts.shared(loads ? counts.shared_loads : counts.shared_stores, addresses, shared, bytes);
}

}  // namespace ptx
