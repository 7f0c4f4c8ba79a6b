#include "kernels/prototype_objective.h"

#include "kernels/loss_rows.h"
#include "kernels/normalize_rows.h"

namespace crpt::CRPT_ISA {
namespace {

template <typename T, typename A>
inline void copy_row(const T* in, A* out, int64_t D) {
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) out[d] = widen(in[d]);
}

template <typename T>
void stack_rows(const PrototypeObjectiveRowsArgs& args) {
  using A = Compute<T>;
  const int64_t B = args.samples, M = args.count, D = args.dim, rows = args.problems * (B + M);
  parallel_for(rows, team_size(args.threads, rows * D), [&](int64_t row) {
    const int64_t problem = row / (B + M), i = row % (B + M);
    A* out = static_cast<A*>(args.rows) + row * D;
    if (i < B) {
      const T* in =
          static_cast<const T*>(args.embeddings) + (problem * B + i) * args.embedding_stride;
      static_cast<A*>(args.norm)[problem * B + i] = normalize_row(in, out, D);
    } else {
      const T* in =
          static_cast<const T*>(args.prototypes) + (problem * M + i - B) * args.prototype_stride;
      copy_row(in, out, D);
    }
  });
}

template <typename A>
struct Factors {
  A inverse, gradient;      // of the comparison: 1 / T, 1 / (B T)
  A offset, scale, weight;  // of the intrinsic loss: offset, 1 / M^2, w
};

constexpr int64_t kBand = 16;

// Band `band` of one problem: up to kBand rows of s C^T and as many of C C^T, so that equal shares
// of the bands are equal work.
template <typename A>
void losses_of_band(const PrototypeObjectiveArgs& args, const Factors<A>& f, int64_t problem,
                    int64_t band, double* losses) {
  const int64_t B = args.samples, M = args.prototypes, begin = band * kBand;
  A* const products = static_cast<A*>(args.products) + problem * (B + M) * M;
  const A* const codes = static_cast<const A*>(args.codes) + problem * B * args.code_stride;
  const int64_t end = begin + kBand < B ? begin + kBand : B;
  for (int64_t b = begin; b < end; ++b) {
    A* row = products + b * M;
    const A* row_codes = codes + b * args.code_stride;
    losses[b] = row_loss_and_grad(row, row_codes, M, f.inverse, f.gradient, row).loss;
  }
  for (int64_t i = begin; i < begin + kBand && i < M; ++i) {
    losses[B + i] = weigh_row(products + (B + i) * M, i, M, f.offset, f.scale, f.weight);
  }
}

inline double sum_of(const double* values, int64_t n) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += values[i];
  return total;
}

template <typename T>
void losses(const PrototypeObjectiveArgs& args) {
  using A = Compute<T>;
  const int64_t B = args.samples, M = args.prototypes;
  const A inverse = A(1) / static_cast<A>(args.temperature);
  const Factors<A> factors = {inverse, inverse / static_cast<A>(B), static_cast<A>(args.offset),
                              A(1) / (static_cast<A>(M) * static_cast<A>(M)),
                              static_cast<A>(args.intrinsic_weight)};
  const int64_t bands = ((B > M ? B : M) + kBand - 1) / kBand;
  const Scratch<double> row_losses(args.problems * (B + M));
  const int team = team_size(args.threads, args.problems * (B + M) * M);
  parallel_for(args.problems * bands, team, [&](int64_t i) {
    const int64_t problem = i / bands;
    losses_of_band(args, factors, problem, i % bands, row_losses.get() + problem * (B + M));
  });
  for (int64_t problem = 0; problem < args.problems; ++problem) {
    const double* rows = row_losses.get() + problem * (B + M);
    const double comparison = sum_of(rows, B) / static_cast<double>(B);
    const double intrinsic = sum_of(rows + B, M);
    // Without weight it has no part in the loss, not even where it is infinite.
    const double weighted = args.intrinsic_weight > 0 ? args.intrinsic_weight * intrinsic : 0;
    narrow(static_cast<A>(comparison + weighted), static_cast<T*>(args.loss) + problem);
    narrow(static_cast<A>(comparison), static_cast<T*>(args.comparison) + problem);
    narrow(static_cast<A>(intrinsic), static_cast<T*>(args.intrinsic) + problem);
  }
}

}  // namespace

void prototype_objective_rows(const PrototypeObjectiveRowsArgs& args) {
  with_type(args.dtype, [&]<typename T>(T) { stack_rows<T>(args); });
}

void prototype_objective(const PrototypeObjectiveArgs& args) {
  with_type(args.dtype, [&]<typename T>(T) { losses<T>(args); });
}

}  // namespace crpt::CRPT_ISA
