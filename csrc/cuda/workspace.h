// How a plan's workspace is divided. A plan names its arrays once, in place(): the bytes to reserve and the addresses
// that the kernels get both follow from that list, so they cannot disagree.
#pragma once

#include <cstdint>

namespace qcomm::cuda {

inline std::int64_t align16(std::int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Gives arrays their places, one behind the other from `base` on, each aligned to 16 bytes. Places are counted as
// numbers, so that a plan can ask for its size before there is any memory.
class Workspace {
public:
    explicit Workspace(void* base = nullptr) : base_(reinterpret_cast<std::uintptr_t>(base)) {}

    template <class T>
    void put(T*& array, std::int64_t count) {
        array = reinterpret_cast<T*>(base_ + static_cast<std::uintptr_t>(bytes_));
        bytes_ += align16(static_cast<std::int64_t>(sizeof(T)) * count);
    }
    std::int64_t bytes() const { return bytes_; }

private:
    std::uintptr_t base_;
    std::int64_t bytes_ = 0;
};

}  // namespace qcomm::cuda
