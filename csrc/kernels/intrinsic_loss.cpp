#include "kernels/intrinsic_loss.h"

#include "kernels/loss_rows.h"

namespace crpt::CRPT_ISA {
namespace {

template <typename A>
void typed(const IntrinsicLossArgs& args) {
  const int64_t M = args.prototypes, rows = args.problems * M;
  const A offset = static_cast<A>(args.offset);
  const A scale = A(1) / (static_cast<A>(M) * static_cast<A>(M));
  const Scratch<double> losses(rows);
  parallel_for(rows, team_size(args.threads, rows * M), [&](int64_t row) {
    A* weights = static_cast<A*>(args.weights) + row * M;
    losses.get()[row] = weigh_row(weights, row % M, M, offset, scale, A(1));
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
