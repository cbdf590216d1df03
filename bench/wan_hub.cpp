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
#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
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
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Time = std::int64_t;  // picoseconds: of 1500 bytes at 10 Gb/s, or at 3 Mb/s, nothing is lost to rounding
constexpr Time NEVER = std::numeric_limits<Time>::max();
constexpr Time NANOSECOND = 1000, SECOND = 1'000'000'000'000;
constexpr Time SHORTEST_TURN = 50'000 * NANOSECOND, LONGEST_TURN = 250'000 * NANOSECOND;
constexpr int TURNS_A_DELAY = 20;
constexpr int READS = 256;              // of a device in one turn, so that none is starved
constexpr std::uint32_t NO_SLOT = ~0u;  // end of a list
constexpr double MOST_SECONDS = 60, MOST_BITS = 1e12;
constexpr double UNLIMITED = 1e10;  // bits a second for which memory is taken where there is no limit

// What TUN puts before each packet with IFF_VNET_HDR (virtio 1.2, 5.1.6.1); C++ cannot read linux/virtio_net.h.
struct VirtioHeader {
    std::uint8_t flags, gso_type;
    std::uint16_t headers, gso_size, checksum_start, checksum_offset;
};
constexpr std::size_t VIRTIO = sizeof(VirtioHeader);
static_assert(VIRTIO == 10);
constexpr int GSO_NONE = 0, GSO_TCPV4 = 1, GSO_ECN = 0x80;

struct Host {
    std::string name;
    double up = 0, down = 0, delay = 0, jitter = 0, loss_up = 0, loss_down = 0, queue = 0.05, queue_packets = 0;
};

struct Plan {
    double seed = 0, overhead = 14, reorder = 0, mtu = 1500, segments = 1;
    std::vector<Host> hosts;
};

Time picoseconds(double seconds) { return std::llround(seconds * static_cast<double>(SECOND)); }

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

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

struct Option {
    const char* key;
    double* target;
    double most;
};

double number(const std::string& key, const std::string& text, double most) {
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    if (end == text.c_str() || *end != 0 || !(value >= 0 && value <= most)) {
        char limit[32];
        std::snprintf(limit, sizeof limit, "%.10g", most);
        throw std::runtime_error(key + " must be a number from 0 to " + limit + ", got '" + text + "'");
    }
    return value;
}

Plan parse(int count, char** texts) {
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

struct Traced {
    Time at;
    int from, to, bytes;
    std::string fate = "full";
};

std::vector<Traced> read_trace(int hosts) {
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

int replay(const Plan& plan) {
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

// A packet as TUN gives it, behind its virtio header; TCP over IPv4 if it has several segments.
class Frame {
public:
    Frame(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {
        std::memcpy(&virtio_, data, VIRTIO);
        if (is_ipv4() && (virtio_.gso_type & ~GSO_ECN) == GSO_TCPV4 && virtio_.gso_size > 0) {
            ip_size_ = 4u * (ip()[0] & 15u);
            headers_ = ip_size_ + 4u * (ip()[ip_size_ + 12] >> 4);
            payload_ = size - VIRTIO - headers_;
            segments_ = static_cast<int>((payload_ + virtio_.gso_size - 1) / virtio_.gso_size);
        }
    }

    bool is_ipv4() const { return size_ >= VIRTIO + sizeof(iphdr) && ip()[0] >> 4 == 4; }
    std::uint32_t destination() const {
        std::uint32_t address;
        std::memcpy(&address, ip() + 16, 4);
        return ntohl(address);
    }
    int segments() const { return segments_; }

    // What links carry of `count` segments from the `first` on.
    double carried(int first, int count, double overhead) const {
        if (segments_ == 1) return static_cast<double>(size_ - VIRTIO) + overhead;
        return static_cast<double>(length(first, count)) + count * (static_cast<double>(headers_) + overhead);
    }

    std::size_t size_of(int first, int count) const {
        return segments_ == 1 ? size_ : VIRTIO + headers_ + length(first, count);
    }

    // Writes these segments to `out`, which has room for size_of(), as a packet of their own.
    void extract(int first, int count, std::uint8_t* out) const {
        if (count == segments_) {
            std::memcpy(out, data_, size_);
            return;
        }
        const std::size_t begin = static_cast<std::size_t>(first) * virtio_.gso_size, bytes = length(first, count);
        VirtioHeader virtio = virtio_;
        virtio.headers = static_cast<std::uint16_t>(headers_);
        if (count == 1) virtio.gso_type = GSO_NONE, virtio.gso_size = 0;
        std::memcpy(out, &virtio, VIRTIO);
        std::uint8_t* const to = out + VIRTIO;
        std::memcpy(to, ip(), headers_);
        std::memcpy(to + headers_, ip() + headers_ + begin, bytes);
        iphdr ip_header;
        std::memcpy(&ip_header, to, sizeof ip_header);
        ip_header.tot_len = htons(static_cast<std::uint16_t>(headers_ + bytes));
        ip_header.id = htons(static_cast<std::uint16_t>(ntohs(ip_header.id) + first));
        ip_header.check = 0;
        std::memcpy(to, &ip_header, sizeof ip_header);
        ip_header.check = static_cast<std::uint16_t>(~sum(to, ip_size_, 0));
        std::memcpy(to, &ip_header, sizeof ip_header);
        tcphdr tcp;
        std::memcpy(&tcp, to + ip_size_, sizeof tcp);
        tcp.seq = htonl(ntohl(tcp.seq) + static_cast<std::uint32_t>(begin));
        if (first > 0) tcp.res2 &= 1;  // CWR is of the first segment, FIN and PSH are of the last (RFC 3168, 6.1.2)
        if (first + count < segments_) tcp.fin = tcp.psh = 0;
        // The receiver's kernel completes the sum, which begins with the pseudo header (RFC 9293, 3.1).
        const std::uint32_t tail = htons(IPPROTO_TCP) + htons(static_cast<std::uint16_t>(headers_ - ip_size_ + bytes));
        tcp.check = sum(to + 12, 8, tail);
        std::memcpy(to + ip_size_, &tcp, sizeof tcp);
    }

private:
    const std::uint8_t* ip() const { return data_ + VIRTIO; }

    std::size_t length(int first, int count) const {
        const std::size_t segment = virtio_.gso_size;
        return std::min(payload_, static_cast<std::size_t>(first + count) * segment) -
               static_cast<std::size_t>(first) * segment;
    }

    // The Internet checksum (RFC 1071), not inverted, of an even number of bytes.
    static std::uint16_t sum(const std::uint8_t* bytes, std::size_t size, std::uint32_t total) {
        for (std::size_t index = 0; index < size; index += 2) {
            std::uint16_t word;
            std::memcpy(&word, bytes + index, 2);
            total += word;
        }
        while (total >> 16) total = (total & 0xffff) + (total >> 16);
        return static_cast<std::uint16_t>(total);
    }

    const std::uint8_t* data_;
    std::size_t size_, ip_size_ = 0, headers_ = 0, payload_ = 0;
    VirtioHeader virtio_{};
    int segments_ = 1;
};

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

int main(int count, char** texts) {
    const std::string mode = count > 1 ? texts[1] : "";
    try {
        if (mode != "run" && mode != "replay") throw std::runtime_error("the first argument must be run or replay");
        const Plan plan = parse(count - 2, texts + 2);
        return mode == "run" ? run(plan) : replay(plan);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "wan_hub: %s\n", error.what());
        return 1;
    }
}
