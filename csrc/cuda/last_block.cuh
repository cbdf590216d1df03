// "Am I the last block?": how a launch ends with something that needs the results of all its blocks. A second launch
// would do the same, and costs some microseconds; the blocks of a launch cannot wait for each other, since not all need
// be running.
#pragma once

#include "launch.h"

namespace qcomm::cuda {

// Tells whether all other blocks of `total` that share the counter have come here before: then all that they have
// written is visible. The counter starts at 0. Contains barriers.
__device__ inline bool is_last_block(unsigned* counter, unsigned total) {
#ifndef QCOMM_PLANT_MISSING_FENCE
    __threadfence();
#endif
    __syncthreads();  // all threads of the block have written and fenced
    bool last = false;
    if (threadIdx.x == 0) {
        last = atomicAdd(counter, 1u) == total - 1u;
#ifndef QCOMM_PLANT_MISSING_FENCE
        __threadfence();
#endif
    }
    return __syncthreads_or(last) != 0;
}

}  // namespace qcomm::cuda
