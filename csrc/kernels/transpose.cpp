#include "kernels/transpose.h"

#include "kernels/transpose_tile.h"

namespace crpt::CRPT_ISA {

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
