// Tiles of 16 by 16 elements turned over, for transpose and for kernels that write a result both
// ways.
#pragma once

#include "kernels/parallel.h"

namespace crpt::CRPT_ISA {
namespace {

constexpr int64_t kTile = 16;

// A tile of any size, element by element: what is left at the edges.
template <typename T>
inline void any_tile(const T* in, int64_t stride, T* out, int64_t out_stride, int64_t rows,
                     int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) out[c * out_stride + r] = in[r * stride + c];
  }
}

template <typename T>
inline void whole_tile(const T* in, int64_t stride, T* out, int64_t out_stride) {
  any_tile(in, stride, out, out_stride, kTile, kTile);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
// Rows i and i + 8 interleaved, four times over: a perfect shuffle of the tile's index bits, which
// exchanges the four of the row with the four of the column.
typedef uint32_t TileRow __attribute__((vector_size(64)));

inline void shuffle_tile(const void* in, int64_t stride, void* out, int64_t out_stride) {
  TileRow x[kTile], y[kTile];
  for (int64_t r = 0; r < kTile; ++r) {
    __builtin_memcpy(&x[r], static_cast<const char*>(in) + r * stride * 4, sizeof(TileRow));
  }
  for (int round = 0; round < 4; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      y[2 * i] = __builtin_shufflevector(x[i], x[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                         6, 22, 7, 23);
      y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28,
                                             13, 29, 14, 30, 15, 31);
    }
    for (int i = 0; i < kTile; ++i) x[i] = y[i];
  }
  for (int64_t c = 0; c < kTile; ++c) {
    __builtin_memcpy(static_cast<char*>(out) + c * out_stride * 4, &x[c], sizeof(TileRow));
  }
}

inline void whole_tile(const uint32_t* in, int64_t stride, uint32_t* out, int64_t out_stride) {
  shuffle_tile(in, stride, out, out_stride);
}
inline void whole_tile(const float* in, int64_t stride, float* out, int64_t out_stride) {
  shuffle_tile(in, stride, out, out_stride);
}
#endif
#endif

// Up to kTile rows of `columns` elements to as many columns of `out`.
template <typename T>
inline void transpose_band(const T* in, int64_t stride, T* out, int64_t out_stride, int64_t rows,
                           int64_t columns) {
  for (int64_t c = 0; c < columns; c += kTile) {
    const int64_t width = columns - c < kTile ? columns - c : kTile;
    if (rows == kTile && width == kTile) {
      whole_tile(in + c, stride, out + c * out_stride, out_stride);
    } else {
      any_tile(in + c, stride, out + c * out_stride, out_stride, rows, width);
    }
  }
}

}  // namespace
}  // namespace crpt::CRPT_ISA
