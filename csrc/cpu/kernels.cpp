#include "kernels.h"

#include <atomic>
#include <cstring>

#include "qcomm/processor.h"

namespace qcomm {
namespace {

struct Version {
    const Kernels* kernels;
    bool (*supported)();
};

const Version kVersions[] = {
    {&kScalarKernels, [] { return true; }},
#ifdef QCOMM_X86_KERNELS
    {&kAvx2Kernels,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"); }},
    {&kAvx512Kernels,
     [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                __builtin_cpu_supports("gfni");
     }},
#endif
};

const Kernels* best() {
    const Kernels* found = nullptr;
    for (const Version& version : kVersions) {
        if (version.supported()) found = version.kernels;
    }
    return found;
}

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
