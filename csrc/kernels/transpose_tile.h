// A square of 16 x 16 elements of 4 bytes, transposed in registers.
#pragma once

#include <cstdint>

namespace crpt::CRPT_ISA {
namespace {

constexpr int64_t kTile = 16;

typedef uint32_t TileRow __attribute__((vector_size(64)));

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define CRPT_SHUFFLES
#endif
#endif

inline void transpose_tile(TileRow (&x)[kTile]) {
#if defined(CRPT_SHUFFLES)
  // Rows i and i + 8 interleaved, four times over: a perfect shuffle of the tile's index bits,
  // which exchanges the four of the row with the four of the column.
  TileRow y[kTile];
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
#else
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < i; ++j) {
      const uint32_t other = x[i][j];
      x[i][j] = x[j][i];
      x[j][i] = other;
    }
  }
#endif
}

}  // namespace
}  // namespace crpt::CRPT_ISA
