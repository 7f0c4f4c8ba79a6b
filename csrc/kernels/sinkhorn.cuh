#pragma once

#include "launch.cuh"

namespace crpt::cuda {

// How launch_sinkhorn should run: `cluster` blocks hold an item on chip, or 0, where no cluster
// can, and then it needs `scratch` bytes.
struct SinkhornPlan {
  int64_t cluster;
  int64_t scratch;
};

// The best plan on the current device. It depends on nothing else, and may be kept.
cudaError_t plan_sinkhorn(Dtype dtype, int64_t items, int64_t batch, int64_t prototypes,
                          SinkhornPlan* plan);

// The bytes that launch_sinkhorn needs with cluster 0.
int64_t sinkhorn_scratch(Dtype dtype, int64_t items, int64_t batch, int64_t prototypes);

// codes = Sinkhorn-Knopp(exp(scores / T)): scores [L, B, M] -> codes [L, B, M], both of dtype.
cudaError_t launch_sinkhorn(Dtype dtype, const void* scores, void* codes, void* scratch,
                            int64_t items, int64_t batch, int64_t prototypes, double temperature,
                            int64_t iterations, int64_t cluster, cudaStream_t stream);

}  // namespace crpt::cuda
