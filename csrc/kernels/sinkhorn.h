// codes = Sinkhorn-Knopp(exp(scores / T)): prototypes to 1/M each, samples to 1/B each,
// `iterations` times; last, each sample's codes sum to 1.
#pragma once

#include "kernels/dispatch.h"

namespace crpt {

struct SinkhornArgs {
  const void* scores;  // [problems, B, M]
  void* codes;         // [problems, B, M]
  DType dtype;
  int64_t problems, samples, prototypes;
  double temperature;
  int64_t iterations;
  int threads;
};

CRPT_KERNEL(void, sinkhorn, SinkhornArgs)

}  // namespace crpt
