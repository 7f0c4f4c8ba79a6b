// From s = C C^T: weights w_ij = [i != j] / (M^2 (s_ij + offset)), written over s, and
// loss = sum_ij s_ij w_ij. The gradient, one-sided, is w C.
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
