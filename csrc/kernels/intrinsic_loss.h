// From s = C C^T: weights w_ij = [i != j] / (M^2 (s_ij + offset)), written over s, and
// loss = sum_ij s_ij w_ij. The gradient, one-sided, is w C.
//
// Floor, M = 512, D = 128 in float: two GEMMs, in all 134 MFLOP, 0.29 ms at the 456 GFLOP/s of
// two Zen 5 cores. There loss and gradient take 0.43 to 0.45 ms, this kernel 13 us, in the caches.
#pragma once

#include "kernels/dispatch.h"

namespace crpt {

struct IntrinsicLossArgs {
  void* weights;  // [problems, M, M]: s on entry, w on return
  void* loss;     // [problems]
  DType dtype;    // the compute type: f32 or f64
  int64_t problems, prototypes;
  double offset;
  int threads;
};

CRPT_KERNEL(void, intrinsic_loss, IntrinsicLossArgs)

}  // namespace crpt
