// Matrices transposed and cast on their way through shared memory, by tiles of 32 x 32.
//
// Floor on an H200 (4.1 TB/s copied), 128 x 32 x 1225 from float32 to bf16: 30 MB in 7 us.
// Measured there: 17 us.
#include "device.cuh"
#include "reorder.cuh"

namespace crpt::cuda {
namespace {

constexpr int kTile = 32;

template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
    reorder_kernel(const In* in, Out* out, int64_t tiles, int64_t rows, int64_t columns) {
  __shared__ float tile[kTile][kTile + 1];  // one more: no two rows of a column in one bank
  const int64_t across = ceil_div(columns, kTile), down = ceil_div(rows, kTile);
  const int own = static_cast<int>(threadIdx.x) % kTile;
  const int first = static_cast<int>(threadIdx.x) / kTile;
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int64_t column = i % across * kTile, row = i / across % down * kTile;
    const int64_t matrix = i / across / down * rows * columns;
    float value[kTile * kTile / kThreads];  // all of them on their way at once
#pragma unroll
    for (int k = 0; k < kTile * kTile / kThreads; ++k) {
      const int y = first + k * (kThreads / kTile);
      const bool inside = row + y < rows && column + own < columns;
      value[k] = inside ? load(in + matrix + (row + y) * columns + column + own) : 0.0F;
    }
#pragma unroll
    for (int k = 0; k < kTile * kTile / kThreads; ++k) {
      tile[first + k * (kThreads / kTile)][own] = value[k];
    }
    __syncthreads();
    for (int y = first; y < kTile; y += kThreads / kTile) {
      if (column + y < columns && row + own < rows) {
        store(out + matrix + (column + y) * rows + row + own, tile[own][y]);
      }
    }
    __syncthreads();
  }
}

template <class Function>
cudaError_t dispatch_either(Dtype dtype, Function function) {
  if (dtype == Dtype::kFloat32) return function(Type<float>{});
  if (dtype == Dtype::kBFloat16) return function(Type<__nv_bfloat16>{});
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_reorder(Dtype in_dtype, Dtype out_dtype, const void* in, void* out,
                           int64_t count, int64_t rows, int64_t columns, cudaStream_t stream) {
  const int64_t tiles = count * ceil_div(rows, kTile) * ceil_div(columns, kTile);
  return dispatch_either(in_dtype, [&](auto from) {
    return dispatch_either(out_dtype, [&](auto to) {
      using In = typename decltype(from)::type;
      using Out = typename decltype(to)::type;
      return launch(stream, blocks_for(tiles, 1), reorder_kernel<In, Out>,
                    static_cast<const In*>(in), static_cast<Out*>(out), tiles, rows, columns);
    });
  });
}

}  // namespace crpt::cuda
