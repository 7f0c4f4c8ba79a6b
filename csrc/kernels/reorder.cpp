#include "kernels/reorder.h"

#include "kernels/convert.h"
#include "kernels/parallel.h"
#include "kernels/transpose_tile.h"

namespace crpt::CRPT_ISA {
namespace {

constexpr int64_t kAhead = 64;  // elements

template <typename In, typename Out>
inline void any_tile(const In* in, int64_t columns, Out* out, int64_t rows, int64_t height,
                     int64_t width) {
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t r = 0; r < height; ++r) narrow(widen(in[r * columns + c]), out + c * rows + r);
  }
}

template <typename In, typename Out>
inline void whole_tile(const In* in, int64_t columns, Out* out, int64_t rows) {
  TileRow x[kTile];
  for (int64_t r = 0; r < kTile; ++r) {
    // More rows are read at once than the hardware looks ahead in.
    __builtin_prefetch(in + r * columns + kAhead);
    float row[kTile];
#pragma omp simd
    for (int64_t c = 0; c < kTile; ++c) row[c] = widen(in[r * columns + c]);
    __builtin_memcpy(&x[r], row, sizeof(row));
  }
  transpose_tile(x);
  for (int64_t c = 0; c < kTile; ++c) {
    float column[kTile];
    __builtin_memcpy(column, &x[c], sizeof(column));
#pragma omp simd
    for (int64_t r = 0; r < kTile; ++r) narrow(column[r], out + c * rows + r);
  }
}

template <typename In, typename Out>
void reorder_one(const In* in, Out* out, int64_t rows, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kTile) {
    const int64_t width = columns - c < kTile ? columns - c : kTile;
    for (int64_t r = 0; r < rows; r += kTile) {
      const int64_t height = rows - r < kTile ? rows - r : kTile;
      const In* from = in + r * columns + c;
      Out* to = out + c * rows + r;
      if (height == kTile && width == kTile) {
        whole_tile(from, columns, to, rows);
      } else {
        any_tile(from, columns, to, rows, height, width);
      }
    }
  }
}

template <typename In, typename Out>
void reorder_all(const ReorderArgs& args) {
  const int64_t size = args.rows * args.columns;
  parallel_for(args.count, team_size(args.threads, args.count * size), [&](int64_t n) {
    reorder_one(static_cast<const In*>(args.in) + n * size, static_cast<Out*>(args.out) + n * size,
                args.rows, args.columns);
  });
}

template <typename In>
void reorder_from(const ReorderArgs& args) {
  if (args.out_dtype == DType::f32) {
    reorder_all<In, float>(args);
  } else {
    reorder_all<In, BFloat16>(args);
  }
}

}  // namespace

void reorder(const ReorderArgs& args) {
  if (args.in_dtype == DType::f32) {
    reorder_from<float>(args);
  } else {
    reorder_from<BFloat16>(args);
  }
}

}  // namespace crpt::CRPT_ISA
