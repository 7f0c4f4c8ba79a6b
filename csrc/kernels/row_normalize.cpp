#include "kernels/row_normalize.h"

#include "kernels/parallel.h"
#include "kernels/simd_math.h"

namespace crpt::CRPT_ISA {
namespace {

constexpr double kShortest = 1e-12;

template <typename T>
void forward(const RowNormalizeArgs& args) {
  using A = Compute<T>;
  const int64_t D = args.dim;
  parallel_for(args.count, team_size(args.threads, args.count * D), [&](int64_t r) {
    const T* row = static_cast<const T*>(args.rows) + r * D;
    A* unit = static_cast<A*>(args.unit) + r * D;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) {
      const A x = widen(row[d]);
      sum += x * x;
    }
    const A norm = sqrt_of(sum);
    const A length = norm < static_cast<A>(kShortest) ? static_cast<A>(kShortest) : norm;
    static_cast<A*>(args.norm)[r] = norm;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) unit[d] = widen(row[d]) / length;
  });
}

template <typename A>
void backward(const RowNormalizeBackwardArgs& args) {
  const int64_t D = args.dim;
  parallel_for(args.count, team_size(args.threads, args.count * D), [&](int64_t r) {
    const A* grad = static_cast<const A*>(args.grad) + r * D;
    const A* unit = static_cast<const A*>(args.unit) + r * D;
    A* grad_row = static_cast<A*>(args.grad_rows) + r * D;
    const A norm = static_cast<const A*>(args.norm)[r];
    const bool is_short = norm < static_cast<A>(kShortest);
    const A length = is_short ? static_cast<A>(kShortest) : norm;
    A along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t d = 0; d < D; ++d) along += grad[d] * unit[d];
    along = is_short ? A(0) : along;
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) grad_row[d] = (grad[d] - along * unit[d]) / length;
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
