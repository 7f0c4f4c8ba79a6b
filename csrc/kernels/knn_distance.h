// The k-th smallest of |query_b - key_q| over q, and which q that is.
//
// Squared distances from a GEMM suffer cancellation, so they only narrow the search: every key that
// the GEMM's error bound cannot rule out is measured again from the vectors. The bound is in units
// of the vectors' squared lengths, so both sides are first moved by a common offset, the keys'
// mean: what is left of nearly identical embeddings is their differences, and few keys stay
// candidates.
//
// Floor, 512 queries, 2,048 keys, D = 128 in float: the GEMM, 268 MFLOP, 0.59 ms at the 456 GFLOP/s
// of two Zen 5 cores. There all takes 1.13 ms from memory, 1.09 from the caches.
#pragma once

#include "kernels/dispatch.h"

namespace crpt {

// centered = rows - offset, rounded to the type computed in, offset about the mean of the keys.
struct KnnCenterArgs {
  const void* queries;               // [B, D], contiguous rows
  const void* keys;                  // [Q, D], contiguous rows
  int64_t query_stride, key_stride;  // from row to row, in elements
  void* centered_queries;            // [B, D], f32 or f64
  void* centered_keys;               // [Q, D], the same
  void* query_norms;                 // [B]: |centered|^2, the same
  void* half_key_norms;              // [Q]: |centered|^2 / 2, the same
  DType dtype;                       // of queries and keys
  int64_t batch, count, dim;
  int threads;
};

struct KnnDistanceArgs {
  const void* queries;               // [B, D], contiguous rows
  const void* keys;                  // [Q, D], contiguous rows
  int64_t query_stride, key_stride;  // from row to row, in elements
  const void* dots;                  // [B, Q], f32 or f64: centered queries, centered keys^T
  const void* query_norms;           // [B], from knn_center
  const void* half_key_norms;        // [Q]
  void* distance;                    // [B], f32 or f64
  int64_t* index;                    // [B]
  DType dtype;                       // of queries and keys
  int64_t batch, count, dim;
  int64_t k;
  // At least (2 D + 16) epsilon; e more where |dots - exact| may be (D / 2 epsilon + e) |query|
  // |key|.
  double tolerance;
  int threads;
};

// grad_b (query_b - key_index_b) / distance_b, 0 where the distance is 0.
struct KnnDistanceBackwardArgs {
  const void* grad;                  // [B]
  const void* queries;               // [B, D], contiguous rows
  const void* keys;                  // [Q, D], contiguous rows
  int64_t query_stride, key_stride;  // from row to row, in elements
  const void* distance;              // [B]
  const int64_t* index;              // [B] in [0, Q)
  void* grad_queries;                // [B, D]; null: not wanted
  void* grad_keys;                   // [Q, D]; null: not wanted
  DType dtype;                       // f32 or f64
  int64_t batch, count, dim;
  int threads;
};

CRPT_KERNEL(void, knn_center, KnnCenterArgs)
CRPT_KERNEL(void, knn_distance, KnnDistanceArgs)
CRPT_KERNEL(BadValue, knn_distance_backward, KnnDistanceBackwardArgs)

}  // namespace crpt
