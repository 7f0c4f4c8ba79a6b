// The eight tile registers of CPUs with AMX: matrices of 16 rows of 64 bytes, and their product,
// which is sixteen times as fast as one by vectors of float. Other levels do the same in float, one
// after the other, so that tests of what is built on them run on any CPU.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels/convert.h"

namespace crpt::CRPT_ISA {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;  // of a row: 32 bf16, 16 pairs of them or 16 floats

#if defined(CRPT_TILES)

// The compilers' intrinsics do not say all that they read; those of tiles take their numbers as
// text, which a template has none of.

// The registers are a thread's own, and usable while one of these lives in it.
class TilesInUse {
 public:
  TilesInUse() {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shapes = {};
    shapes.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = kTileBytes;
      shapes.rows[tile] = kTileRows;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes) : "memory");
  }
  ~TilesInUse() { __asm__ volatile("tilerelease" : : : "memory"); }
  TilesInUse(const TilesInUse&) = delete;
  TilesInUse& operator=(const TilesInUse&) = delete;
};

// `stride` is in bytes, and 0 gives the same row 16 times.
template <int Tile>
inline void tile_load(const void* rows, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                   :
                   : "r"(rows), "r"(stride), "i"(Tile)
                   : "memory");
}
template <int Tile>
inline void tile_store(void* rows, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                   :
                   : "r"(rows), "r"(stride), "i"(Tile)
                   : "memory");
}
// sum[m][n] += sum_k a[m][k] b[k][n]: of 16 x 32 bf16 and 32 x 16, of which a row holds pairs,
// b[2 k][n] and b[2 k + 1][n].
template <int Sum, int A, int B>
inline void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(A), "i"(B));
}

#else

struct TileRegister {
  alignas(64) uint32_t words[kTileRows][kTileBytes / 4];
};
inline TileRegister& tile_register(int number) {
  static thread_local TileRegister registers[8];
  return registers[number];
}

class TilesInUse {
 public:
  TilesInUse() {
    for (int tile = 0; tile < 8; ++tile) tile_register(tile) = TileRegister{};
  }
};

template <int T>
inline void tile_load(const void* rows, int64_t stride) {
  for (int64_t m = 0; m < kTileRows; ++m) {
    memcpy(tile_register(T).words[m], static_cast<const char*>(rows) + m * stride, kTileBytes);
  }
}
template <int T>
inline void tile_store(void* rows, int64_t stride) {
  for (int64_t m = 0; m < kTileRows; ++m) {
    memcpy(static_cast<char*>(rows) + m * stride, tile_register(T).words[m], kTileBytes);
  }
}
template <int Sum, int A, int B>
inline void tile_multiply() {
  const TileRegister &a = tile_register(A), &b = tile_register(B);
  for (int64_t m = 0; m < kTileRows; ++m) {
    float sums[16];
    memcpy(sums, tile_register(Sum).words[m], kTileBytes);
    for (int64_t k = 0; k < 16; ++k) {
      const uint32_t pair = a.words[m][k];
      for (int64_t n = 0; n < 16; ++n) {
        sums[n] += from_bits(pair << 16) * from_bits(b.words[k][n] << 16);
        sums[n] += from_bits(pair & 0xFFFF0000u) * from_bits(b.words[k][n] & 0xFFFF0000u);
      }
    }
    memcpy(tile_register(Sum).words[m], sums, kTileBytes);
  }
}

#endif

// Sums of two tiles by two, in registers 0 to 3: rows of 32 floats, `stride` bytes apart, the first
// 16 of them from `sums` on and the others from `below` on.
inline void load_sums(const float* sums, const float* below, int64_t stride) {
  tile_load<0>(sums, stride);
  tile_load<1>(sums + 16, stride);
  tile_load<2>(below, stride);
  tile_load<3>(below + 16, stride);
}
inline void store_sums(float* sums, float* below, int64_t stride) {
  tile_store<0>(sums, stride);
  tile_store<1>(sums + 16, stride);
  tile_store<2>(below, stride);
  tile_store<3>(below + 16, stride);
}

// Two tiles of one factor, the upper and lower rows of the first or the left and right columns of
// the second.
struct Factor {
  const void *first, *second;
  int64_t stride;  // bytes
};
// Adds their product to the sums. All loads come first: between products they delay them.
inline void multiply_tiles(const Factor& a, const Factor& b) {
  tile_load<4>(a.first, a.stride);
  tile_load<5>(a.second, a.stride);
  tile_load<6>(b.first, b.stride);
  tile_load<7>(b.second, b.stride);
  tile_multiply<0, 4, 6>();
  tile_multiply<2, 5, 6>();
  tile_multiply<1, 4, 7>();
  tile_multiply<3, 5, 7>();
}

}  // namespace
}  // namespace crpt::CRPT_ISA
