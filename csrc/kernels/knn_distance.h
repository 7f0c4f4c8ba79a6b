// The k-th smallest of |query_b - key_q| over q, and which q that is.
//
// Squared distances from a GEMM suffer cancellation, so they only narrow the search: every key that
// the GEMM's error bound cannot rule out is measured again from the vectors. Exact, and rarely more
// than k keys.
#pragma once

#include "kernels/dispatch.h"

namespace crpt {

struct KnnDistanceArgs {
  const void* queries;  // [B, D]
  const void* keys;     // [Q, D]
  const void* dots;     // [B, Q]: queries keys^T
  void* distance;       // [B]
  int64_t* index;       // [B]
  DType dtype;          // of all of these: f32 or f64
  int64_t batch, count, dim;
  int64_t k;
  double tolerance;  // |dots - exact| <= tolerance |query| |key|
  int threads;
};

// grad_b (query_b - key_index_b) / distance_b, 0 where the distance is 0.
struct KnnDistanceBackwardArgs {
  const void* grad;      // [B]
  const void* queries;   // [B, D]
  const void* keys;      // [Q, D]
  const void* distance;  // [B]
  const int64_t* index;  // [B]
  void* grad_queries;    // [B, D]; null: not wanted
  void* grad_keys;       // [Q, D]; null: not wanted
  DType dtype;           // f32 or f64
  int64_t batch, count, dim;
  int threads;
};

CRPT_KERNEL(void, knn_distance, KnnDistanceArgs)
CRPT_KERNEL(void, knn_distance_backward, KnnDistanceBackwardArgs)

}  // namespace crpt
