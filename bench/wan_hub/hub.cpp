// The hub of netlab's links with delay and loss: joins hosts' TUN devices by a model of their links. Linux, root.
//
//     wan_hub run seed=1 host=NAMESPACE up=1e8 down=1e8 delay=0.025 host=NAMESPACE ...
//     wan_hub replay seed=1 host=a up=1e8 host=b down=2e7 < trace
//
// `run` makes a TUN device eth0 in each namespace, says "ready", and carries packets until its input ends. Each line of
// its input, whatever it says, is answered with what has happened so far, in a line of JSON.
// `replay` needs no rights. It reads packets, "NANOSECONDS FROM TO BYTES" a line, in the order of time; hosts count
// from 0. For each it prints the nanosecond when its last bit arrives, or "lost" or "full", by the arithmetic of `run`.
//
// Of all: seed; overhead, bytes that a link carries for each packet beside it (14, an Ethernet header, as tc counts);
// reorder=1 lets jitter reorder packets; mtu, bytes; segments, TCP segments that may be read as one. Of each host:
// up and down, bits a second, 0 for no limit; delay, seconds, which is added to each packet to or from it; jitter,
// seconds, at most this is added to each packet from it; loss_up, loss_down, 0 to 1, of packets from and to it; queue,
// seconds; queue_packets, in the place of queue where it is not 0.
//
// A packet's way:
//
//     up queue of FROM -- rate up --> loss -- delay of FROM + delay of TO + jitter --> down queue of TO -- rate down
//     -->
//
// The queues drop what finds them full. A packet is passed on when its last bit is there, as a switch does it. All
// times follow from the time when a packet was read, by integers, so a hub that is woken late makes no link slower; it
// delivers late. `late` in the figures says how late.
//
// One thread, no allocation after the start. While there is something to do it works in turns of 50 microseconds, of
// more with long delays, as a network card moderates its interrupts; otherwise it waits for a packet or for the next
// time.
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "frame.h"
#include "network.h"
#include "plan.h"
#include "replay.h"

namespace wan_hub {
namespace {

constexpr Time SHORTEST_TURN = 50'000 * NANOSECOND, LONGEST_TURN = 250'000 * NANOSECOND;
constexpr int TURNS_A_DELAY = 20;
constexpr int READS = 256;          // of a device in one turn, so that none is starved
constexpr double UNLIMITED = 1e10;  // bits a second for which memory is taken where there is no limit

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

timespec monotonic() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now;
}

const time_t START = monotonic().tv_sec;  // picoseconds since boot would be too many after 106 days

Time clock_now() {
    const timespec now = monotonic();
    return (now.tv_sec - START) * SECOND + now.tv_nsec * NANOSECOND;
}

timespec as_timespec(Time time) { return {time / SECOND, (time % SECOND) / NANOSECOND}; }

// The TUN device eth0 of a namespace, non-blocking. The thread is in the namespace afterwards.
int open_tun(const std::string& name) {
    const int place = open(("/var/run/netns/" + name).c_str(), O_RDONLY | O_CLOEXEC);
    if (place < 0 || setns(place, CLONE_NEWNET) != 0) fail("namespace " + name);
    close(place);
    const int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (device < 0) fail("/dev/net/tun");
    ifreq request{};
    std::strcpy(request.ifr_name, "eth0");
    request.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
    if (ioctl(device, TUNSETIFF, &request) != 0) fail("making eth0 in " + name);
    return device;
}

// The slots that all links together can fill with packets of half the largest size; beyond, packets are dropped.
std::uint32_t slots_for(const Plan& plan) {
    double slots = 4096, farthest = 0;
    for (const Host& host : plan.hosts)
        farthest = std::max(farthest, host.delay + (host.queue_packets ? 0 : host.queue));
    for (const Host& host : plan.hosts) {
        const double seconds = host.delay + host.jitter + farthest + (host.queue_packets ? 0 : host.queue);
        slots += seconds * (host.up > 0 ? host.up : UNLIMITED) / 8 / (plan.mtu / 2) + 2 * host.queue_packets;
    }
    if (slots * plan.mtu * plan.segments > 64e9) throw std::runtime_error("delays times rates need too much memory");
    return static_cast<std::uint32_t>(slots);
}

class Hub {
public:
    explicit Hub(const Plan& plan)
        : plan_(plan),
          slots_(slots_for(plan)),
          stride_((VIRTIO + static_cast<std::size_t>(plan.mtu * plan.segments) + 63) / 64 * 64),
          network_(plan, slots_),
          turn_(std::clamp(network_.shortest_delay() / TURNS_A_DELAY, SHORTEST_TURN, LONGEST_TURN)),
          sizes_(slots_),
          incoming_(VIRTIO + 65536) {
        // Pages are taken when they are first written, and free slots are used again before new ones.
        void* const memory =
            mmap(nullptr, slots_ * stride_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) fail("memory for packets");
        memory_ = static_cast<std::uint8_t*>(memory);
        const unsigned offloads = TUN_F_CSUM | (plan.segments > 1 ? TUN_F_TSO4 : 0);
        for (const Host& host : plan.hosts) {
            const int device = open_tun(host.name);
            if (ioctl(device, TUNSETOFFLOAD, offloads) != 0) fail("offloads of eth0");
            polled_.push_back({device, POLLIN, 0});
        }
        polled_.push_back({STDIN_FILENO, POLLIN, 0});
    }

    void run() {
        while (true) {
            const Time begin = clock_now();
            bool busy = false;
            for (std::size_t host = 0; host < plan_.hosts.size(); ++host) busy |= read_from(static_cast<int>(host));
            const Time now = clock_now();
            network_.advance(now, [&](std::uint32_t slot) { network_.give_back(slot); });
            // What is due before the next turn is passed on in this one, half a turn early in the mean, as packets wait
            // half a turn to be read.
            for (std::size_t host = 0; host < plan_.hosts.size(); ++host) {
                busy |= write_to(static_cast<int>(host), now + turn_);
            }
            if (!wait(begin, busy)) return;
        }
    }

private:
    // Waits for the next turn; false when the input has ended.
    bool wait(Time begin, bool busy) {
        const Time now = clock_now();
        timespec pause = as_timespec(std::clamp<Time>(busy ? 0 : network_.next() - now, 0, SECOND));
        if (busy && now < begin + turn_) {
            timespec until = as_timespec(begin + turn_);
            until.tv_sec += START;
            clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr);
            if (++turns_ % 64 != 0) return true;  // the input is not urgent
            pause = {0, 0};
        }
        if (ppoll(polled_.data(), polled_.size(), &pause, nullptr) < 0 && errno != EINTR) fail("ppoll");
        if (polled_.back().revents == 0) return true;
        char asked[4096];
        const ssize_t size = read(STDIN_FILENO, asked, sizeof asked);
        for (ssize_t index = 0; index < size; ++index) {
            if (asked[index] == '\n') report();
        }
        return size > 0;
    }

    bool read_from(int from) {
        int count = 0;
        for (; count < READS; ++count) {
            const ssize_t size = read(polled_[static_cast<std::size_t>(from)].fd, incoming_.data(), incoming_.size());
            if (size < 0) break;  // EAGAIN: it is empty
            take_in(from, Frame(incoming_.data(), static_cast<std::size_t>(size)));
        }
        return count > 0;
    }

    void take_in(int from, const Frame& frame) {
        const bool is_multicast = frame.is_ipv4() && frame.destination() >> 28 == 0xe;
        const int to = frame.is_ipv4() && !is_multicast ? static_cast<int>(frame.destination() & 0xff) - 1 : -1;
        if (to < 0 || to >= static_cast<int>(plan_.hosts.size()) || to == from) {
            ++strays_;  // IPv6 looks for routers, and IGMP tells groups
            return;
        }
        const int segments = frame.segments();
        const Time left = network_.leave(from, clock_now(), frame.carried(0, segments, plan_.overhead), segments);
        if (left == NEVER) return;
        for (int first = 0, end = 0; first < segments; first = end + 1) {
            for (end = first; end < segments && !network_.loses(from, to);) ++end;
            if (end > first) launch(from, to, frame, first, end - first, left);
        }
    }

    void launch(int from, int to, const Frame& frame, int first, int count, Time left) {
        const std::uint32_t slot = network_.take();
        const std::size_t size = frame.size_of(first, count);
        if (slot == NO_SLOT || size > stride_) {
            no_room_ += count;
            if (slot != NO_SLOT) network_.give_back(slot);
            return;
        }
        frame.extract(first, count, content(slot));
        sizes_[slot] = static_cast<std::uint32_t>(size);
        network_.travel(slot, from, to, left, frame.carried(first, count, plan_.overhead));
    }

    bool write_to(int to, Time now) {
        bool any = false;
        Time due = 0;
        for (std::uint32_t slot; (slot = network_.receive(to, now, due)) != NO_SLOT; network_.give_back(slot)) {
            any = true;
            const Time late = std::max<Time>(0, clock_now() - due);
            late_sum_ += static_cast<double>(late);
            late_most_ = std::max(late_most_, late);
            ++delivered_;
            if (write(polled_[static_cast<std::size_t>(to)].fd, content(slot), sizes_[slot]) < 0) ++refused_;
        }
        return any;
    }

    std::uint8_t* content(std::uint32_t slot) { return memory_ + slot * stride_; }

    void report() {
        rusage usage;
        getrusage(RUSAGE_SELF, &usage);
        const auto seconds = [](const timeval& time) {
            return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
        };
        std::printf("{\"cpu_seconds\": %.6f, \"late_mean\": %.9f, \"late_most\": %.9f, \"strays\": %" PRId64
                    ", \"no_room\": %" PRId64 ", \"refused\": %" PRId64 ", \"hosts\": [",
                    seconds(usage.ru_utime) + seconds(usage.ru_stime),
                    delivered_ ? late_sum_ / static_cast<double>(delivered_) / static_cast<double>(SECOND) : 0,
                    static_cast<double>(late_most_) / static_cast<double>(SECOND), strays_, no_room_, refused_);
        for (std::size_t host = 0; host < plan_.hosts.size(); ++host) {
            const Counts& mine = network_.counts[host];
            std::printf("%s{\"sent\": %" PRId64 ", \"sent_bytes\": %" PRId64 ", \"lost\": %" PRId64
                        ", \"full_up\": %" PRId64 ", \"full_down\": %" PRId64 ", \"received\": %" PRId64
                        ", \"received_bytes\": %" PRId64 "}",
                        host ? ", " : "", mine.sent, mine.sent_bytes, mine.lost, mine.full_up, mine.full_down,
                        mine.received, mine.received_bytes);
        }
        std::puts("]}");
        std::fflush(stdout);
        late_most_ = 0;
    }

    const Plan& plan_;
    std::uint32_t slots_;
    std::size_t stride_;
    Network network_;
    Time turn_;
    std::vector<std::uint32_t> sizes_;
    std::vector<std::uint8_t> incoming_;
    std::uint8_t* memory_ = nullptr;
    std::vector<pollfd> polled_;
    std::int64_t strays_ = 0, no_room_ = 0, refused_ = 0, delivered_ = 0;
    std::uint64_t turns_ = 0;
    double late_sum_ = 0;
    Time late_most_ = 0;
};

int run(const Plan& plan) {
    Hub hub(plan);
    // A link must not become slower because ranks compute. Without these two it only delivers later.
    prctl(PR_SET_TIMERSLACK, 1);
    const sched_param first{sched_get_priority_min(SCHED_FIFO)};
    sched_setscheduler(0, SCHED_FIFO, &first);
    std::puts("ready");
    std::fflush(stdout);
    hub.run();
    return 0;
}

}  // namespace
}  // namespace wan_hub

int main(int count, char** texts) {
    const std::string mode = count > 1 ? texts[1] : "";
    try {
        if (mode != "run" && mode != "replay") throw std::runtime_error("the first argument must be run or replay");
        const wan_hub::Plan plan = wan_hub::parse(count - 2, texts + 2);
        return mode == "run" ? wan_hub::run(plan) : wan_hub::replay(plan);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "wan_hub: %s\n", error.what());
        return 1;
    }
}
