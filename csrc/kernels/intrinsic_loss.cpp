#include "kernels/intrinsic_loss.h"

#include "kernels/parallel.h"
#include "kernels/simd_math.h"

namespace crpt::CRPT_ISA {
namespace {

template <typename A>
void typed(const IntrinsicLossArgs& args) {
  const int64_t M = args.prototypes, rows = args.problems * M;
  const A offset = static_cast<A>(args.offset);
  const A scale = A(1) / (static_cast<A>(M) * static_cast<A>(M));
  const Scratch<double> row_loss(rows);
  parallel_for(rows, team_size(args.threads, rows * M), [&](int64_t row) {
    A* w = static_cast<A*>(args.weights) + row * M;
    const int64_t i = row % M;
    w[i] = 0;  // s_ii has no part in the loss
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < M; ++j) {
      const A s = w[j];
      w[j] = scale / (s + offset);
      sum += s * w[j];
    }
    w[i] = 0;
    row_loss.get()[row] = sum;
  });
  for (int64_t problem = 0; problem < args.problems; ++problem) {
    double total = 0;
    for (int64_t i = 0; i < M; ++i) total += row_loss.get()[problem * M + i];
    static_cast<A*>(args.loss)[problem] = static_cast<A>(total);
  }
}

}  // namespace

void intrinsic_loss(const IntrinsicLossArgs& args) {
  args.dtype == DType::f64 ? typed<double>(args) : typed<float>(args);
}

}  // namespace crpt::CRPT_ISA
