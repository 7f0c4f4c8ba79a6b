// What forward and backward kernels of the convolutions share: bands of rows, and how the pixels
// under a band lie in shared memory.
#pragma once

#include "conv.cuh"
#include "mma.cuh"

namespace crpt::cuda {

constexpr int kMostPixels = static_cast<int>(kLongestConvRow);  // of a band

// The rows of B results of height x width pixels, cut into bands of at most 512 pixels and of as
// equal heights as can be. Tile t is band t % bands of image t / bands.
struct ConvBands {
  int height, width, rows, bands;
  int tiles;

  ConvBands(int64_t batch, int64_t result_height, int64_t result_width, int64_t most_rows)
      : height(static_cast<int>(result_height)), width(static_cast<int>(result_width)) {
    int64_t most = kLongestConvRow / result_width;
    most = most < most_rows ? most : most_rows;
    most = most < 1 ? 1 : most;
    bands = static_cast<int>(ceil_div(result_height, most));
    rows = static_cast<int>(ceil_div(result_height, bands));
    bands = static_cast<int>(ceil_div(result_height, rows));
    tiles = static_cast<int>(batch * bands);
  }
};

struct ConvTile {
  int64_t image;
  int first, rows, pixels;  // of the result

  __device__ ConvTile(const ConvBands& bands, int tile) {
    // Of 32 bits: a division of 64 takes as long as a tenth of the tile.
    const unsigned of = static_cast<unsigned>(tile) / static_cast<unsigned>(bands.bands);
    image = of;
    first = (tile - static_cast<int>(of) * bands.bands) * bands.rows;
    rows = bands.height - first < bands.rows ? bands.height - first : bands.rows;
    pixels = rows * bands.width;
  }
};

// Where 16 bytes of a pixel's channels lie, so that those of eight neighbours, with a stride of one
// for 32 channels and of two for 16, are in eight different banks: places are exchanged within 64
// bytes, so that a tile is a whole number of those.
struct Wide {
  static constexpr int kChannels = 32, kPacks = 4, kStride = 1;
  __device__ static int offset(int pixel, int pack) {
    return pixel * 64 + ((pack ^ (pixel >> 1 & 3)) << 4);
  }
};
struct Narrow {
  static constexpr int kChannels = 16, kPacks = 2, kStride = 2;
  __device__ static int offset(int pixel, int pack) {
    return ((pixel * 2 + pack) ^ (pixel >> 2 & 3)) << 4;
  }
  __host__ __device__ static int64_t bytes(int64_t pixels) { return (pixels + 1) / 2 * 64; }
};

// places[p]: which pixel of the tile under a band is the first one under pixel p of the band.
__device__ inline void place_pixels(int* places, const ConvBands& bands, int tile_width,
                                    int stride) {
  for (int p = static_cast<int>(threadIdx.x); p < kMostPixels; p += static_cast<int>(blockDim.x)) {
    const int y = p / bands.width, x = p - y * bands.width;
    places[p] = p < bands.rows * bands.width ? (y * tile_width + x) * stride : 0;
  }
}

// Pixels of a contiguous run, then zeros: `count` packs of four to a pixel, `valid` of them read.
__device__ inline void copy_run(std::byte* tile, const bf16* from, int valid, int count) {
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const bool inside = i < valid;
    copy_pack(tile + Wide::offset(i >> 2, i & 3), from + (inside ? i * 8 : 0), inside);
  }
}

// Two bytes as two bf16, exactly: their floats have no more than eight significant bits.
__device__ inline unsigned bf16_of_bytes(unsigned low, unsigned high) {
  return __byte_perm(__float_as_uint(static_cast<float>(low)),
                     __float_as_uint(static_cast<float>(high)), 0x7632u);
}

// Rows [first, first + rows) of an image's planes as pixels of 16 bf16 channels, 0 to 255.
__device__ inline void read_pixels(std::byte* tile, const uint8_t* image, int channels, int height,
                                   int width, int first, int rows) {
  const int plane = height * width, step = static_cast<int>(blockDim.x);
  if (width % 4 == 0 && reinterpret_cast<uintptr_t>(image) % 4 == 0) {
    const int quads = rows * width / 4;
    for (int i = static_cast<int>(threadIdx.x); i < quads; i += step) {
      unsigned word[Narrow::kChannels];
#pragma unroll
      for (int c = 0; c < Narrow::kChannels; ++c) {
        const uint8_t* at = image + static_cast<int64_t>(c) * plane + first * width + 4 * i;
        word[c] = c < channels ? *reinterpret_cast<const unsigned*>(at) : 0;
      }
#pragma unroll
      for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int pack = 0; pack < 2; ++pack) {
          unsigned r[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const int c = 8 * pack + 2 * j;
            r[j] = bf16_of_bytes(word[c] >> 8 * k & 255u, word[c + 1] >> 8 * k & 255u);
          }
          *reinterpret_cast<uint4*>(tile + Narrow::offset(4 * i + k, pack)) =
              uint4{r[0], r[1], r[2], r[3]};
        }
      }
    }
    return;
  }
  for (int i = static_cast<int>(threadIdx.x); i < rows * width; i += step) {
    for (int pack = 0; pack < 2; ++pack) {
      unsigned r[4];
      for (int j = 0; j < 4; ++j) {
        unsigned value[2];
        for (int k = 0; k < 2; ++k) {
          const int c = 8 * pack + 2 * j + k;
          const uint8_t* at = image + static_cast<int64_t>(c) * plane + first * width + i;
          value[k] = c < channels ? *at : 0u;
        }
        r[j] = bf16_of_bytes(value[0], value[1]);
      }
      *reinterpret_cast<uint4*>(tile + Narrow::offset(i, pack)) = uint4{r[0], r[1], r[2], r[3]};
    }
  }
}

}  // namespace crpt::cuda
