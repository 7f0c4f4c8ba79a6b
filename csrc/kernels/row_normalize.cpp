#include "kernels/row_normalize.h"

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

template <typename T>
void forward(const RowNormalizeArgs& args) {
  using A = Compute<T>;
  const int64_t D = args.dim;
  parallel_for(args.count, team_size(args.threads, args.count * D), [&](int64_t r) {
    static_cast<A*>(args.norm)[r] = normalize_row(static_cast<const T*>(args.rows) + r * D,
                                                  static_cast<A*>(args.unit) + r * D, D);
  });
}

template <typename A>
void backward(const RowNormalizeBackwardArgs& args) {
  const int64_t D = args.dim;
  parallel_for(args.count, team_size(args.threads, args.count * D), [&](int64_t r) {
    grad_row(static_cast<const A*>(args.grad) + r * D, static_cast<const A*>(args.unit) + r * D,
             static_cast<const A*>(args.norm)[r], static_cast<A*>(args.grad_rows) + r * D, D);
  });
}

}  // namespace

void row_normalize(const RowNormalizeArgs& args) {
  with_type(args.dtype, [&]<typename T>(T) { forward<T>(args); });
}

void row_normalize_backward(const RowNormalizeBackwardArgs& args) {
  args.dtype == DType::f64 ? backward<double>(args) : backward<float>(args);
}

}  // namespace crpt::CRPT_ISA
