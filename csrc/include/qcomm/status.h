// The result of every operation that can fail. Status is a value: no exceptions cross the core, and the bindings alone
// turn one into a Python error. So the core can be called from threads, from CUDA's host code and from C++ without
// exceptions, and an error names its place without memory being allocated.
#pragma once

#include <cstdint>
#include <limits>

namespace qcomm {

// Whose fault it is, which decides the type of the exception.
enum class StatusCode : std::uint8_t {
    kOk,
    kBadArgument,  // the caller broke a precondition: ValueError
    kBadPacket,    // bytes that are not a valid packet: PacketError
    kNoSpace,      // the destination is smaller than the operation's bound: ValueError
    // Only launch_status() of csrc/cuda/launch.h gives it. No argument is at fault: RuntimeError.
    kDeviceError,  // a CUDA kernel could not be launched
};

// `where` of a fault without a place. Segments and blocks count from 0, and a value that is refused may be negative.
constexpr std::int64_t kNowhere = std::numeric_limits<std::int64_t>::min();

// A caller that drops one is warned by the compiler.
struct [[nodiscard]] Status {
    StatusCode code = StatusCode::kOk;
    // A static string that names the fault and the remedy. The binding appends `where` to it, unless that is kNowhere.
    // Copies of a status keep the pointer, so the text must never be freed: a std::string's would be.
    const char* what = "";
    std::int64_t where = kNowhere;  // segment or block number, byte offset: `what` says which

    bool ok() const { return code == StatusCode::kOk; }
};

// Texts end so that `where` can follow them: "...; segment" or "..., found".
inline Status bad_argument(const char* what, std::int64_t where = kNowhere) {
    return {StatusCode::kBadArgument, what, where};
}
inline Status bad_packet(const char* what, std::int64_t where = kNowhere) {
    return {StatusCode::kBadPacket, what, where};
}
inline Status no_space(const char* what, std::int64_t where = kNowhere) { return {StatusCode::kNoSpace, what, where}; }

// Returns the status from the enclosing function, if it is an error.
// It is one statement, which may stand behind an if without braces. The expression is evaluated once, and must not name
// `result_`, which would be the new variable.
#define QCOMM_RETURN_IF_ERROR(expression)             \
    do {                                              \
        const ::qcomm::Status result_ = (expression); \
        if (!result_.ok()) return result_;            \
    } while (false)

}  // namespace qcomm
