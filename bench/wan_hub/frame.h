// Packets as TUN devices give them.
#pragma once
#include <arpa/inet.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace wan_hub {

// What TUN puts before each packet with IFF_VNET_HDR (virtio 1.2, 5.1.6.1); C++ cannot read linux/virtio_net.h.
struct VirtioHeader {
    std::uint8_t flags, gso_type;
    std::uint16_t headers, gso_size, checksum_start, checksum_offset;
};
constexpr std::size_t VIRTIO = sizeof(VirtioHeader);
static_assert(VIRTIO == 10);
constexpr int GSO_NONE = 0, GSO_TCPV4 = 1, GSO_ECN = 0x80;

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

}  // namespace wan_hub
