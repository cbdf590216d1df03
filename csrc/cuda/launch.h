// How a kernel is launched and gets its shared memory: with ballot_bits of warp.cuh the only lines that differ between
// nvcc and the emulation in tests/cuda_emulation, which compiles the files of this folder as they are.
//
// Kernels say __launch_bounds__(threads, 1): without the 1 ptxas saves registers by spilling some.
//
// QCOMM_PLANT_... are errors that tests/codec/test_cuda_emulation.py plants, to show that they would be noticed.
//
// A kernel's shared memory is one struct: DYNAMIC_SHARED(Struct, name), with its size in the launch.
#pragma once

#include <cstddef>

#ifdef QCOMM_CUDA_EMULATION
#include "cuda_emulation.h"
#else
#ifndef __CUDACC_RTC__
#include <cuda_runtime.h>
#endif

#define DYNAMIC_SHARED(T, name)                                       \
    extern __shared__ __align__(16) unsigned char qcomm_shared_raw[]; \
    T* const name = reinterpret_cast<T*>(qcomm_shared_raw)

#ifndef __CUDACC_RTC__
template <class... P, class... A>
void launch_kernel(void (*kernel)(P...), unsigned blocks, unsigned threads, std::size_t shared_bytes, void* stream,
                   A... args) {
    if (blocks > 0) kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
}
#endif
#endif

// A pointer that was read from memory, known to be one to global memory, or to shared memory: its accesses then need no
// check which memory it is in.
#ifdef __CUDA_ARCH__
#define QCOMM_ASSUME_GLOBAL(pointer) __builtin_assume(__isGlobal(pointer))
#define QCOMM_ASSUME_SHARED(pointer) __builtin_assume(__isShared(pointer))
#else
#define QCOMM_ASSUME_GLOBAL(pointer) static_cast<void>(pointer)
#define QCOMM_ASSUME_SHARED(pointer) static_cast<void>(pointer)
#endif

// A number or pointer that the compiler shall keep in a register. It would otherwise compute it again at each use, from
// its own parts, which took a quarter of encode's inner loop.
#ifdef __CUDA_ARCH__
#define QCOMM_KEEP(number) asm("" : "+r"(number))
#define QCOMM_KEEP_POINTER(pointer) asm("" : "+l"(pointer))
#else
#define QCOMM_KEEP(number) static_cast<void>(number)
#define QCOMM_KEEP_POINTER(pointer) static_cast<void>(pointer)
#endif

#ifndef __CUDACC_RTC__
#include "qcomm/status.h"

namespace qcomm::cuda {

// Of the launches since the last call. It reads a flag and waits for nothing.
inline Status launch_status() {
#ifndef QCOMM_CUDA_EMULATION
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return {StatusCode::kDeviceError, cudaGetErrorString(error), error};
#endif
    return {};
}

}  // namespace qcomm::cuda
#endif
