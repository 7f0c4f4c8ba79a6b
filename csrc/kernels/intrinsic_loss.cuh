#pragma once

#include "launch.cuh"

namespace crpt::cuda {

// weights_ij = [i != j] / (M^2 (s_ij + offset)) in place of s [L, M, M], loss_l = sum_ij weights_ij
// s_ij: s and the scratch row_loss [L, M] have the compute type, loss [L] has dtype.
cudaError_t launch_intrinsic_loss(Dtype dtype, void* similarity_to_weights, void* loss,
                                  void* row_loss, int64_t items, int64_t prototypes, double offset,
                                  cudaStream_t stream);

}  // namespace crpt::cuda
