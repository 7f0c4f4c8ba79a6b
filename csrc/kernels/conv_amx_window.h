// Convolutions of images of 32 channels by tiles: a pixel of 32 bf16 is a row of one, so that 16
// neighbours are a factor as they lie in memory.
#pragma once

#include "kernels/amx_tiles.h"
#include "kernels/conv_values.h"

namespace crpt::CRPT_ISA {
namespace {

constexpr int64_t kBlock = 2 * kTileRows;  // pixels of a block of sums: two tiles by two

// Weights as a product's second factor: [tap, half of the channels out, pair of channels in].
struct TileWindow {
  Pairs weights[9][2][kTileRows];
};

// of(out, in, dy, dx) is the weight.
template <typename Of>
inline void pack_tiles(const Of& of, TileWindow& window) {
  for (int64_t tap = 0; tap < 9; ++tap) {
    for (int64_t out = 0; out < kConvChannels; ++out) {
      for (int64_t in = 0; in < kConvChannels; in += 2) {
        window.weights[tap][out / kLanes][in / 2][out % kLanes] =
            pair_of(of(out, in, tap / 3, tap % 3), of(out, in + 1, tap / 3, tap % 3));
      }
    }
  }
}

// sums[p][o] = bias[o] + the window's products for kBlock pixels in a row from `in` on, where rows
// are `pitch` pixels apart.
inline void window_block(const BFloat16* in, int64_t pitch, const TileWindow& window,
                         const float* bias, float* sums) {
  load_sums(bias, bias, 0);
#pragma GCC unroll 9
  for (int64_t tap = 0; tap < 9; ++tap) {
    const BFloat16* pixels = in + (tap / 3 * pitch + tap % 3) * kConvChannels;
    multiply_tiles({pixels, pixels + kTileRows * kConvChannels, kTileBytes},
                   {window.weights[tap][0], window.weights[tap][1], kTileBytes});
  }
  store_sums(sums, sums + kTileRows * kConvChannels, kConvChannels * sizeof(float));
}

// finish(y, x, count, sums) takes the sums of `count` neighbours of a row from (y, x) on, some of
// them twice. `in` has `height` rows of `pitch` pixels, of which the results fill height - 2 of
// `width`, at most pitch - 2: the sums of pixels run on from row to row, and those over two of them
// are left out. Reads kBlock + 2 pitch + 2 pixels where `in` has fewer.
template <typename Finish>
inline void window_image(const BFloat16* in, int64_t height, int64_t pitch, int64_t width,
                         const TileWindow& window, const float* bias, const Finish& finish) {
  alignas(64) float sums[kBlock * kConvChannels];
  const int64_t end = (height - 3) * pitch + width;
  for (int64_t begin = 0; begin < end; begin += kBlock) {
    // The last block ends where the results do.
    const int64_t from = begin + kBlock <= end || end < kBlock ? begin : end - kBlock;
    window_block(in + from * kConvChannels, pitch, window, bias, sums);
    const int64_t until = from + kBlock < end ? from + kBlock : end;
    int64_t y = from / pitch, x = from % pitch;
    for (int64_t p = from; p < until; p += pitch - x, ++y, x = 0) {
      if (x >= width) continue;
      const int64_t count = until - p < width - x ? until - p : width - x;
      finish(y, x, count, sums + (p - from) * kConvChannels);
    }
  }
}

// Pixels that window_image may read of an image with so many.
inline int64_t window_reads(int64_t height, int64_t pitch) {
  const int64_t least = kBlock + 2 * pitch + 2;
  return height * pitch > least ? height * pitch : least;
}

}  // namespace
}  // namespace crpt::CRPT_ISA
