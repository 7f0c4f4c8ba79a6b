#include "kernels/prototype_loss.h"

#include "kernels/loss_rows.h"

namespace crpt::CRPT_ISA {
namespace {

// p = exp((scores - high) / T - logsumexp), whose sum is 1 but for rounding. The product is 0 where
// the score is the largest, whatever its size and whether or not a fused multiply-add rounds it.
template <typename T, typename A>
inline void softmax_block(const T* scores, const T* codes, A high, A inverse, A logsumexp, A* p,
                          int64_t n, RowSums& total) {
  A exp = 0, mass = 0;
#pragma omp simd reduction(+ : exp, mass)
  for (int64_t i = 0; i < n; ++i) {
    const A x = exp_of((widen(scores[i]) - high) * inverse - logsumexp);
    p[i] = x;
    exp += x;
    mass += widen(codes[i]);
  }
  total.exp += exp;
  total.mass += mass;
}

// `p` holds M values and may be `grad`. Dividing by its sum takes the rounding of logsumexp out
// again.
template <typename T, typename A>
inline void row_grad_scores(const T* scores, const T* codes, int64_t M, A inverse, A logsumexp,
                            A factor, A* p, T* grad) {
  const A high = row_max(scores, M);
  RowSums sums;
  for (int64_t m = 0; m < M; m += kSumBlock) {
    softmax_block(scores + m, codes + m, high, inverse, logsumexp, p + m,
                  M - m < kSumBlock ? M - m : kSumBlock, sums);
  }
  write_grad_scores(p, codes, static_cast<A>(sums.mass / sums.exp), factor, grad, M);
}

template <typename T, typename A>
inline void row_grad_codes(const T* scores, int64_t M, A inverse, A logsumexp, A factor, T* grad) {
  const A high = row_max(scores, M);
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) {
    narrow((logsumexp - (widen(scores[m]) - high) * inverse) * factor, &grad[m]);
  }
}

template <typename T>
void mean_losses(const double* losses, int64_t problems, int64_t samples, T* out) {
  for (int64_t i = 0; i < problems; ++i) {
    double total = 0;
    for (int64_t b = 0; b < samples; ++b) total += losses[i * samples + b];
    narrow(static_cast<Compute<T>>(total / static_cast<double>(samples)), out + i);
  }
}

template <typename T>
void forward(const PrototypeLossArgs& args) {
  using A = Compute<T>;
  const int64_t M = args.prototypes, rows = args.problems * args.samples;
  const A inverse = A(1) / static_cast<A>(args.temperature);
  const A factor = inverse / static_cast<A>(args.samples);
  const Scratch<double> losses(rows);
  parallel_for(rows, team_size(args.threads, rows * M), [&](int64_t b) {
    const T* scores = static_cast<const T*>(args.scores) + b * args.score_stride;
    const T* codes = static_cast<const T*>(args.codes) + b * args.code_stride;
    A* gradient = static_cast<A*>(args.gradient);
    const RowLoss<A> row = gradient == nullptr ? row_loss(scores, codes, M, inverse)
                                               : row_loss_and_grad(scores, codes, M, inverse,
                                                                   factor, gradient + b * M);
    losses.get()[b] = row.loss;
    static_cast<A*>(args.logsumexp)[b] = row.logsumexp;
  });
  mean_losses(losses.get(), args.problems, args.samples, static_cast<T*>(args.loss));
}

template <typename T>
void backward(const PrototypeLossBackwardArgs& args) {
  using A = Compute<T>;
  const int64_t M = args.prototypes, rows = args.problems * args.samples;
  const A inverse = A(1) / static_cast<A>(args.temperature);
  const int team = team_size(args.threads, rows * M);
  constexpr bool in_place = sizeof(T) == sizeof(A);
  const Scratch<A> scratch(in_place ? 1 : team * M);
  parallel_for(team, team, [&](int64_t worker) {
    for (int64_t b = worker * rows / team; b < (worker + 1) * rows / team; ++b) {
      const T* scores = static_cast<const T*>(args.scores) + b * args.score_stride;
      T* grad_row = static_cast<T*>(args.grad_input) + b * M;
      const A logsumexp = static_cast<const A*>(args.logsumexp)[b];
      const A grad =
          widen(static_cast<const T*>(args.grad)[b / args.samples]) / static_cast<A>(args.samples);
      if (args.codes == nullptr) {
        row_grad_codes(scores, M, inverse, logsumexp, grad, grad_row);
        continue;
      }
      const T* codes = static_cast<const T*>(args.codes) + b * args.code_stride;
      A* p = in_place ? reinterpret_cast<A*>(grad_row) : scratch.get() + worker * M;
      row_grad_scores(scores, codes, M, inverse, logsumexp, grad * inverse, p, grad_row);
    }
  });
}

}  // namespace

void prototype_loss(const PrototypeLossArgs& args) {
  with_type(args.dtype, [&]<typename T>(T) { forward<T>(args); });
}

void prototype_loss_backward(const PrototypeLossBackwardArgs& args) {
  with_type(args.dtype, [&]<typename T>(T) { backward<T>(args); });
}

}  // namespace crpt::CRPT_ISA
