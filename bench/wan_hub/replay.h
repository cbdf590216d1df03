// `wan_hub replay`: the model over a trace of packets.
#pragma once
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "network.h"

namespace wan_hub {

struct Traced {
    Time at;
    int from, to, bytes;
    std::string fate = "full";
};

inline std::vector<Traced> read_trace(int hosts) {
    std::vector<Traced> trace;
    std::int64_t at = 0;
    int from = 0, to = 0, bytes = 0, read = 0;
    while ((read = std::scanf("%" SCNd64 " %d %d %d", &at, &from, &to, &bytes)) == 4) {
        const bool in_order = at >= 0 && (trace.empty() || at * NANOSECOND >= trace.back().at);
        if (!in_order || from < 0 || to < 0 || from >= hosts || to >= hosts || bytes <= 0) {
            throw std::runtime_error("packet " + std::to_string(trace.size()) +
                                     " is earlier than the one before, empty, or of no such hosts");
        }
        trace.push_back({at * NANOSECOND, from, to, bytes});
    }
    if (read != EOF) throw std::runtime_error("packet " + std::to_string(trace.size()) + " is not four numbers");
    return trace;
}

inline int replay(const Plan& plan) {
    const int hosts = static_cast<int>(plan.hosts.size());
    std::vector<Traced> trace = read_trace(hosts);
    Network network(plan, static_cast<std::uint32_t>(trace.size()));
    std::vector<std::size_t> numbers(trace.size());  // of the packets in slots
    const auto deliver = [&](Time now) {
        network.advance(now, [&](std::uint32_t slot) { network.give_back(slot); });
        for (int to = 0; to < hosts; ++to) {
            Time due = 0;
            for (std::uint32_t slot; (slot = network.receive(to, now, due)) != NO_SLOT; network.give_back(slot)) {
                trace[numbers[slot]].fate = std::to_string((due + NANOSECOND / 2) / NANOSECOND);
            }
        }
    };
    for (std::size_t number = 0; number < trace.size(); ++number) {
        const Traced& packet = trace[number];
        deliver(packet.at);
        const double carried = packet.bytes + plan.overhead;
        const Time left = network.leave(packet.from, packet.at, carried, 1);
        if (left == NEVER) continue;
        if (network.loses(packet.from, packet.to)) {
            trace[number].fate = "lost";
            continue;
        }
        const std::uint32_t slot = network.take();  // there are as many as packets
        numbers[slot] = number;
        network.travel(slot, packet.from, packet.to, left, carried);
    }
    for (Time next; (next = network.next()) != NEVER;) deliver(next);
    for (const Traced& packet : trace) std::puts(packet.fate.c_str());
    return 0;
}

}  // namespace wan_hub
