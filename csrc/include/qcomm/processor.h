// Which version of the inner loops runs: one for each instruction set, chosen by the processor when a loop is first
// asked for. All write the same bytes.
#pragma once

#include <string>
#include <vector>

namespace qcomm {

// Returns the names of the versions that this processor can run, the best last: "scalar", "avx2", "avx512".
std::vector<std::string> kernel_versions();

// Returns the name of the version in use; the best one until a caller chooses another.
std::string kernel_version();

// Uses the named version from now on, in all threads; false when this processor, or this build, has no such version.
// It is for tests and benchmarks. An operation that runs meanwhile may use both versions, and still writes the same
// bytes.
bool use_kernel_version(const char* name);

}  // namespace qcomm
