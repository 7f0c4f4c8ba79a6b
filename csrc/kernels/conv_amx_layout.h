// Where the gradients of one image lie while they are passed back by tiles: as rows of pixels that
// run on from one to the next, with zeros around them.
#pragma once

#include "kernels/conv_amx_gradients.h"
#include "kernels/conv_amx_pixels.h"
#include "kernels/conv_amx_window.h"

namespace crpt::CRPT_ISA {
namespace {

struct Workspace {
  BFloat16* grad[2];  // of a layer's sums and of the one's before it, zeros around them
  BFloat16* transposed;
  Pairs *even_pairs, *odd_pairs;
  uint16_t* columns[3];  // the first, second and third that the window sees of each row
};

// Counts of pixels unless they say otherwise.
struct GradientLayout {
  int64_t channels, layer_count;
  int64_t first_height, first_width;  // of the first layer's result

  int64_t height(int64_t layer) const { return first_height - 2 * layer; }
  int64_t width(int64_t layer) const { return first_width - 2 * layer; }
  int64_t image(int64_t layer) const { return height(layer) * width(layer) * kConvChannels; }
  // Pixels of a row of a layer's gradient with its margins, even so that pairs begin with rows, ...
  int64_t pitch(int64_t layer) const { return round_up(width(layer) + 2 * kMargin, 2); }
  // ... of all of it, ...
  int64_t padded(int64_t layer) const { return (height(layer) + 2 * kMargin) * pitch(layer); }
  // ... of it without its margins, in whole steps, ...
  int64_t steps(int64_t layer) const {
    return round_up((height(layer) - 1) * pitch(layer) + width(layer), kStep);
  }
  int64_t inside(int64_t layer) const { return kMargin * pitch(layer) + kMargin; }
  // ... and of all that is read of it.
  int64_t reads(int64_t layer) const {
    const int64_t end = inside(layer) + steps(layer);
    return end > padded(layer) ? end : padded(layer);
  }
  // Elements between the rows of the transposed gradient: an odd number of cache lines, for rows
  // that compete for none.
  int64_t stride(int64_t layer) const { return round_up(steps(layer), 2 * kStep) + kStep; }
  // Pairs of pixels, from even or odd ones on: those of all rows, and all that the last tap reads.
  int64_t pairs(int64_t layer) const { return steps(layer) / 2 + pitch(layer) + 2; }
  // Elements between rows of columns.
  int64_t columns() const { return round_up(first_width + 1, kStep); }
  int64_t column_rows() const { return kBandIn * channels + kTileRows; }

  int64_t lay_out(char* memory, Workspace* work) const {
    constexpr int64_t pixel = kConvChannels * sizeof(BFloat16), pair = 2 * pixel;
    const int64_t most = window_reads(first_height + 2 * kMargin, pitch(0));
    const int64_t grad = (most > reads(0) ? most : reads(0)) * pixel;
    const int64_t row_pairs = kBandRows * round_up(first_width, kStep) / 2;
    const bool more = layer_count > 1;
    const int64_t pairs = more && this->pairs(1) > row_pairs ? this->pairs(1) : row_pairs;
    // A line before the columns, for what is stored one before them.
    const int64_t columns = column_rows() * this->columns() * sizeof(uint16_t) + 64;
    const int64_t sizes[] = {grad,         grad,         more ? kConvChannels * stride(1) * 2 : 0,
                             pairs * pair, pairs * pair, columns,
                             columns,      columns};
    constexpr int64_t parts = sizeof(sizes) / sizeof(sizes[0]);
    int64_t offsets[parts + 1] = {0};
    for (int64_t i = 0; i < parts; ++i) offsets[i + 1] = offsets[i] + round_up(sizes[i], 64);
    if (work != nullptr) {
      const auto at = [&](int64_t i) { return static_cast<void*>(memory + offsets[i]); };
      const auto columns_at = [&](int64_t i) { return static_cast<uint16_t*>(at(i)) + 32; };
      *work = {{static_cast<BFloat16*>(at(0)), static_cast<BFloat16*>(at(1))},
               static_cast<BFloat16*>(at(2)),
               static_cast<Pairs*>(at(3)),
               static_cast<Pairs*>(at(4)),
               {columns_at(5), columns_at(6), columns_at(7)}};
    }
    return offsets[parts];
  }
};

}  // namespace
}  // namespace crpt::CRPT_ISA
