// The last step of a loss: one number per item, summed in a fixed order.
#pragma once

#include "device.cuh"

namespace crpt::cuda {

// out[l] = sum_n terms[l, n] / divisor, terms [L, N] -> out [L]; one block per item.
template <class T>
__global__ void item_sum_kernel(const compute_t<T>* terms, T* out, int64_t items, int64_t count,
                                compute_t<T> divisor) {
  using A = compute_t<T>;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    A sum = 0;
    for (int64_t n = threadIdx.x; n < count; n += kThreads) sum += terms[item * count + n];
    sum = block_reduce(sum, Sum());
    if (threadIdx.x == 0) store(out + item, sum / divisor);
  }
}

template <class T>
cudaError_t launch_item_sum(const compute_t<T>* terms, T* out, int64_t items, int64_t count,
                            compute_t<T> divisor, cudaStream_t stream) {
  return launch(stream, blocks_for(items, 1), item_sum_kernel<T>, terms, out, items, count,
                divisor);
}

}  // namespace crpt::cuda
