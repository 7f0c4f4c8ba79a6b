// The spread of prototypes from their similarities: one warp per row, then one block per item.
#include "intrinsic_loss.cuh"
#include "item_sum.cuh"

namespace crpt::cuda {
namespace {

template <class A>
__global__ void intrinsic_loss_rows_kernel(A* similarity_to_weights, A* row_loss, int64_t rows,
                                           int64_t prototypes, A offset) {
  const A square = static_cast<A>(prototypes) * static_cast<A>(prototypes);
  for (int64_t row = global_warp(); row < rows; row += all_warps()) {
    A* s = similarity_to_weights + row * prototypes;
    A loss = 0;
    for (int64_t j = lane(); j < prototypes; j += kWarp) {
      if (j == row % prototypes) {
        s[j] = 0;
      } else {
        loss += s[j] / (s[j] + offset);
        s[j] = 1 / (square * (s[j] + offset));
      }
    }
    loss = warp_reduce(loss, Sum());
    if (lane() == 0) row_loss[row] = loss;
  }
}

}  // namespace

cudaError_t launch_intrinsic_loss(Dtype dtype, void* similarity_to_weights, void* loss,
                                  void* row_loss, int64_t items, int64_t prototypes, double offset,
                                  cudaStream_t stream) {
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    const cudaError_t error =
        launch(stream, blocks_for(items * prototypes, kWarps), intrinsic_loss_rows_kernel<A>,
               static_cast<A*>(similarity_to_weights), static_cast<A*>(row_loss),
               items * prototypes, prototypes, static_cast<A>(offset));
    if (error != cudaSuccess) return error;
    const A square = static_cast<A>(prototypes) * static_cast<A>(prototypes);
    return launch_item_sum(static_cast<const A*>(row_loss), static_cast<T*>(loss), items,
                           prototypes, square, stream);
  });
}

}  // namespace crpt::cuda
