// Between the matrix products of L = L_comp + w L_intr (prototype_loss.h, intrinsic_loss.h): the
// rows that enter them, then losses and gradients of their results.
//
// With s = normalised embeddings and [x; y] for x above y: rows = [s; C], products = rows C^T =
// [s C^T; C C^T], in whose place come [G; w W], G the gradient of L_comp for s C^T and W that of
// L_intr for C C^T, symmetric. Then G C is dL/ds, and G^T s + w W C is dL/dC. With w = 0 the loss
// is L_comp.
//
// Floor, 512 x 128 with 512 prototypes in float, codes too: the products, 403 MFLOP, 0.88 ms at
// the 456 GFLOP/s of two Zen 5 cores. There all takes 1.42 ms, these two kernels 0.01 and 0.06.
#pragma once

#include "kernels/dispatch.h"

namespace crpt {

struct PrototypeObjectiveRowsArgs {
  const void* embeddings;                      // [problems, B, D], contiguous rows
  const void* prototypes;                      // [problems, M, D], contiguous rows
  int64_t embedding_stride, prototype_stride;  // from row to row, in elements
  void* rows;                                  // [problems, B + M, D] in compute type
  void* norm;                                  // [problems, B] in compute type: |embedding|
  DType dtype;
  int64_t problems, samples, count, dim;  // B, M, D
  int threads;
};

struct PrototypeObjectiveArgs {
  void* products;       // [problems, B + M, M] in compute type: [s C^T; C C^T], then [G; w W]
  const void* codes;    // [problems, B, M] in compute type, contiguous rows
  int64_t code_stride;  // from row to row, in elements
  void *loss, *comparison, *intrinsic;  // [problems]
  DType dtype;                          // of these three
  int64_t problems, samples, prototypes;
  double temperature, intrinsic_weight, offset;
  int threads;
};

CRPT_KERNEL(void, prototype_objective_rows, PrototypeObjectiveRowsArgs)
CRPT_KERNEL(void, prototype_objective, PrototypeObjectiveArgs)

}  // namespace crpt
