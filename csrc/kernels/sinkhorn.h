// codes = Sinkhorn-Knopp(exp(scores / T)): prototypes to 1/M each, samples to 1/B each,
// `iterations` times; last, each sample's codes sum to 1.
//
// Floor, 512 x 512 in float: scores read and codes written once, 25 us at the 83 GB/s of two Zen 5
// cores. There it takes 53 us: 22 for exp, the rest for the 3 passes over K, which stays in the
// second-level caches.
#pragma once

#include "kernels/dispatch.h"

namespace crpt {

struct SinkhornArgs {
  const void* scores;    // [problems, B, M], contiguous rows
  int64_t score_stride;  // from row to row, in elements
  void* codes;           // [problems, B, M], contiguous
  DType dtype;
  int64_t problems, samples, prototypes;
  double temperature;  // > 0 in the compute type
  int64_t iterations;
  int threads;
};

CRPT_KERNEL(void, sinkhorn, SinkhornArgs)

}  // namespace crpt
