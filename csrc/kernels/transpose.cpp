#include "kernels/transpose.h"

#include "kernels/parallel.h"
#include "kernels/transpose_tile.h"

namespace crpt::CRPT_ISA {
namespace {

// A tile of any size, element by element: what is left at the edges.
inline void any_tile(const uint32_t* in, int64_t stride, uint32_t* out, int64_t out_stride,
                     int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t r = 0; r < rows; ++r) out[c * out_stride + r] = in[r * stride + c];
  }
}

inline void whole_tile(const uint32_t* in, int64_t stride, uint32_t* out, int64_t out_stride) {
  TileRow x[kTile];
  for (int64_t r = 0; r < kTile; ++r) __builtin_memcpy(&x[r], in + r * stride, sizeof(TileRow));
  transpose_tile(x);
  for (int64_t c = 0; c < kTile; ++c) {
    __builtin_memcpy(out + c * out_stride, &x[c], sizeof(TileRow));
  }
}

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
