// One row of the prototype loss and one of the intrinsic loss, each with its gradient: for their
// kernels, and for that of the whole objective.
#pragma once

#include "kernels/parallel.h"
#include "kernels/simd_math.h"

namespace crpt::CRPT_ISA {
namespace {

template <typename A>
struct RowLoss {
  double loss;
  A logsumexp;
};

struct RowSums {
  double exp = 0, weighted = 0, mass = 0;  // sums over m of exp(x), q x and q
};

// What becomes of exp(x): nothing, or it is kept for the gradient.
struct Dropped {
  Dropped operator+(int64_t) const { return {}; }
};
template <typename A>
inline void keep(Dropped, int64_t, A) {}
template <typename A>
inline void keep(A* kept, int64_t i, A value) {
  kept[i] = value;
}

template <typename T, typename A, typename Kept>
inline void add_block(const T* scores, const T* codes, Kept kept, int64_t n, A high, A inverse,
                      RowSums& total) {
  A exp = 0, weighted = 0, mass = 0;
#pragma omp simd reduction(+ : exp, weighted, mass)
  for (int64_t i = 0; i < n; ++i) {
    const A x = (widen(scores[i]) - high) * inverse, e = exp_of(x), q = widen(codes[i]);
    keep(kept, i, e);
    exp += e;
    weighted += q * x;
    mass += q;
  }
  total.exp += exp;
  total.weighted += weighted;
  total.mass += mass;
}

// Relative to the row's maximum, so that scores with a large common offset lose nothing. `kept` may
// be the scores.
template <typename T, typename A, typename Kept>
inline RowSums row_sums(const T* scores, const T* codes, Kept kept, int64_t M, A inverse) {
  const A high = row_max(scores, M);
  RowSums sums;
  for (int64_t m = 0; m < M; m += kSumBlock) {
    const int64_t n = M - m < kSumBlock ? M - m : kSumBlock;
    add_block(scores + m, codes + m, kept + m, n, high, inverse, sums);
  }
  return sums;
}

template <typename A>
inline RowLoss<A> row_loss_of(const RowSums& sums) {
  const double log_sum = log_of(sums.exp);
  return {log_sum * sums.mass - sums.weighted, static_cast<A>(log_sum)};
}

template <typename T, typename A>
inline RowLoss<A> row_loss(const T* scores, const T* codes, int64_t M, A inverse) {
  return row_loss_of<A>(row_sums(scores, codes, Dropped{}, M, inverse));
}

// grad = (p mass - codes) factor; `p` may be `grad`.
template <typename T, typename A, typename G>
inline void write_grad_scores(const A* p, const T* codes, A mass, A factor, G* grad, int64_t M) {
#pragma omp simd
  for (int64_t m = 0; m < M; ++m) narrow((p[m] * mass - widen(codes[m])) * factor, &grad[m]);
}

// The loss and in the same pass over the scores its gradient for them, which may take their place.
template <typename T, typename A>
inline RowLoss<A> row_loss_and_grad(const T* scores, const T* codes, int64_t M, A inverse, A factor,
                                    A* grad) {
  const RowSums sums = row_sums(scores, codes, grad, M, inverse);
  write_grad_scores(grad, codes, static_cast<A>(sums.mass / sums.exp), factor, grad, M);
  return row_loss_of<A>(sums);
}

// Turns n values of s into w times `factor`, and returns their share of the loss.
template <typename A>
inline A weigh(A* values, int64_t n, A offset, A scale, A factor) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    const A s = values[j], w = scale / (s + offset);
    values[j] = w * factor;
    sum += s * w;
  }
  return sum;
}

// Row i of s, w_ij = scale / (s_ij + offset).
template <typename A>
inline double weigh_row(A* row, int64_t i, int64_t M, A offset, A scale, A factor) {
  row[i] = 0;  // s_ii has no part in the loss
  const double sum = blocked_sum(
      M, [&](int64_t j, int64_t n) { return weigh(row + j, n, offset, scale, factor); });
  row[i] = 0;
  return sum;
}

}  // namespace
}  // namespace crpt::CRPT_ISA
