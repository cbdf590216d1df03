#include "kernels.h"

#include <atomic>
#include <cstring>

namespace qcomm {
namespace {

struct Version {
    const Kernels* kernels;
    bool (*supported)();
};

const Version kVersions[] = {
    {&kScalarKernels, [] { return true; }},
#ifdef QCOMM_X86_KERNELS
    {&kAvx2Kernels, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"); }},
    {&kAvx512Kernels,
     [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
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

int supported_kernels(const char** names, int capacity) {
    int count = 0;
    for (const Version& version : kVersions) {
        if (version.supported() && count < capacity) names[count++] = version.kernels->name;
    }
    return count;
}

bool select_kernels(const char* name) {
    for (const Version& version : kVersions) {
        if (std::strcmp(version.kernels->name, name) != 0 || !version.supported()) continue;
        current().store(version.kernels, std::memory_order_relaxed);
        return true;
    }
    return false;
}

}  // namespace qcomm
