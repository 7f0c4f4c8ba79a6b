#pragma once

#include "launch.cuh"

namespace crpt::cuda {

// distance_b = k-th smallest over q of |queries_b - keys_q|, index_b = that q; among equal
// distances the smaller q is nearer, and NaN is farthest. queries [B, D], keys [Q, D] of dtype ->
// distance [B] in the compute type, index int64 [B]; the scratch squares [B, Q] has the compute
// type.
cudaError_t launch_knn_distance(Dtype dtype, const void* queries, const void* keys, void* squares,
                                void* distance, int64_t* index, int64_t query_count,
                                int64_t key_count, int64_t width, int64_t k, cudaStream_t stream);

// out_b = grad_b (queries_b - keys_index_b) / distance_b, 0 at distance 0: queries [B, D], keys [Q,
// D] of dtype; grad [B], distance [B] and out [B, D] have the compute type.
cudaError_t launch_knn_distance_backward_queries(Dtype dtype, const void* grad, const void* queries,
                                                 const void* keys, const void* distance,
                                                 const int64_t* index, void* out,
                                                 int64_t query_count, int64_t key_count,
                                                 int64_t width, cudaStream_t stream);

// out_q = sum over b with index_b = q of grad_b (keys_q - queries_b) / distance_b, in the order of
// b: the same, out [Q, D].
cudaError_t launch_knn_distance_backward_keys(Dtype dtype, const void* grad, const void* queries,
                                              const void* keys, const void* distance,
                                              const int64_t* index, void* out, int64_t query_count,
                                              int64_t key_count, int64_t width,
                                              cudaStream_t stream);

}  // namespace crpt::cuda
