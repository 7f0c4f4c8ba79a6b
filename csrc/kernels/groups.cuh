// Blocks that work together: a cluster, whose blocks read each other's shared memory (sm_90 and
// newer; elsewhere a cluster is one block), and a grid whose blocks all run at once.
#pragma once

#include <cooperative_groups.h>

#include "device.cuh"

namespace crpt::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
struct Cluster {
  __device__ static unsigned rank() { return 0; }
  __device__ static unsigned size() { return 1; }
  __device__ static void sync() { __syncthreads(); }
  template <class T>
  __device__ static T* of_block(T* address, unsigned) {
    return address;
  }
};
#else
struct Cluster {
  __device__ static unsigned rank() { return cooperative_groups::this_cluster().block_rank(); }
  __device__ static unsigned size() { return cooperative_groups::this_cluster().num_blocks(); }
  __device__ static void sync() { cooperative_groups::this_cluster().sync(); }
  // The same place in the dynamic shared memory of the block of that rank.
  template <class T>
  __device__ static T* of_block(T* address, unsigned rank) {
    return cooperative_groups::this_cluster().map_shared_rank(address, rank);
  }
};
#endif

__device__ inline void sync_grid() { cooperative_groups::this_grid().sync(); }

// The block's dynamic shared memory, aligned for packs.
#ifdef __CUDACC__
__device__ inline std::byte* shared_memory() {
  extern __shared__ uint4 crpt_shared_memory[];
  return reinterpret_cast<std::byte*>(crpt_shared_memory);
}
#else
inline std::byte* shared_memory() { return emulation::shared_memory(); }
#endif

}  // namespace crpt::cuda
