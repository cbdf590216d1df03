// The words of CUDA for the tests' host side, which launch.h asks the emulation for. Here nvcc compiles the kernels,
// and so the tests of tests/cuda_emulation are the host's part of a program only: they run as they are.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emulation {

inline std::uint64_t seed = 0;  // of the launches that follow: Options::seed of machine.h

}  // namespace emulation
