// Gradients of a convolution's weights: for each of nine places in the window the product of grad,
// [32, pixels], and of the pixels that the window moves there, [pixels, channels], both from bands
// that lie in shared memory.
//
// Twelve warps: three for the window's rows, times four that share the pixels. Sums stay in
// registers while a block walks over its bands, and only in the end come together, in a fixed
// order. Floor on an H200 (4.1 TB/s copied, 39x39 and 37x37, B = 512): 95 MB in 23 us;
// products 12.9 GFLOP, 32 us at half of a GEMM's rate. Measured there: 63 us,
// and the first layer 75 us.
#include "conv_plan.cuh"

namespace crpt::cuda {
namespace {

constexpr int kWindowRows = 3, kShares = 4;
constexpr int kBackwardThreads = kWindowRows * kShares * kWarp;
constexpr unsigned kOnes = 0x3f803f80u;  // two of bf16

template <class X>
constexpr int kPartial = 32 * 9 * X::kChannels + 32;

// A warp's sums: window row dy, dx = 0 .. 2; [32, channels] as two times kChannels / 8 tiles.
template <class X>
struct Sums {
  float weight[3][2][X::kChannels / 8][4] = {};
  float bias[2][4] = {};  // every column the same
};

// grad: [pixels, 32] of a band, then zeros up to the next 16; in: the tile under it.
template <class X>
__device__ void accumulate(Sums<X>& sums, const std::byte* grad, const std::byte* in,
                           const int* places, int pixels, int tile_width) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int dy = warp % kWindowRows, share = warp / kWindowRows;
  // Which 8x8 matrix, and which of its rows, the lane gives the address of.
  const int matrix = lane / 8, row = lane % 8;
  for (int first = 16 * share; first < pixels; first += 16 * kShares) {
    unsigned a[2][4];
    const int from_grad = first + row + 8 * (matrix / 2);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      load_transposed(a[m], grad + Wide::offset(from_grad, 2 * m + matrix % 2));
    }
    if (dy == 0) {
      multiply_add(sums.bias[0], a[0], kOnes, kOnes);
      multiply_add(sums.bias[1], a[1], kOnes, kOnes);
    }
    const int from_in = first + row + 8 * (matrix % 2);
    // Where grad is 0 for want of pixels, any pixel that is there.
    const int place = (from_in < pixels ? places[from_in] : 0) + dy * tile_width;
#pragma unroll
    for (int dx = 0; dx < 3; ++dx) {
#pragma unroll
      for (int pair = 0; pair < X::kChannels / 16; ++pair) {
        unsigned b[4];
        load_transposed(b, in + X::offset(place + dx, 2 * pair + matrix / 2));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add(sums.weight[dx][m][2 * pair], a[m], b[0], b[1]);
          multiply_add(sums.weight[dx][m][2 * pair + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

// Adds the warps' sums up in shared memory, one share after the other, and writes them out.
template <class X>
__device__ void store_sums(const Sums<X>& sums, float* total, float scale, float* partial,
                           int64_t partial_row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, q = lane % 4;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int dy = warp % kWindowRows;
  for (int share = 0; share < kShares; ++share) {
    __syncthreads();
    if (warp / kWindowRows != share) continue;
    const auto add = [&](int at, float x) { total[at] = share == 0 ? x : total[at] + x; };
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int o = 16 * m + g + 8 * (i / 2);
#pragma unroll
        for (int dx = 0; dx < 3; ++dx) {
#pragma unroll
          for (int n = 0; n < X::kChannels / 8; ++n) {
            const int channel = 8 * n + 2 * q + i % 2;
            add(((o * 3 + dy) * 3 + dx) * X::kChannels + channel, sums.weight[dx][m][n][i] * scale);
          }
        }
        if (dy == 0 && q == 0 && i % 2 == 0) add(32 * 9 * X::kChannels + o, sums.bias[m][i]);
      }
    }
  }
  __syncthreads();
  float* own = partial + blockIdx.x * partial_row;
  for (int i = static_cast<int>(threadIdx.x); i < kPartial<X>; i += static_cast<int>(blockDim.x)) {
    own[i] = total[i];
  }
}

// Bytes of a band of grad: its pixels up to the next 16.
__host__ __device__ inline int grad_bytes(const ConvBands& bands) {
  return (bands.rows * bands.width + 15) / 16 * 16 * 64;
}

__device__ inline void copy_grad(std::byte* to, const bf16* grad, const ConvBands& bands,
                                 const ConvTile& tile) {
  const int64_t at = (tile.image * bands.height + tile.first) * bands.width * 32;
  copy_run(to, grad + at, tile.pixels * 4, (tile.pixels + 15) / 16 * 64);
}

// Shared memory: places, two stages of grad and in; in the end the sums.
__global__ void __launch_bounds__(kBackwardThreads, 1)
    conv_backward_weight_kernel(const bf16* grad, const bf16* in, float* partial,
                                int64_t partial_row, ConvBands bands) {
  auto* places = reinterpret_cast<int*>(shared_memory());
  auto* stages = reinterpret_cast<std::byte*>(places + kMostPixels);
  const int tile_width = bands.width + 2, of_grad = grad_bytes(bands);
  const int of_stage = of_grad + (bands.rows + 2) * tile_width * 64;
  const auto copy = [&](int stage, int number) {
    const ConvTile tile(bands, number);
    std::byte* to = stages + stage * of_stage;
    copy_grad(to, grad, bands, tile);
    const int64_t row = tile.image * (bands.height + 2) + tile.first;
    const int packs = (tile.rows + 2) * tile_width * 4;
    copy_run(to + of_grad, in + row * tile_width * 32, packs, packs);
  };
  int number = static_cast<int>(blockIdx.x);
  const int step = static_cast<int>(gridDim.x);
  if (number < bands.tiles) copy(0, number);
  end_group_of_copies();
  place_pixels(places, bands, tile_width, 1);
  Sums<Wide> sums;
  for (int stage = 0; number < bands.tiles; number += step, stage ^= 1) {
    const int next = number + step;
    if (next < bands.tiles) copy(stage ^ 1, next);
    end_group_of_copies();
    wait_for_copies<1>();
    __syncthreads();
    const std::byte* at = stages + stage * of_stage;
    accumulate<Wide>(sums, at, at + of_grad, places, ConvTile(bands, number).pixels, tile_width);
    __syncthreads();
  }
  wait_for_copies<0>();
  store_sums<Wide>(sums, reinterpret_cast<float*>(stages), 1.0F, partial, partial_row);
}

// The pixels are converted on their way; other blocks of the multiprocessor compute meanwhile.
__global__ void __launch_bounds__(kBackwardThreads, 2)
    conv_pixels_backward_weight_kernel(const bf16* grad, const uint8_t* images, float* partial,
                                       int64_t partial_row, int channels, int in_height,
                                       int in_width, ConvBands bands) {
  auto* places = reinterpret_cast<int*>(shared_memory());
  auto* of_grad = reinterpret_cast<std::byte*>(places + kMostPixels);
  auto* pixels = of_grad + grad_bytes(bands);
  place_pixels(places, bands, in_width, 2);
  Sums<Narrow> sums;
  for (int number = static_cast<int>(blockIdx.x); number < bands.tiles;
       number += static_cast<int>(gridDim.x)) {
    const ConvTile tile(bands, number);
    copy_grad(of_grad, grad, bands, tile);
    end_group_of_copies();
    read_pixels(pixels, images + tile.image * channels * in_height * in_width, channels, in_height,
                in_width, 2 * tile.first, 2 * tile.rows + 1);
    wait_for_copies<0>();
    __syncthreads();
    accumulate<Narrow>(sums, of_grad, pixels, places, tile.pixels, in_width);
    __syncthreads();
  }
  store_sums<Narrow>(sums, reinterpret_cast<float*>(of_grad), 1.0F / 255.0F, partial, partial_row);
}

int64_t at_least(int64_t bytes, int64_t least) { return bytes < least ? least : bytes; }

}  // namespace

cudaError_t launch_conv_backward_weight(const void* grad, const void* in, float* partial,
                                        int64_t partial_row, int64_t batch, int64_t height,
                                        int64_t width, int64_t blocks, cudaStream_t stream) {
  if (width > kLongestConvRow) return cudaErrorInvalidValue;
  ConvBands bands(batch, height, width, 1);
  Shape shape{static_cast<unsigned>(blocks), kBackwardThreads};
  const cudaError_t error = plan_bands(
      conv_backward_weight_kernel, batch, height, width,
      [](const ConvBands& b) {
        const int64_t in = int64_t{b.rows + 2} * (b.width + 2) * 64;
        return kMostPixels * int64_t{4} +
               at_least(2 * (grad_bytes(b) + in), kPartial<Wide> * int64_t{4});
      },
      &bands, &shape.shared);
  if (error != cudaSuccess) return error;
  return launch(stream, shape, conv_backward_weight_kernel, static_cast<const bf16*>(grad),
                static_cast<const bf16*>(in), partial, partial_row, bands);
}

cudaError_t launch_conv_pixels_backward_weight(const void* grad, const uint8_t* images,
                                               float* partial, int64_t partial_row, int64_t batch,
                                               int64_t channels, int64_t in_height,
                                               int64_t in_width, int64_t blocks,
                                               cudaStream_t stream) {
  const int64_t height = (in_height - 3) / 2 + 1, width = (in_width - 3) / 2 + 1;
  if (width > kLongestConvRow || channels > kMostPixelChannels) return cudaErrorInvalidValue;
  ConvBands bands(batch, height, width, 1);
  Shape shape{static_cast<unsigned>(blocks), kBackwardThreads};
  const cudaError_t error = plan_bands(
      conv_pixels_backward_weight_kernel, batch, height, width,
      [=](const ConvBands& b) {
        const int64_t in = Narrow::bytes((2 * int64_t{b.rows} + 1) * in_width);
        return kMostPixels * int64_t{4} +
               at_least(grad_bytes(b) + in, kPartial<Narrow> * int64_t{4});
      },
      &bands, &shape.shared);
  if (error != cudaSuccess) return error;
  return launch(stream, shape, conv_pixels_backward_weight_kernel, static_cast<const bf16*>(grad),
                images, partial, partial_row, static_cast<int>(channels),
                static_cast<int>(in_height), static_cast<int>(in_width), bands);
}

}  // namespace crpt::cuda
