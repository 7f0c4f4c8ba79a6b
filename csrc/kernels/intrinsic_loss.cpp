#include "kernels/intrinsic_loss.h"

#include "kernels/parallel.h"
#include "kernels/simd_math.h"

namespace crpt::CRPT_ISA {
namespace {

// Turns n values of s into w and returns their share of the loss.
template <typename A>
inline A weigh(A* values, int64_t n, A offset, A scale) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const A s = values[j], w = scale / (s + offset);
    values[j] = w;
    sum += s * w;
  }
  return sum;
}

template <typename A>
inline double weigh_row(A* row, int64_t i, int64_t M, A offset, A scale) {
  row[i] = 0;  // s_ii has no part in the loss
  const double sum =
      blocked_sum(M, [&](int64_t j, int64_t n) { return weigh(row + j, n, offset, scale); });
  row[i] = 0;
  return sum;
}

template <typename A>
void typed(const IntrinsicLossArgs& args) {
  const int64_t M = args.prototypes, rows = args.problems * M;
  const A offset = static_cast<A>(args.offset);
  const A scale = A(1) / (static_cast<A>(M) * static_cast<A>(M));
  const Scratch<double> losses(rows);
  parallel_for(rows, team_size(args.threads, rows * M), [&](int64_t row) {
    A* weights = static_cast<A*>(args.weights) + row * M;
    losses.get()[row] = weigh_row(weights, row % M, M, offset, scale);
  });
  for (int64_t problem = 0; problem < args.problems; ++problem) {
    double total = 0;
    for (int64_t i = 0; i < M; ++i) total += losses.get()[problem * M + i];
    static_cast<A*>(args.loss)[problem] = static_cast<A>(total);
  }
}

}  // namespace

void intrinsic_loss(const IntrinsicLossArgs& args) {
  args.dtype == DType::f64 ? typed<double>(args) : typed<float>(args);
}

}  // namespace crpt::CRPT_ISA
