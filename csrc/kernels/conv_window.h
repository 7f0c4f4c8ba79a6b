// A row of a convolution over 32 channels: sums over the window, tile by tile in registers.
#pragma once

#include "kernels/conv_values.h"

namespace crpt::CRPT_ISA {
namespace {

constexpr int64_t kPixel = kConvChannels;  // elements of a pixel: a cache line
// Pixels of a tile: 28 sums, two vectors of weights and a pair of pixels fill 32 registers. Without
// units for bf16 speed is not what counts, and few sizes compile in a third of the time.
#if defined(__AVX512BF16__)
constexpr int64_t kMostTile = 14;
#else
constexpr int64_t kMostTile = 3;
#endif
constexpr int64_t kRowPairs = 3 * kConvChannels / 2;  // of a row of the window

// Weights as add_products takes them: [dy, dx, pair of channels in, half of the channels out].
struct Window {
  Pairs weights[3][kRowPairs][2];
};

// of(out, in, dy, dx) is the weight.
template <typename Of>
inline void pack_window(const Of& of, Window& window) {
  for (int64_t dy = 0; dy < 3; ++dy) {
    for (int64_t j = 0; j < kRowPairs; ++j) {
      const int64_t dx = j / 16, in = j % 16 * 2;
      for (int64_t out = 0; out < kConvChannels; ++out) {
        window.weights[dy][j][out / kLanes][out % kLanes] =
            pair_of(of(out, in, dy, dx), of(out, in + 1, dy, dx));
      }
    }
  }
}

// What the sums begin with, for channels below 16 and the others.
struct Begin {
  Floats low, high;
};

// finish(pixel, low, high) takes the sums of P pixels from `x` on. `in` is where the rows of the
// window begin, of which those of [from, to) count.
template <int P, typename Finish>
inline void window_tile(const BFloat16* in, int64_t row, int64_t from, int64_t to,
                        const Window& window, const Begin& begin, int64_t x, const Finish& finish) {
  Floats low[P], high[P];
  for (int p = 0; p < P; ++p) {
    low[p] = begin.low;
    high[p] = begin.high;
  }
  for (int64_t dy = from; dy < to; ++dy) {
    const BFloat16* pixels = in + dy * row + x * kPixel;
    for (int64_t j = 0; j < kRowPairs; ++j) {
      const Pairs weights_low = window.weights[dy][j][0], weights_high = window.weights[dy][j][1];
#pragma GCC unroll 14
      for (int p = 0; p < P; ++p) {
        Pairs pixel;
        spread(pixels + p * kPixel + 2 * j, pixel);
        add_products(pixel, weights_low, low[p]);
        add_products(pixel, weights_high, high[p]);
      }
    }
  }
  for (int p = 0; p < P; ++p) finish(x + p, low[p], high[p]);
}

template <int P>
struct Tile {
  static constexpr int size = P;
};

// call(tile, x) for the tiles of a row, as equal as can be: tile.size pixels from x on.
template <typename Call>
inline void for_tiles(int64_t width, const Call& call) {
  const int64_t tiles = (width + kMostTile - 1) / kMostTile;
  int64_t x = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t size = (width - x) / (tiles - t);
    switch (size) {
#define CRPT_TILE(P)                                  \
  case P:                                             \
    if constexpr (P <= kMostTile) call(Tile<P>{}, x); \
    break;
      CRPT_TILE(1)
      CRPT_TILE(2)
      CRPT_TILE(3)
      CRPT_TILE(4)
      CRPT_TILE(5)
      CRPT_TILE(6)
      CRPT_TILE(7)
      CRPT_TILE(8)
      CRPT_TILE(9)
      CRPT_TILE(10)
      CRPT_TILE(11)
      CRPT_TILE(12)
      CRPT_TILE(13)
      CRPT_TILE(14)
#undef CRPT_TILE
    }
    x += size;
  }
}

// A whole row of results.
template <typename Finish>
inline void window_row(const BFloat16* in, int64_t row, int64_t from, int64_t to,
                       const Window& window, const Begin& begin, int64_t width,
                       const Finish& finish) {
  for_tiles(width, [&](auto tile, int64_t x) {
    window_tile<decltype(tile)::size>(in, row, from, to, window, begin, x, finish);
  });
}

}  // namespace
}  // namespace crpt::CRPT_ISA
