// What every operation returns. Status is a value: no exceptions cross the core, and bindings.cpp alone turns one into
// a Python error.
#pragma once

#include <cstdint>

namespace qcomm {

enum class StatusCode : std::uint8_t {
    kOk,
    kBadArgument,  // the caller broke a precondition: ValueError
    kBadPacket,    // bytes that are not a valid packet: PacketError
    kNoSpace,      // the destination is smaller than the operation's bound: ValueError
    kDeviceError,  // a CUDA kernel could not be launched
};

struct [[nodiscard]] Status {
    StatusCode code = StatusCode::kOk;
    const char* what = "";   // a static string: what is wrong and what would be right
    std::int64_t where = 0;  // segment or block number, byte offset: `what` says which

    bool ok() const { return code == StatusCode::kOk; }
};

inline Status bad_argument(const char* what, std::int64_t where = 0) { return {StatusCode::kBadArgument, what, where}; }
inline Status bad_packet(const char* what, std::int64_t where = 0) { return {StatusCode::kBadPacket, what, where}; }
inline Status no_space(const char* what, std::int64_t where = 0) { return {StatusCode::kNoSpace, what, where}; }

#define QCOMM_RETURN_IF_ERROR(expression)             \
    do {                                              \
        const ::qcomm::Status result_ = (expression); \
        if (!result_.ok()) return result_;            \
    } while (false)

}  // namespace qcomm
