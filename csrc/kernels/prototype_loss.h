// loss = -1/B sum_b sum_m q_bm log p_bm, p_b = softmax(scores_b / T), and its gradients
// (p_bm sum_m' q_bm' - q_bm) / (T B) for the scores and -log p_bm / B for the codes.
//
// All of them from (score - the row's largest) / T: where scores / T overflows but this does not,
// results are those of the formula, and not the NaN of the plain twin.
//
// Floor, 4096 x 2048 in float: two matrices read and a gradient written, 101 MB, 2.2 ms at the 46
// GB/s of two Zen 5 cores. There it takes 4.65 ms: exp, and the gradient's way through backward.
#pragma once

#include "kernels/dispatch.h"

namespace crpt {

struct PrototypeLossArgs {
  const void* scores;                 // [problems, B, M], contiguous rows
  const void* codes;                  // [problems, B, M], contiguous rows
  int64_t score_stride, code_stride;  // from row to row, in elements
  void* loss;                         // [problems]
  void* logsumexp;  // [problems, B] in compute type: of (scores - the row's largest) / T
  void* gradient;   // [problems, B, M] in compute type: of the loss for the scores, from the same
                    // pass over them; null: not wanted
  DType dtype;
  int64_t problems, samples, prototypes;
  double temperature;
  int threads;
};

struct PrototypeLossBackwardArgs {
  const void* grad;    // [problems]
  const void* scores;  // [problems, B, M], contiguous rows
  // [problems, B, M], contiguous rows; null: the gradient of the codes is meant, else of the scores
  const void* codes;
  int64_t score_stride, code_stride;  // from row to row, in elements
  const void* logsumexp;              // [problems, B] in compute type
  void* grad_input;                   // [problems, B, M]
  DType dtype;
  int64_t problems, samples, prototypes;
  double temperature;
  int threads;
};

CRPT_KERNEL(void, prototype_loss, PrototypeLossArgs)
CRPT_KERNEL(void, prototype_loss_backward, PrototypeLossBackwardArgs)

}  // namespace crpt
