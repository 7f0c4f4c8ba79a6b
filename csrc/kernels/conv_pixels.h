// Bytes as bf16, which holds all of them exactly, row by row and as the first layer's kernels take
// them.
#pragma once

#include "kernels/conv_window.h"

namespace crpt::CRPT_ISA {
namespace {

// Pairs of neighbours in a row of an image, the last one's partner 0 where the width is odd. Rows
// follow each other without a gap, so that all of them are converted in one go where it is even.
inline int64_t pixel_pitch(int64_t width) { return (width + 1) / 2; }

// The rows of images that a band of results needs, [channel, row, pitch].
class PixelBand {
 public:
  PixelBand(uint32_t* pairs, int64_t channels, int64_t height, int64_t width)
      : pairs_(pairs), channels_(channels), height_(height), width_(width) {}

  // With room for a vector that begins in the last row.
  static int64_t size(int64_t channels, int64_t width) {
    return channels * (2 * kBandRows + 1) * pixel_pitch(width) + kLanes;
  }
  // For results in rows [begin, begin + rows).
  void read(const uint8_t* image, int64_t begin, int64_t rows) {
    for (int64_t c = 0; c < channels_; ++c) {
      const uint8_t* from = image + (c * height_ + 2 * begin) * width_;
      if (width_ % 2 == 0) {
        widen_bytes(from, (2 * rows + 1) * width_, row(c, 0));
        continue;
      }
      for (int64_t r = 0; r <= 2 * rows; ++r) {
        widen_bytes(from + r * width_, width_, row(c, r));
        row(c, r)[width_ / 2] &= 0xFFFFu;
      }
    }
  }
  uint32_t* row(int64_t channel, int64_t r) const {
    return pairs_ + (channel * (2 * kBandRows + 1) + r) * pixel_pitch(width_);
  }

 private:
  static void widen_bytes(const uint8_t* from, int64_t count, uint32_t* pairs) {
    uint16_t* __restrict to = reinterpret_cast<uint16_t*>(pairs);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      to[i] =
          static_cast<uint16_t>(to_bits(static_cast<float>(static_cast<int32_t>(from[i]))) >> 16);
    }
  }

  uint32_t* pairs_;
  int64_t channels_, height_, width_;
};

}  // namespace
}  // namespace crpt::CRPT_ISA
