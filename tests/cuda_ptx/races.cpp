// Which accesses are ordered.
#include "races.h"

namespace ptx {

namespace {

constexpr std::int32_t kWarpThreads = 32;

}  // namespace

void Races::fence(std::uint32_t block) {
    Handed& handed = handed_[block];
    handed.fenced = true;
    if (handed.met) handed.taken = ++time_;
}

void Races::global_atomic(std::uint32_t block) {
    Handed& handed = handed_[block];
    handed.met = true;
    if (handed.fenced) handed.given = ++time_;
}

bool Races::ordered(const Access& before, const Access& now) const {
    if (before.thread < 0) return true;
    if (before.block != now.block) {
        const std::uint64_t given = handed_[before.block].given;
        return given > before.time && handed_[now.block].taken > given;
    }
    if (before.thread == now.thread || before.block_epoch != now.block_epoch) return true;
    return before.thread / kWarpThreads == now.thread / kWarpThreads && before.warp_epoch != now.warp_epoch;
}

std::string Races::touch(Byte& byte, const Access& now, Use use) const {
    const auto pair = [&](const char* what, const Access& before) {
        return std::string("race (") + what + "): thread " + std::to_string(before.thread) + " of block " +
               std::to_string(before.block) + ", then thread " + std::to_string(now.thread) + " of block " +
               std::to_string(now.block);
    };
    if (use == Use::kRewrite) {
        if (ordered(byte.write, now)) byte.write = now;
        return "";
    }
    const bool both_atomic = use == Use::kAtomic && byte.write.atomic;
    if (!both_atomic && !ordered(byte.write, now))
        return pair(use == Use::kRead ? "read after write" : "write after write", byte.write);
    if (use == Use::kRead) {
        if (byte.read.thread >= 0 && byte.read.thread / kWarpThreads != now.thread / kWarpThreads)
            byte.other_read = byte.read;
        byte.read = now;
        return "";
    }
    for (const Access& read : {byte.read, byte.other_read})
        if (!ordered(read, now)) return pair("write after read", read);
    byte = {};
    byte.write = now;
    byte.write.atomic = use == Use::kAtomic;
    return "";
}

std::string Races::shared(std::size_t offset, int bytes, Access now, Use use) {
    now.time = ++time_;
    for (std::size_t n = 0; n < static_cast<std::size_t>(bytes); ++n)
        if (std::string found = touch(shared_[offset + n], now, use); !found.empty()) return found;
    return "";
}

std::string Races::global(std::uint64_t address, int bytes, Access now, Use use) {
    now.time = ++time_;
    auto& page = pages_[address / kPageBytes];  // an aligned access lies in one
    for (std::size_t n = 0; n < static_cast<std::size_t>(bytes); ++n)
        if (std::string found = touch(page[address % kPageBytes + n], now, use); !found.empty()) return found;
    return "";
}

}  // namespace ptx
