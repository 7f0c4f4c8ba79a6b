// codes = Sinkhorn-Knopp(exp(scores / T)): prototypes to 1/M each, samples to 1/B each,
// `iterations` times; last, each sample's codes sum to 1.
//
// Floor, 512 x 512 in float: 2.1 MB read and written once, 29 us at the 73 GB/s of a copy of them
// on two Zen 5 cores. There it takes 102 us from memory, 89 from the caches: exp, 3 passes over K.
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
