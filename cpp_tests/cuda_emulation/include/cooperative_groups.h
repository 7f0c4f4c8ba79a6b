// The groups that csrc/kernels uses: a cluster, and a grid whose blocks all run at once.
#pragma once

#include <cuda_runtime.h>

namespace cooperative_groups {

using Site = crpt::emulation::Site;

struct cluster_group {
  static void sync(Site site = Site::current()) { crpt::emulation::sync_group(site); }
  static unsigned block_rank() { return blockIdx.x % num_blocks(); }
  static unsigned num_blocks() { return crpt::emulation::cluster_size(); }
  template <class T>
  static T* map_shared_rank(T* address, unsigned rank) {
    return static_cast<T*>(crpt::emulation::of_block(address, rank));
  }
};

struct grid_group {
  static void sync(Site site = Site::current()) { crpt::emulation::sync_group(site); }
};

inline cluster_group this_cluster() { return {}; }
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
