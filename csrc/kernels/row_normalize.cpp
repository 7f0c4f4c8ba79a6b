#include "kernels/row_normalize.h"

#include "kernels/normalize_rows.h"

namespace crpt::CRPT_ISA {
namespace {

template <typename T>
void forward(const RowNormalizeArgs& args) {
  using A = Compute<T>;
  const int64_t D = args.dim;
  parallel_for(args.count, team_size(args.threads, args.count * D), [&](int64_t r) {
    static_cast<A*>(args.norm)[r] = normalize_row(
        static_cast<const T*>(args.rows) + r * args.stride, static_cast<A*>(args.unit) + r * D, D);
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
