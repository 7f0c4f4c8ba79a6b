#include "kernels/prototype_loss.h"

#include "kernels/parallel.h"
#include "kernels/simd_math.h"

namespace crpt::CRPT_ISA {
namespace {

template <typename T>
void forward(const PrototypeLossArgs& args) {
  using A = Compute<T>;
  const int64_t M = args.prototypes, rows = args.problems * args.samples;
  const A inverse = A(1) / static_cast<A>(args.temperature);
  const Scratch<double> row_loss(rows);
  parallel_for(rows, team_size(args.threads, rows * M), [&](int64_t b) {
    const T* scores = static_cast<const T*>(args.scores) + b * M;
    const T* codes = static_cast<const T*>(args.codes) + b * M;
    A high = -__builtin_huge_val();
#pragma omp simd reduction(max : high)
    for (int64_t m = 0; m < M; ++m) {
      const A x = widen(scores[m]);
      high = x > high ? x : high;
    }
    // Relative to the row's maximum: the loss of scores with a large common offset stays exact.
    A sum = 0, weighted = 0, mass = 0;
#pragma omp simd reduction(+ : sum, weighted, mass)
    for (int64_t m = 0; m < M; ++m) {
      const A x = (widen(scores[m]) - high) * inverse, q = widen(codes[m]);
      sum += exp_of(x);
      weighted += q * x;
      mass += q;
    }
    const A log_sum = log_of(sum);
    static_cast<A*>(args.logsumexp)[b] = high * inverse + log_sum;
    row_loss.get()[b] = static_cast<double>(log_sum) * mass - weighted;
  });
  for (int64_t i = 0; i < args.problems; ++i) {
    double total = 0;
    for (int64_t b = 0; b < args.samples; ++b) total += row_loss.get()[i * args.samples + b];
    narrow(static_cast<A>(total / static_cast<double>(args.samples)),
           static_cast<T*>(args.loss) + i);
  }
}

template <typename T>
void backward(const PrototypeLossBackwardArgs& args) {
  using A = Compute<T>;
  const int64_t M = args.prototypes, rows = args.problems * args.samples;
  const A inverse = A(1) / static_cast<A>(args.temperature);
  parallel_for(rows, team_size(args.threads, rows * M), [&](int64_t b) {
    const T* scores = static_cast<const T*>(args.scores) + b * M;
    T* grad_input = static_cast<T*>(args.grad_input) + b * M;
    const A logsumexp = static_cast<const A*>(args.logsumexp)[b];
    const A grad =
        widen(static_cast<const T*>(args.grad)[b / args.samples]) / static_cast<A>(args.samples);
    if (args.codes == nullptr) {
#pragma omp simd
      for (int64_t m = 0; m < M; ++m)
        narrow((logsumexp - widen(scores[m]) * inverse) * grad, &grad_input[m]);
      return;
    }
    const T* codes = static_cast<const T*>(args.codes) + b * M;
    A mass = 0;
#pragma omp simd reduction(+ : mass)
    for (int64_t m = 0; m < M; ++m) mass += widen(codes[m]);
    const A factor = grad * inverse;
#pragma omp simd
    for (int64_t m = 0; m < M; ++m) {
      const A p = exp_of(widen(scores[m]) * inverse - logsumexp);
      narrow((p * mass - widen(codes[m])) * factor, &grad_input[m]);
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
