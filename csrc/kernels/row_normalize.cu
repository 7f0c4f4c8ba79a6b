// Rows to unit length and back: one warp per row.
#include "device.cuh"
#include "row_normalize.cuh"

namespace crpt::cuda {
namespace {

constexpr double kShortest =
    1e-12;  // shorter rows are divided by this, so that a zero row stays zero

template <class T, class A>
__global__ void row_normalize_kernel(const T* rows, A* unit, A* norm, int64_t count,
                                     int64_t width) {
  for (int64_t row = global_warp(); row < count; row += all_warps()) {
    const T* x = rows + row * width;
    A sum = 0;
    for (int64_t d = lane(); d < width; d += kWarp) {
      const A value = load(x + d);
      sum += value * value;
    }
    const A length = sqrt_of(warp_reduce(sum, Sum()));
    const A divisor = Max()(length, static_cast<A>(kShortest));
    for (int64_t d = lane(); d < width; d += kWarp) unit[row * width + d] = load(x + d) / divisor;
    if (lane() == 0) norm[row] = length;
  }
}

template <class A>
__global__ void row_normalize_backward_kernel(const A* grad, const A* unit, const A* norm, A* out,
                                              int64_t count, int64_t width) {
  for (int64_t row = global_warp(); row < count; row += all_warps()) {
    const A* g = grad + row * width;
    const A* u = unit + row * width;
    const A length = norm[row];
    const bool is_short = length < static_cast<A>(kShortest);
    A along = 0;
    if (!is_short) {
      for (int64_t d = lane(); d < width; d += kWarp) along += u[d] * g[d];
      along = warp_reduce(along, Sum());
    }
    const A divisor = is_short ? static_cast<A>(kShortest) : length;
    for (int64_t d = lane(); d < width; d += kWarp) {
      out[row * width + d] = (g[d] - u[d] * along) / divisor;
    }
  }
}

}  // namespace

cudaError_t launch_row_normalize(Dtype dtype, const void* rows, void* unit, void* norm,
                                 int64_t count, int64_t width, cudaStream_t stream) {
  return dispatch_floating(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    return launch(stream, blocks_for(count, kWarps), row_normalize_kernel<T, A>,
                  static_cast<const T*>(rows), static_cast<A*>(unit), static_cast<A*>(norm), count,
                  width);
  });
}

cudaError_t launch_row_normalize_backward(Dtype dtype, const void* grad, const void* unit,
                                          const void* norm, void* out, int64_t count, int64_t width,
                                          cudaStream_t stream) {
  return dispatch_compute(dtype, [&](auto type) {
    using A = typename decltype(type)::type;
    return launch(stream, blocks_for(count, kWarps), row_normalize_backward_kernel<A>,
                  static_cast<const A*>(grad), static_cast<const A*>(unit),
                  static_cast<const A*>(norm), static_cast<A*>(out), count, width);
  });
}

}  // namespace crpt::cuda
