// The model: links with queues, rates and losses, and the packets on them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "plan.h"

namespace wan_hub {

using Time = std::int64_t;  // picoseconds: of 1500 bytes at 10 Gb/s, or at 3 Mb/s, nothing is lost to rounding
constexpr Time NEVER = std::numeric_limits<Time>::max();
constexpr Time NANOSECOND = 1000, SECOND = 1'000'000'000'000;
constexpr std::uint32_t NO_SLOT = ~0u;  // end of a list

inline Time picoseconds(double seconds) { return std::llround(seconds * static_cast<double>(SECOND)); }

// SplitMix64 (Steele, Lea and Flood, 2014): any seed is good, and streams of different seeds have nothing in common.
class Random {
public:
    explicit Random(std::uint64_t seed) : state_(seed) {}

    std::uint64_t next() {
        std::uint64_t mixed = state_ += 0x9E3779B97F4A7C15u;
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9u;
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBu;
        return mixed ^ (mixed >> 31);
    }

    // In [0, 1).
    double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

private:
    std::uint64_t state_;
};

// One direction of a host's link: a queue that drops what finds it full, a rate, and losses.
class Line {
public:
    Line(double bits_per_second, const Host& host, double loss, std::uint64_t seed)
        : per_byte_(bits_per_second > 0 ? 8 * static_cast<double>(SECOND) / bits_per_second : 0),
          queue_(picoseconds(host.queue)),
          departures_(static_cast<std::size_t>(host.queue_packets)),
          loss_(loss),
          random_(seed) {}

    // When the last bit of a packet has left that comes at `now`, which never decreases; NEVER if the queue is full.
    Time pass(Time now, double bytes) {
        if (is_full(now)) return NEVER;
        free_at_ = std::max(now, free_at_) + std::llround(bytes * per_byte_);
        if (!departures_.empty()) departures_[(first_ + waiting_++) % departures_.size()] = free_at_;
        return free_at_;
    }

    bool loses() { return loss_ > 0 && random_.uniform() < loss_; }

private:
    bool is_full(Time now) {
        if (departures_.empty()) return free_at_ - now > queue_;
        while (waiting_ > 0 && departures_[first_] <= now) {
            first_ = (first_ + 1) % departures_.size();
            --waiting_;
        }
        return waiting_ == departures_.size();
    }

    double per_byte_;
    Time queue_, free_at_ = 0;
    std::vector<Time> departures_;  // of the packets in the queue, from first_ on, if it is limited in packets
    std::size_t first_ = 0, waiting_ = 0;
    double loss_;
    Random random_;
};

// What became of the packets of one host.
struct Counts {
    std::int64_t sent = 0, sent_bytes = 0, lost = 0, full_up = 0, full_down = 0, received = 0, received_bytes = 0;
};

// All links and the packets on them. A packet is known by its slot, the place of its content.
class Network {
public:
    struct Packet {
        Time due = 0;
        int to = 0;
        double bytes = 0;  // that a link carries
        std::uint32_t next = NO_SLOT;
    };

    Network(const Plan& plan, std::uint32_t slots) : plan_(plan), packets_(slots), counts(plan.hosts.size()) {
        std::uint64_t seed = static_cast<std::uint64_t>(plan.seed) << 32;
        for (const Host& host : plan.hosts) {
            up_.emplace_back(host.up, host, host.loss_up, ++seed);
            down_.emplace_back(host.down, host, host.loss_down, ++seed);
            jitter_.emplace_back(++seed);
        }
        lists_.resize(plan.hosts.size());
        last_.resize(plan.hosts.size() * plan.hosts.size());
        std::vector<double> delays;
        for (const Host& host : plan.hosts) delays.push_back(host.delay);
        std::sort(delays.begin(), delays.end());
        shortest_ = picoseconds(delays.size() > 1 ? delays[0] + delays[1] : 0);
        ways_.reserve(slots);
        free_.reserve(slots);
        for (std::uint32_t slot = slots; slot-- > 0;) free_.push_back(slot);
    }

    std::uint32_t take() {
        if (free_.empty()) return NO_SLOT;
        const std::uint32_t slot = free_.back();
        free_.pop_back();
        return slot;
    }

    void give_back(std::uint32_t slot) { free_.push_back(slot); }

    // When a packet that comes at `now` has left its host, or NEVER. Calls come in the order of time.
    Time leave(int from, Time now, double bytes, int segments) {
        Counts& mine = counts[static_cast<std::size_t>(from)];
        mine.sent += segments;
        mine.sent_bytes += static_cast<std::int64_t>(bytes);
        const Time left = up_[static_cast<std::size_t>(from)].pass(now, bytes);
        if (left == NEVER) mine.full_up += segments;
        return left;
    }

    bool loses(int from, int to) {
        const bool lost = up_[static_cast<std::size_t>(from)].loses() || down_[static_cast<std::size_t>(to)].loses();
        counts[static_cast<std::size_t>(from)].lost += lost;
        return lost;
    }

    // Sends on its way what left its host at `left`.
    void travel(std::uint32_t slot, int from, int to, Time left, double bytes) {
        const Host& source = plan_.hosts[static_cast<std::size_t>(from)];
        Time there = left + picoseconds(source.delay + plan_.hosts[static_cast<std::size_t>(to)].delay);
        if (source.jitter > 0) there += picoseconds(source.jitter * jitter_[static_cast<std::size_t>(from)].uniform());
        Time& last = last_[static_cast<std::size_t>(from) * plan_.hosts.size() + static_cast<std::size_t>(to)];
        if (plan_.reorder == 0) last = there = std::max(there, last);
        packets_[slot] = {there, to, bytes, NO_SLOT};
        ways_.push_back({there, order_++, slot});
        std::push_heap(ways_.begin(), ways_.end(), later);
    }

    Time shortest_delay() const { return shortest_; }

    // Puts what arrives at its host's link before all that has still to be sent, from `now` on, into the queue there.
    template <typename Dropped>
    void advance(Time now, Dropped dropped) {
        while (!ways_.empty() && ways_.front().there <= now + shortest_) {
            const std::uint32_t slot = ways_.front().slot;
            std::pop_heap(ways_.begin(), ways_.end(), later);
            ways_.pop_back();
            Packet& packet = packets_[slot];
            const auto to = static_cast<std::size_t>(packet.to);
            packet.due = down_[to].pass(packet.due, packet.bytes);
            if (packet.due == NEVER) {
                ++counts[to].full_down;
                dropped(slot);
                continue;
            }
            List& list = lists_[to];
            (list.first == NO_SLOT ? list.first : packets_[list.last].next) = slot;
            list.last = slot;
        }
    }

    // The slot of the next packet that `to` has got by `now`, or NO_SLOT; its time goes into `due`.
    std::uint32_t receive(int to, Time now, Time& due) {
        List& list = lists_[static_cast<std::size_t>(to)];
        const std::uint32_t slot = list.first;
        if (slot == NO_SLOT || packets_[slot].due > now) return NO_SLOT;
        list.first = packets_[slot].next;
        due = packets_[slot].due;
        ++counts[static_cast<std::size_t>(to)].received;
        counts[static_cast<std::size_t>(to)].received_bytes += static_cast<std::int64_t>(packets_[slot].bytes);
        return slot;
    }

    // When something happens next if nothing is sent.
    Time next() const {
        Time found = ways_.empty() ? NEVER : ways_.front().there;
        for (const List& list : lists_) {
            if (list.first != NO_SLOT) found = std::min(found, packets_[list.first].due);
        }
        return found;
    }

private:
    struct Way {
        Time there;
        std::uint64_t order;
        std::uint32_t slot;
    };
    struct List {
        std::uint32_t first = NO_SLOT, last = NO_SLOT;
    };

    static bool later(const Way& a, const Way& b) { return a.there != b.there ? a.there > b.there : a.order > b.order; }

    const Plan& plan_;
    std::vector<Line> up_, down_;
    std::vector<Random> jitter_;
    std::vector<Packet> packets_;
    std::vector<Way> ways_;    // a heap of what is between the links, the next first
    std::vector<List> lists_;  // of each host, what is in its down queue: a line keeps the order
    std::vector<Time> last_;   // of each pair, when its last packet arrives
    std::vector<std::uint32_t> free_;
    std::uint64_t order_ = 0;
    Time shortest_ = 0;  // between two hosts

public:
    std::vector<Counts> counts;
};

}  // namespace wan_hub
