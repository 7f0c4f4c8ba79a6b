#pragma once

#include "launch.cuh"

namespace crpt::cuda {

// loss_l = -mean_b sum_m codes log softmax_m(scores / T): scores, codes [L, B, M] -> loss [L], all
// of dtype; logsumexp [L, B] of (scores - the row's largest) / T and the scratch row_loss [L, B]
// have the compute type.
cudaError_t launch_prototype_loss(Dtype dtype, const void* scores, const void* codes, void* loss,
                                  void* logsumexp, void* row_loss, int64_t items, int64_t batch,
                                  int64_t prototypes, double temperature, cudaStream_t stream);

// out = grad_l (softmax_m(scores / T) sum_m(codes) - codes) / (T B), [L, B, M] of dtype; grad [L]
// in the compute type.
cudaError_t launch_prototype_loss_backward_scores(Dtype dtype, const void* grad, const void* scores,
                                                  const void* codes, const void* logsumexp,
                                                  void* out, int64_t items, int64_t batch,
                                                  int64_t prototypes, double temperature,
                                                  cudaStream_t stream);

// out = -grad_l log softmax_m(scores / T) / B, [L, B, M] of dtype; grad [L] in the compute type.
cudaError_t launch_prototype_loss_backward_codes(Dtype dtype, const void* grad, const void* scores,
                                                 const void* logsumexp, void* out, int64_t items,
                                                 int64_t batch, int64_t prototypes,
                                                 double temperature, cudaStream_t stream);

}  // namespace crpt::cuda
