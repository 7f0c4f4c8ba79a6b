// The gradients of the weights by tiles: products over pixels, of the gradient of what a layer gave
// with what it was given.
#pragma once

#include "kernels/amx_tiles.h"
#include "kernels/conv_values.h"
#include "kernels/transpose_tile.h"

namespace crpt::CRPT_ISA {
namespace {

// Such a product takes 32 pixels at once, of the gradient transposed, rows of a channel out, with
// pairs of pixels in. Both lie as rows of `pitch` pixels that run on from one to the next, the
// gradient with zeros behind each: a tap of the window is a place to begin in the pixels, at even
// ones or, by pairs of their own, at odd ones.
constexpr int64_t kStep = 32;
constexpr int64_t kGradRow = 9 * kConvChannels;  // floats of a channel out in a weight's gradient

// From `count` pixels, a multiple of kStep, rows of a channel each, `stride` apart; adds their sums
// to `bias`.
inline void transpose_pixels(const BFloat16* pixels, int64_t count, BFloat16* rows, int64_t stride,
                             float* bias) {
  const Pairs ones = Pairs{} + 0x3F803F80u;
  Floats bias_low, bias_high;
  load(bias, bias_low);
  load(bias + kLanes, bias_high);
  for (int64_t p = 0; p < count; p += kStep) {
    TileRow low[kTile], high[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      Elements first, second;
      load(pixels + (p + 2 * i) * kConvChannels, first);
      load(pixels + (p + 2 * i + 1) * kConvChannels, second);
      interleave(first, second, low[i], high[i]);
      add_products(low[i], ones, bias_low);
      add_products(high[i], ones, bias_high);
    }
    transpose_tile(low);
    transpose_tile(high);
    for (int64_t o = 0; o < kTile; ++o) {
      store(low[o], rows + o * stride + p);
      store(high[o], rows + (kTile + o) * stride + p);
    }
  }
  store(bias_low, bias);
  store(bias_high, bias + kLanes);
}

// Pairs of pixels of a row, of `count` its own and zeros behind them: (0, 1), (2, 3), ...
inline void pair_row(const BFloat16* pixels, int64_t count, int64_t pairs, Pairs* out) {
  for (int64_t i = 0; i < pairs; ++i, out += 2) {
    Elements first{}, second{};
    if (2 * i < count) load(pixels + 2 * i * kConvChannels, first);
    if (2 * i + 1 < count) load(pixels + (2 * i + 1) * kConvChannels, second);
    interleave(first, second, out[0], out[1]);
  }
}

// Of one tap of the weight: sums[o][i] += over the pixels of a band.
inline void multiply_tap(const BFloat16* grad, int64_t stride, const Pairs* in, int64_t count,
                         float* sums) {
  constexpr int64_t row = kGradRow * sizeof(float);
  float* const below = sums + kTileRows * kGradRow;
  load_sums(sums, below, row);
  for (int64_t p = 0; p < count; p += kStep, grad += kStep, in += kStep) {
    multiply_tiles({grad, grad + kTileRows * stride, stride * 2}, {in, in + 1, 2 * kTileBytes});
  }
  store_sums(sums, below, row);
}

// The same of the first layer for 32 rows of pixels, or the first 16 of them: sums[row][o] += over
// `rows` rows of results. A row of results is two of the band's on, and `count` columns long.
template <int Tiles>
inline void multiply_pixels(const uint16_t* columns, int64_t pitch, int64_t row_stride,
                            const Pairs* grad, int64_t rows, int64_t count, float* sums) {
  constexpr int64_t row = kConvChannels * sizeof(float);
  float* const below = Tiles == 2 ? sums + kTileRows * kConvChannels : sums;
  load_sums(sums, below, row);
  for (int64_t r = 0; r < rows; ++r, columns += row_stride) {
    for (int64_t p = 0; p < count; p += kStep, grad += kStep) {
      const uint16_t* const a = columns + p;
      if constexpr (Tiles == 2) {
        multiply_tiles({a, a + kTileRows * pitch, pitch * 2}, {grad, grad + 1, 2 * kTileBytes});
      } else {
        tile_load<4>(a, pitch * 2);
        tile_load<6>(grad, 2 * kTileBytes);
        tile_load<7>(grad + 1, 2 * kTileBytes);
        tile_multiply<0, 4, 6>();
        tile_multiply<1, 4, 7>();
      }
    }
  }
  if constexpr (Tiles == 2) {
    store_sums(sums, below, row);
  } else {
    tile_store<0>(sums, row);
    tile_store<1>(sums + kLanes, row);
  }
}

}  // namespace
}  // namespace crpt::CRPT_ISA
