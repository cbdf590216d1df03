// What the command line asks for.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

namespace wan_hub {

constexpr double MOST_SECONDS = 60, MOST_BITS = 1e12;

struct Host {
    std::string name;
    double up = 0, down = 0, delay = 0, jitter = 0, loss_up = 0, loss_down = 0, queue = 0.05, queue_packets = 0;
};

struct Plan {
    double seed = 0, overhead = 14, reorder = 0, mtu = 1500, segments = 1;
    std::vector<Host> hosts;
};

struct Option {
    const char* key;
    double* target;
    double most;
};

inline double number(const std::string& key, const std::string& text, double most) {
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    if (end == text.c_str() || *end != 0 || !(value >= 0 && value <= most)) {
        char limit[32];
        std::snprintf(limit, sizeof limit, "%.10g", most);
        throw std::runtime_error(key + " must be a number from 0 to " + limit + ", got '" + text + "'");
    }
    return value;
}

inline Plan parse(int count, char** texts) {
    Plan plan;
    for (int index = 0; index < count; ++index) {
        const std::string text = texts[index], key = text.substr(0, text.find('='));
        const std::string value = key.size() < text.size() ? text.substr(key.size() + 1) : "";
        if (key == "host") {
            plan.hosts.emplace_back().name = value;
            continue;
        }
        std::vector<Option> known{{"seed", &plan.seed, 4294967295},
                                  {"overhead", &plan.overhead, 65535},
                                  {"reorder", &plan.reorder, 1},
                                  {"mtu", &plan.mtu, 65535},
                                  {"segments", &plan.segments, 65535}};
        if (!plan.hosts.empty()) {
            Host& host = plan.hosts.back();
            known = {{"up", &host.up, MOST_BITS},          {"down", &host.down, MOST_BITS},
                     {"delay", &host.delay, MOST_SECONDS}, {"jitter", &host.jitter, MOST_SECONDS},
                     {"loss_up", &host.loss_up, 1},        {"loss_down", &host.loss_down, 1},
                     {"queue", &host.queue, MOST_SECONDS}, {"queue_packets", &host.queue_packets, 1e6}};
        }
        const auto found =
            std::find_if(known.begin(), known.end(), [&](const Option& option) { return key == option.key; });
        if (found == known.end()) throw std::runtime_error("unknown option '" + text + "'");
        *found->target = number(key, value, found->most);
    }
    if (plan.hosts.empty()) throw std::runtime_error("no host=");
    if (plan.mtu < 68 || plan.segments < 1 || plan.mtu * plan.segments > 65535) {
        throw std::runtime_error("mtu must be 68 or more, segments 1 or more, and their product below 65536");
    }
    return plan;
}

}  // namespace wan_hub
