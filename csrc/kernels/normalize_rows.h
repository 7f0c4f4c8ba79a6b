// One row to unit length, and its gradient: for row_normalize and for prototype_objective.
#pragma once

#include "kernels/parallel.h"
#include "kernels/simd_math.h"

namespace crpt::CRPT_ISA {
namespace {

constexpr double kShortest = 1e-12;

template <typename A>
inline A divisor(A norm) {
  return norm < static_cast<A>(kShortest) ? static_cast<A>(kShortest) : norm;
}

// Returns |row|.
template <typename T, typename A>
inline A normalize_row(const T* row, A* unit, int64_t D) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += widen(row[d]) * widen(row[d]);
  const A norm = sqrt_of(sum), length = divisor(norm);
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) unit[d] = widen(row[d]) / length;
  return norm;
}

template <typename A>
inline void grad_row(const A* grad, const A* unit, A norm, A* out, int64_t D) {
  A along = 0;
#pragma omp simd reduction(+ : along)
  for (int64_t d = 0; d < D; ++d) along += grad[d] * unit[d];
  // Below kShortest the divisor is a constant.
  along = norm < static_cast<A>(kShortest) ? A(0) : along;
  const A length = divisor(norm);
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) out[d] = (grad[d] - along * unit[d]) / length;
}

}  // namespace
}  // namespace crpt::CRPT_ISA
