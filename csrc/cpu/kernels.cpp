// The choice of the inner loops' version: a pointer that is set when it is first asked for, and that tests change.
// Compiling for the oldest processor and choosing at run time lets one build run everywhere, at each machine's speed.
#include "kernels.h"

#include <atomic>
#include <cstring>

#include "qcomm/processor.h"
#ifdef QCOMM_X86_KERNELS
#include "x86_features.h"
#endif

namespace qcomm {
namespace {

struct Version {
    const Kernels* kernels;
    bool (*supported)();
};

// The best one last. A version asks for every feature that its file is compiled with (CMakeLists.txt), since the
// compiler may use any of them in any function of that file.
const Version kVersions[] = {
    {&kScalarKernels, [] { return true; }},
#ifdef QCOMM_X86_KERNELS
    {&kAvx2Kernels, [] { return x86_features().avx2; }},
    {&kAvx512Kernels, [] { return x86_features().avx512; }},
#endif
#ifdef QCOMM_NEON_KERNELS
    {&kNeonKernels, [] { return true; }},  // every 64-bit Arm processor has it
#endif
};

// The last version that the processor can run. The scalar one always can.
const Kernels* best() {
    const Kernels* found = nullptr;
    for (const Version& version : kVersions) {
        if (version.supported()) found = version.kernels;
    }
    return found;
}

// Relaxed loads and stores suffice: versions are constants, and all of them compute the same.
std::atomic<const Kernels*>& current() {
    static std::atomic<const Kernels*> kernels{best()};
    return kernels;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> kernel_versions() {
    std::vector<std::string> names;
    for (const Version& version : kVersions) {
        if (version.supported()) names.emplace_back(version.kernels->name);
    }
    return names;
}

std::string kernel_version() { return kernels().name; }

bool use_kernel_version(const char* name) {
    for (const Version& version : kVersions) {
        if (std::strcmp(version.kernels->name, name) != 0 || !version.supported()) continue;
        current().store(version.kernels, std::memory_order_relaxed);
        return true;
    }
    return false;
}

}  // namespace qcomm
