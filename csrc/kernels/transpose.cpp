#include "kernels/transpose.h"

#include "kernels/parallel.h"

namespace crpt::CRPT_ISA {
namespace {

constexpr int64_t kTile = 16;

// A tile of any size, element by element: what is left at the edges.
inline void any_tile(const uint32_t* in, int64_t stride, uint32_t* out, int64_t out_stride,
                     int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) out[c * out_stride + r] = in[r * stride + c];
  }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define CRPT_SHUFFLES
#endif
#endif

#if defined(CRPT_SHUFFLES)
// Rows i and i + 8 interleaved, four times over: a perfect shuffle of the tile's index bits, which
// exchanges the four of the row with the four of the column.
typedef uint32_t Row __attribute__((vector_size(64)));

inline void whole_tile(const uint32_t* in, int64_t stride, uint32_t* out, int64_t out_stride) {
  Row x[kTile], y[kTile];
  for (int64_t r = 0; r < kTile; ++r) __builtin_memcpy(&x[r], in + r * stride, sizeof(Row));
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
  for (int64_t c = 0; c < kTile; ++c) __builtin_memcpy(out + c * out_stride, &x[c], sizeof(Row));
}
#else
inline void whole_tile(const uint32_t* in, int64_t stride, uint32_t* out, int64_t out_stride) {
  any_tile(in, stride, out, out_stride, kTile, kTile);
}
#endif

}  // namespace

void transpose(const TransposeArgs& args) {
  const int64_t bands = (args.columns + kTile - 1) / kTile;
  // Each task writes kTile rows of `out` from end to end.
  parallel_for(bands, team_size(args.threads, args.rows * args.columns), [&](int64_t band) {
    const int64_t c = band * kTile;
    const int64_t columns = args.columns - c < kTile ? args.columns - c : kTile;
    const uint32_t* in = static_cast<const uint32_t*>(args.in) + c;
    uint32_t* out = static_cast<uint32_t*>(args.out) + c * args.rows;
    for (int64_t r = 0; r < args.rows; r += kTile) {
      const int64_t rows = args.rows - r < kTile ? args.rows - r : kTile;
      if (rows == kTile && columns == kTile) {
        whole_tile(in + r * args.stride, args.stride, out + r, args.rows);
      } else {
        any_tile(in + r * args.stride, args.stride, out + r, args.rows, rows, columns);
      }
    }
  });
}

}  // namespace crpt::CRPT_ISA
