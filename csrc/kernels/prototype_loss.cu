// Cross-entropy between codes and softmax(scores / T): one warp per sample, then one block per
// item.
#include "item_sum.cuh"
#include "prototype_loss.cuh"

namespace crpt::cuda {
namespace {

// The row's largest score. What follows is relative to it, so that a common offset loses nothing.
template <class A, class T>
__device__ A row_top(const T* scores, int64_t prototypes) {
  A top = lowest<A>();
  for (int64_t m = lane(); m < prototypes; m += kWarp) top = Max()(top, load(scores + m));
  return warp_reduce(top, Max());
}

template <class T, class A>
__global__ void prototype_loss_rows_kernel(const T* scores, const T* codes, A* logsumexp,
                                           A* row_loss, int64_t rows, int64_t prototypes,
                                           A temperature) {
  for (int64_t row = global_warp(); row < rows; row += all_warps()) {
    const T* s = scores + row * prototypes;
    const T* q = codes + row * prototypes;
    const A top = row_top<A>(s, prototypes);
    A sum = 0;
    for (int64_t m = lane(); m < prototypes; m += kWarp) {
      sum += exp_of((load(s + m) - top) / temperature);
    }
    const A log_total = log_of(warp_reduce(sum, Sum()));
    A loss = 0;
    for (int64_t m = lane(); m < prototypes; m += kWarp) {
      loss -= load(q + m) * ((load(s + m) - top) / temperature - log_total);
    }
    loss = warp_reduce(loss, Sum());
    if (lane() == 0) {
      logsumexp[row] = log_total;
      row_loss[row] = loss;
    }
  }
}

template <class T, class A>
__global__ void prototype_loss_backward_scores_kernel(const A* grad, const T* scores,
                                                      const T* codes, const A* logsumexp, T* out,
                                                      int64_t rows, int64_t batch,
                                                      int64_t prototypes, A temperature) {
  for (int64_t row = global_warp(); row < rows; row += all_warps()) {
    const T* s = scores + row * prototypes;
    const T* q = codes + row * prototypes;
    const A top = row_top<A>(s, prototypes);
    A mass = 0, sum = 0;
    for (int64_t m = lane(); m < prototypes; m += kWarp) {
      mass += load(q + m);
      sum += exp_of((load(s + m) - top) / temperature - logsumexp[row]);
    }
    // The sum of p is 1 but for rounding; dividing by it makes the gradients of a row sum to 0.
    mass = warp_reduce(mass, Sum()) / warp_reduce(sum, Sum());
    const A factor = grad[row / batch] / (temperature * static_cast<A>(batch));
    for (int64_t m = lane(); m < prototypes; m += kWarp) {
      const A p = exp_of((load(s + m) - top) / temperature - logsumexp[row]);
      store(out + row * prototypes + m, factor * (p * mass - load(q + m)));
    }
  }
}

template <class T, class A>
__global__ void prototype_loss_backward_codes_kernel(const A* grad, const T* scores,
                                                     const A* logsumexp, T* out, int64_t rows,
                                                     int64_t batch, int64_t prototypes,
                                                     A temperature) {
  for (int64_t row = global_warp(); row < rows; row += all_warps()) {
    const T* s = scores + row * prototypes;
    const A top = row_top<A>(s, prototypes);
    const A factor = -grad[row / batch] / static_cast<A>(batch);
    for (int64_t m = lane(); m < prototypes; m += kWarp) {
      store(out + row * prototypes + m,
            factor * ((load(s + m) - top) / temperature - logsumexp[row]));
    }
  }
}

}  // namespace

cudaError_t launch_prototype_loss(Dtype dtype, const void* scores, const void* codes, void* loss,
                                  void* logsumexp, void* row_loss, int64_t items, int64_t batch,
                                  int64_t prototypes, double temperature, cudaStream_t stream) {
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    const cudaError_t error = launch(
        stream, blocks_for(items * batch, kWarps), prototype_loss_rows_kernel<T, A>,
        static_cast<const T*>(scores), static_cast<const T*>(codes), static_cast<A*>(logsumexp),
        static_cast<A*>(row_loss), items * batch, prototypes, static_cast<A>(temperature));
    if (error != cudaSuccess) return error;
    return launch_item_sum(static_cast<const A*>(row_loss), static_cast<T*>(loss), items, batch,
                           static_cast<A>(batch), stream);
  });
}

cudaError_t launch_prototype_loss_backward_scores(Dtype dtype, const void* grad, const void* scores,
                                                  const void* codes, const void* logsumexp,
                                                  void* out, int64_t items, int64_t batch,
                                                  int64_t prototypes, double temperature,
                                                  cudaStream_t stream) {
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    return launch(stream, blocks_for(items * batch, kWarps),
                  prototype_loss_backward_scores_kernel<T, A>, static_cast<const A*>(grad),
                  static_cast<const T*>(scores), static_cast<const T*>(codes),
                  static_cast<const A*>(logsumexp), static_cast<T*>(out), items * batch, batch,
                  prototypes, static_cast<A>(temperature));
  });
}

cudaError_t launch_prototype_loss_backward_codes(Dtype dtype, const void* grad, const void* scores,
                                                 const void* logsumexp, void* out, int64_t items,
                                                 int64_t batch, int64_t prototypes,
                                                 double temperature, cudaStream_t stream) {
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    return launch(stream, blocks_for(items * batch, kWarps),
                  prototype_loss_backward_codes_kernel<T, A>, static_cast<const A*>(grad),
                  static_cast<const T*>(scores), static_cast<const A*>(logsumexp),
                  static_cast<T*>(out), items * batch, batch, prototypes,
                  static_cast<A>(temperature));
  });
}

}  // namespace crpt::cuda
