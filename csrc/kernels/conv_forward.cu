// Convolutions as products of [pixels, channels] and [channels, 32] for each of nine places in the
// window, from a band of the image that lies in shared memory: read once, used nine times.
//
// Blocks stay, and walk over bands; the next band is copied while this one is computed. Floor on an
// H200 (4.1 TB/s copied, 39x39 to 37x37, B = 512): 92 MB in 22 us; products 12.9 GFLOP, at half of
// the 800 TFLOP/s of a GEMM, of which mma.sync reaches about 60%, 32 us. Measured there: 58 us,
// backwards to the inputs 60 us, and the first layer 60 us.
#include "conv_plan.cuh"

namespace crpt::cuda {
namespace {

constexpr int kBlockPixels = 64;  // of a warp: four tiles of 16
constexpr int kTiles = kBlockPixels / 16;

struct Weights {
  const float* data;
  int64_t o, i, y, x;  // strides

  __device__ float operator()(int to, int from, int dy, int dx) const {
    return data[to * o + from * i + dy * y + dx * x];
  }
};

// B fragments of every place of the window, in the order in which they are used: [9, K / 16, 2]
// packs of a warp, each the fragments of two of four tiles of 8 columns.
//
// Column n of tile j is channel 8 (n / 2) + 2 j + n % 2: so what a lane has of a pixel in the end,
// columns 2q and 2q + 1 of every tile, are eight neighbours, 8 q and following.
template <class X, bool kBackward>
__device__ void pack_weights(uint4* packs, const Weights& weights, int channels, float scale) {
  constexpr int kSteps = X::kChannels / 16;
  const int step = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < 9 * kSteps * 2 * kWarp; i += step) {
    const int lane = i % kWarp, half = i / kWarp % 2, k = i / kWarp / 2 % kSteps;
    const int window = i / kWarp / 2 / kSteps;
    const int g = lane / 4, q = lane % 4;
    unsigned r[4];
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int tile = 2 * half + part / 2, row = 16 * k + 2 * q + 8 * (part % 2);
      const int column = 8 * (g / 2) + 2 * tile + g % 2;
      float value[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int dy = window / 3, dx = window % 3;
        value[j] = row + j >= channels ? 0.0F
                   : kBackward         ? weights(row + j, column, 2 - dy, 2 - dx)
                                       : weights(column, row + j, dy, dx);
      }
      r[part] = pack_bf16(value[0] * scale, value[1] * scale);
    }
    packs[i] = uint4{r[0], r[1], r[2], r[3]};
  }
}

// Sums of a warp's 64 pixels, from `first` on, over the window and the channels.
template <class X>
__device__ void convolve(float (&sum)[kTiles][4][4], const std::byte* tile, const uint4* packs,
                         const int* places, int first, int tile_width) {
  constexpr int kSteps = X::kChannels / 16;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int place[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) place[t] = places[first + 16 * t + lane % 16];
#pragma unroll
  for (int window = 0; window < 9; ++window) {
    const int moved = window / 3 * tile_width + window % 3;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const uint4 low = packs[(window * kSteps + k) * 2 * kWarp + lane];
      const uint4 high = packs[(window * kSteps + k) * 2 * kWarp + kWarp + lane];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        unsigned a[4];
        load_matrices(a, tile + X::offset(place[t] + moved, 2 * k + lane / 16));
        multiply_add(sum[t][0], a, low.x, low.y);
        multiply_add(sum[t][1], a, low.z, low.w);
        multiply_add(sum[t][2], a, high.x, high.y);
        multiply_add(sum[t][3], a, high.z, high.w);
      }
    }
  }
}

// Unlike fmax it keeps a NaN.
__device__ inline float relu(float x) { return x < 0.0F ? 0.0F : x; }

// The halves of a pair whose counterpart is above 0.
__device__ inline unsigned where_positive(unsigned pair, unsigned x) {
  const unsigned low = (x & 0x8000u) == 0 && (x & 0xffffu) != 0 ? 0xffffu : 0u;
  const unsigned high = (x >> 31) == 0 && (x >> 16) != 0 ? 0xffff0000u : 0u;
  return pair & (low | high);
}

// Pixel `half` of tile t that a lane has eight channels of, 8 q and following.
__device__ inline int pixel_of(int first, int t, int half) {
  return first + 16 * t + 8 * half + static_cast<int>(threadIdx.x) % kWarp / 4;
}
__device__ inline int channel_of_lane() { return static_cast<int>(threadIdx.x) % 4 * 8; }

__device__ inline void store_relu(const float (&sum)[kTiles][4][4], const float (&bias)[8],
                                  bf16* out, int first, int pixels) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = pixel_of(first, t, half);
      if (pixel >= pixels) continue;
      unsigned r[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        r[j] = pack_bf16(relu(sum[t][j][2 * half] + bias[2 * j]),
                         relu(sum[t][j][2 * half + 1] + bias[2 * j + 1]));
      }
      *reinterpret_cast<uint4*>(out + pixel * 32 + channel_of_lane()) =
          uint4{r[0], r[1], r[2], r[3]};
    }
  }
}

__device__ inline void store_where_positive(const float (&sum)[kTiles][4][4], const bf16* mask,
                                            bf16* out, int first, int pixels) {
  // All of them first, so that their ways overlap.
  uint4 masks[kTiles][2];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = pixel_of(first, t, half);
      masks[t][half] = uint4{0, 0, 0, 0};
      if (pixel < pixels) {
        masks[t][half] = *reinterpret_cast<const uint4*>(mask + pixel * 32 + channel_of_lane());
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = pixel_of(first, t, half);
      if (pixel >= pixels) continue;
      const unsigned m[4] = {masks[t][half].x, masks[t][half].y, masks[t][half].z,
                             masks[t][half].w};
      unsigned r[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        r[j] = where_positive(pack_bf16(sum[t][j][2 * half], sum[t][j][2 * half + 1]), m[j]);
      }
      *reinterpret_cast<uint4*>(out + pixel * 32 + channel_of_lane()) =
          uint4{r[0], r[1], r[2], r[3]};
    }
  }
}

// A lane's eight of 32.
__device__ inline void load_bias(float (&bias)[8], const float* from) {
#pragma unroll
  for (int j = 0; j < 8; ++j) bias[j] = from[8 * (threadIdx.x % 4) + j];
}

// The tile under a band: its rows and two more, two more columns; with kBackward two of zeros on
// every side of the image, those at the left and at the right once for all by clear_sides.
template <bool kBackward>
__device__ void copy_tile(std::byte* to, const bf16* in, const ConvBands& bands, int number) {
  const ConvTile tile(bands, number);
  const int tile_width = bands.width + 2;
  if constexpr (!kBackward) {
    const int64_t row = tile.image * (bands.height + 2) + tile.first;
    const int packs = (tile.rows + 2) * tile_width * 4;
    copy_run(to, in + row * tile_width * 32, packs, packs);
    return;
  }
  const int height = bands.height - 2, width = bands.width - 2;
  const bf16* image = in + tile.image * height * width * 32;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int row = warp; row < tile.rows + 2; row += kWarps) {
    const int y = tile.first + row - 2, pixel = row * tile_width + 2;
    const bool inside = 0 <= y && y < height;
    const bf16* from = image + (inside ? y * width * 32 : 0);
#pragma unroll 4
    for (int i = lane; i < width * 4; i += kWarp) {
      copy_pack(to + Wide::offset(pixel + (i >> 2), i & 3), from + i * 8, inside);
    }
  }
}

// Zeros where no band has a pixel: two columns on either side of the rows of a tile.
__device__ inline void clear_sides(std::byte* tile, const ConvBands& bands) {
  for (int i = static_cast<int>(threadIdx.x); i < (bands.rows + 2) * 16; i += kThreads) {
    const int column = i / 4 % 4, x = column < 2 ? column : bands.width - 2 + column;
    const int pixel = i / 16 * (bands.width + 2) + x;
    *reinterpret_cast<uint4*>(tile + Wide::offset(pixel, i % 4)) = uint4{0, 0, 0, 0};
  }
}

// Shared memory: packs of weights, places, two tiles.
constexpr int kWidePacks = 9 * 2 * 2 * kWarp, kNarrowPacks = 9 * 2 * kWarp;

template <bool kBackward>
__global__ void __launch_bounds__(kThreads, 2)
    conv_kernel(const bf16* in, const bf16* masked, Weights weights, const float* bias, bf16* out,
                ConvBands bands) {
  auto* packs = reinterpret_cast<uint4*>(shared_memory());
  auto* places = reinterpret_cast<int*>(packs + kWidePacks);
  auto* tiles = reinterpret_cast<std::byte*>(places + kMostPixels);
  const int tile_bytes = (bands.rows + 2) * (bands.width + 2) * 64;
  const int warp_first = static_cast<int>(threadIdx.x) / kWarp * kBlockPixels;

  int number = static_cast<int>(blockIdx.x);
  const int step = static_cast<int>(gridDim.x);
  if (number < bands.tiles) copy_tile<kBackward>(tiles, in, bands, number);
  end_group_of_copies();
  if (kBackward) {
    clear_sides(tiles, bands);
    clear_sides(tiles + tile_bytes, bands);
  }
  pack_weights<Wide, kBackward>(packs, weights, Wide::kChannels, 1.0F);
  place_pixels(places, bands, bands.width + 2, 1);
  float own_bias[8] = {};
  if (!kBackward) load_bias(own_bias, bias);

  for (int stage = 0; number < bands.tiles; number += step, stage ^= 1) {
    const int next = number + step;
    if (next < bands.tiles) {
      copy_tile<kBackward>(tiles + (stage ^ 1) * tile_bytes, in, bands, next);
    }
    end_group_of_copies();
    wait_for_copies<1>();
    __syncthreads();
    const ConvTile tile(bands, number);
    const int64_t at = (tile.image * bands.height + tile.first) * bands.width * 32;
    for (int first = warp_first; first < tile.pixels; first += kWarps * kBlockPixels) {
      float sum[kTiles][4][4] = {};
      convolve<Wide>(sum, tiles + stage * tile_bytes, packs, places, first, bands.width + 2);
      if constexpr (kBackward) {
        store_where_positive(sum, masked + at, out + at, first, tile.pixels);
      } else {
        store_relu(sum, own_bias, out + at, first, tile.pixels);
      }
    }
    __syncthreads();
  }
}

// The pixels are converted on their way, so that nothing is copied ahead: other blocks of the same
// multiprocessor compute meanwhile.
__global__ void __launch_bounds__(kThreads, 2)
    conv_pixels_kernel(const uint8_t* images, Weights weights, const float* bias, bf16* out,
                       int channels, int in_height, int in_width, ConvBands bands) {
  auto* packs = reinterpret_cast<uint4*>(shared_memory());
  auto* places = reinterpret_cast<int*>(packs + kNarrowPacks);
  auto* pixels = reinterpret_cast<std::byte*>(places + kMostPixels);
  const int warp_first = static_cast<int>(threadIdx.x) / kWarp * kBlockPixels;
  pack_weights<Narrow, false>(packs, weights, channels, 1.0F / 255.0F);
  place_pixels(places, bands, in_width, 2);
  float own_bias[8];
  load_bias(own_bias, bias);

  for (int number = static_cast<int>(blockIdx.x); number < bands.tiles;
       number += static_cast<int>(gridDim.x)) {
    const ConvTile tile(bands, number);
    read_pixels(pixels, images + tile.image * channels * in_height * in_width, channels, in_height,
                in_width, 2 * tile.first, 2 * tile.rows + 1);
    __syncthreads();
    const int64_t at = (tile.image * bands.height + tile.first) * bands.width * 32;
    for (int first = warp_first; first < tile.pixels; first += kWarps * kBlockPixels) {
      float sum[kTiles][4][4] = {};
      convolve<Narrow>(sum, pixels, packs, places, first, in_width);
      store_relu(sum, own_bias, out + at, first, tile.pixels);
    }
    __syncthreads();
  }
}

template <bool kBackward>
cudaError_t launch_either(const void* in, const void* masked, const Weights& weights,
                          const float* bias, void* out, int64_t batch, int64_t height,
                          int64_t width, int64_t blocks, cudaStream_t stream) {
  if (width > kLongestConvRow) return cudaErrorInvalidValue;
  ConvBands bands(batch, height, width, 1);
  Shape shape{static_cast<unsigned>(blocks)};
  const cudaError_t error = plan_bands(
      conv_kernel<kBackward>, batch, height, width,
      [](const ConvBands& b) {
        return kWidePacks * int64_t{16} + kMostPixels * int64_t{4} +
               int64_t{2} * (b.rows + 2) * (b.width + 2) * 64;
      },
      &bands, &shape.shared);
  if (error != cudaSuccess) return error;
  return launch(stream, shape, conv_kernel<kBackward>, static_cast<const bf16*>(in),
                static_cast<const bf16*>(masked), weights, bias, static_cast<bf16*>(out), bands);
}

}  // namespace

cudaError_t launch_conv(const void* in, const float* weight, int64_t weight_o, int64_t weight_i,
                        int64_t weight_y, int64_t weight_x, const float* bias, void* out,
                        int64_t batch, int64_t height, int64_t width, int64_t blocks,
                        cudaStream_t stream) {
  return launch_either<false>(in, nullptr, {weight, weight_o, weight_i, weight_y, weight_x}, bias,
                              out, batch, height, width, blocks, stream);
}

cudaError_t launch_conv_backward_in(const void* grad, const void* in, const float* weight,
                                    int64_t weight_o, int64_t weight_i, int64_t weight_y,
                                    int64_t weight_x, void* grad_in, int64_t batch, int64_t height,
                                    int64_t width, int64_t blocks, cudaStream_t stream) {
  return launch_either<true>(grad, in, {weight, weight_o, weight_i, weight_y, weight_x}, nullptr,
                             grad_in, batch, height + 2, width + 2, blocks, stream);
}

cudaError_t launch_conv_pixels(const uint8_t* images, const float* weight, int64_t weight_o,
                               int64_t weight_i, int64_t weight_y, int64_t weight_x,
                               const float* bias, void* out, int64_t batch, int64_t channels,
                               int64_t in_height, int64_t in_width, int64_t blocks,
                               cudaStream_t stream) {
  const int64_t height = (in_height - 3) / 2 + 1, width = (in_width - 3) / 2 + 1;
  if (width > kLongestConvRow || channels > kMostPixelChannels) return cudaErrorInvalidValue;
  ConvBands bands(batch, height, width, 1);
  Shape shape{static_cast<unsigned>(blocks)};
  const cudaError_t error = plan_bands(
      conv_pixels_kernel, batch, height, width,
      [=](const ConvBands& b) {
        return kNarrowPacks * int64_t{16} + kMostPixels * int64_t{4} +
               Narrow::bytes((2 * int64_t{b.rows} + 1) * in_width);
      },
      &bands, &shape.shared);
  if (error != cudaSuccess) return error;
  return launch(stream, shape, conv_pixels_kernel, images,
                Weights{weight, weight_o, weight_i, weight_y, weight_x}, bias,
                static_cast<bf16*>(out), static_cast<int>(channels), static_cast<int>(in_height),
                static_cast<int>(in_width), bands);
}

}  // namespace crpt::cuda
