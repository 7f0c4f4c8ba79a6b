#pragma once

#include "launch.cuh"

namespace crpt::cuda {

// Elements of the compute type that launch_sinkhorn needs as scratch, beside work.
int64_t sinkhorn_scratch(int64_t items, int64_t batch, int64_t prototypes);

// codes = Sinkhorn-Knopp(exp(scores / T)): scores [L, B, M] -> codes [L, B, M], both of dtype.
// work [L, B, M] and scratch have the compute type; work may be codes where the types agree.
cudaError_t launch_sinkhorn(Dtype dtype, const void* scores, void* codes, void* work, void* scratch,
                            int64_t items, int64_t batch, int64_t prototypes, double temperature,
                            int64_t iterations, cudaStream_t stream);

}  // namespace crpt::cuda
