// The spread of prototypes from their similarities: one warp or block per row, then one block per
// item.
//
// Floor on an H200 (4.0 TB/s copied, 51 TFLOP/s): [512, 512] fp32 0.5 us, with the two GEMMs around
// it (D = 128) 2.6 us: measured 4.3 us in two launches, and 23 us, forward and backward.
#include "intrinsic_loss.cuh"
#include "item_sum.cuh"
#include "rows.cuh"

namespace crpt::cuda {
namespace {

template <class Row, class A>
__global__ void __launch_bounds__(kThreads)
    intrinsic_loss_rows_kernel(A* similarity_to_weights, A* row_loss, int64_t rows,
                               int64_t prototypes, A offset) {
  const A square = static_cast<A>(prototypes) * static_cast<A>(prototypes);
  A s[Row::kEach];
  for (int64_t row = Row::first_row(); row < rows; row += Row::step()) {
    A* of_row = similarity_to_weights + row * prototypes;
    const int64_t itself = row % prototypes;
    const auto read = [&](int64_t part) { Row::read(of_row, part, prototypes, s); };
    read(0);
    A loss = 0;
    Row::write(of_row, prototypes, read, [&](int i, int64_t j) {
      if (j == itself) return A(0);
      loss += s[i] / (s[i] + offset);
      return 1 / (square * (s[i] + offset));
    });
    loss = Row::reduce(loss, Sum());
    if (Row::thread() == 0) row_loss[row] = loss;
  }
}

}  // namespace

cudaError_t launch_intrinsic_loss(Dtype dtype, void* similarity_to_weights, void* loss,
                                  void* row_loss, int64_t items, int64_t prototypes, double offset,
                                  cudaStream_t stream) {
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    constexpr int kPer = sizeof(A) == 8 ? 1 : Pack<A>::kWidth;
    const int64_t rows = items * prototypes;
    const cudaError_t error = with_rows<kPer>(
        prototypes, in_packs<A>(similarity_to_weights, prototypes), [&]<class Row>(Row) {
          return launch(stream, Row::blocks(rows), intrinsic_loss_rows_kernel<Row, A>,
                        static_cast<A*>(similarity_to_weights), static_cast<A*>(row_loss), rows,
                        prototypes, static_cast<A>(offset));
        });
    if (error != cudaSuccess) return error;
    const A square = static_cast<A>(prototypes) * static_cast<A>(prototypes);
    return launch_item_sum(static_cast<const A*>(row_loss), static_cast<T*>(loss), items,
                           prototypes, square, stream);
  });
}

}  // namespace crpt::cuda
