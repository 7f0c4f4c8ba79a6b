// out[c, r] = in[r, c] for a matrix of 4-byte elements: what a GEMM needs that reads its first
// operand by rows.
#pragma once

#include "kernels/dispatch.h"

namespace crpt {

struct TransposeArgs {
  const void* in;  // [rows, columns], rows `stride` elements apart
  void* out;       // [columns, rows]
  int64_t rows, columns, stride;
  int threads;
};

CRPT_KERNEL(void, transpose, TransposeArgs)

}  // namespace crpt
